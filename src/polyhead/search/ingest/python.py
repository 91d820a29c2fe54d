"""Python sources to documents: one for each docstring, parsed and never imported."""

from __future__ import annotations

import ast
import inspect
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar
from polyhead.search.ingest.encoding import read_bytes

__all__ = ["read_python"]

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class _Place:
    """Where a definition stands: the dotted names around it, and whether the nearest is a class."""

    prefix: str = ""
    in_class: bool = False


def read_python(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document for each module, class, method and function with a docstring, in source order.

    Text: the signature line and the docstring. Title: the dotted name with its module, which is found by going up
    while folders hold an ``__init__.py``. Id: ``path`` for the module, else ``path::qualname``, where a name defined
    again (property setters, ``if``/``else``) gets ``~2``, ``~3`` ...
    """
    tree = _parse(read_bytes(stamp), stamp)
    module = _module_name(stamp.absolute)
    attributes: dict[str, Scalar] = {"object": "module", "module": module, "line": 1}
    if text := _docstring(tree):
        yield Document(stamp.path, text, stamp.path, module, stamp.kind, attributes)
    seen: dict[str, int] = {}
    for node, place in _definitions(tree):
        name = place.prefix + node.name
        seen[name] = seen.get(name, 0) + 1
        text = _docstring(node)
        if not text:
            continue
        again = f"~{seen[name]}" if seen[name] > 1 else ""
        kind = "class" if isinstance(node, ast.ClassDef) else "method" if place.in_class else "function"
        yield Document(
            f"{stamp.path}::{name}{again}",
            f"{_signature(node)}\n\n{text}",
            stamp.path,
            f"{module}.{name}",
            stamp.kind,
            {"object": kind, "module": module, "line": node.lineno},
        )


def _parse(data: bytes, stamp: FileStamp) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(data, filename=stamp.path)
    except SyntaxError as error:
        raise ReadError(stamp.path, f"no valid Python: {error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ReadError(stamp.path, f"no valid Python: {error or 'nested too deeply'}") from None


def _definitions(tree: ast.Module) -> Iterator[tuple[_Definition, _Place]]:
    """Every class and function, also inside others and inside if, try, with and loops, in source order."""
    pending: list[tuple[ast.AST, _Place]] = [(tree, _Place())]
    while pending:
        node, place = pending.pop()
        if isinstance(node, _Definition):
            yield node, place
            is_class = isinstance(node, ast.ClassDef)
            place = _Place(f"{place.prefix}{node.name}." + ("" if is_class else "<locals>."), is_class)
        children = ast.iter_child_nodes(node)
        inner = [
            (child, place) for child in children if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)
        ]
        pending.extend(reversed(inner))


def _docstring(node: _Definition | ast.Module) -> str:
    text = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(text).strip() if text else ""


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{prefix} {node.name}({ast.unparse(node.args)}){returns}"


def _module_name(absolute: str) -> str:
    folder, file = os.path.split(absolute)
    stem = os.path.splitext(file)[0]
    names = [] if stem == "__init__" else [stem]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, name = os.path.split(folder)
        names.insert(0, name)
        if not name:
            break
    return ".".join(names) or stem
