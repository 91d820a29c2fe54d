"""What the catalogue's code looks like: how to import it, its signature and the example of its docstring."""

from __future__ import annotations

import inspect
import pkgutil
import re
import textwrap
from functools import lru_cache
from typing import Any, NamedTuple

from markupsafe import Markup, escape

__all__ = ["Sample", "sample_of"]


class Sample(NamedTuple):
    """One public name of the package.

    Attributes:
        name: dotted.
        line: imports it.
        signature: how it is called; "" where that cannot be read.
        summary: first paragraph of its docstring.
        example: of its docstring, without prompts, results as comments; "" without one.
    """

    name: str
    line: str
    signature: str
    summary: Markup
    example: str


@lru_cache(maxsize=512)
def sample_of(name: str) -> Sample:
    """Look a dotted name of the catalogue up; one that an extra is missing for has its name alone."""
    module, _, last = name.rpartition(".")
    line = f"from {module} import {last}"
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        return Sample(name, line, "", escape(f"It cannot be loaded here: {error}"), "")
    doc = inspect.getdoc(target) or ""
    return Sample(name, line, _signature(target, last), _summary(doc), _example(doc))


def _signature(target: Any, name: str) -> str:
    try:
        return name + str(inspect.signature(target))
    except (TypeError, ValueError):
        return ""


def _summary(doc: str) -> Markup:
    text = escape(" ".join(doc.split("\n\n")[0].split()))
    # ``code`` and :class:`~names`, as docstrings have them.
    return Markup(re.sub(r"``(.+?)``|:\w+:`~?(.+?)`", lambda found: f"<code>{found[1] or found[2]}</code>", text))


def _example(doc: str) -> str:
    found = re.search(r"^Examples?:\n((?:[ \t]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    if found is None:
        return ""
    lines = textwrap.dedent(re.sub(r"\s*# doctest: .*", "", found.group(1))).strip().splitlines()
    return "\n".join(line[4:] if re.match(r">>>|\.\.\.", line) else f"# {line}".rstrip() for line in lines)
