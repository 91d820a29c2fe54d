"""Cards and code held to each other: what a card names exists and is marked, what is marked stands on the card."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polyhead
from polyhead.papers import Paper, catalogue, find

SOURCE = Path(polyhead.__file__).parent


def marks_in(code: str, module: str) -> Iterator[tuple[str, str]]:
    """(paper id, dotted name) of everything ``@paper(...)`` marks in a module's source, without importing it."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from visit(child, prefix)
                continue
            name = f"{prefix}.{child.name}"
            for mark in child.decorator_list:
                target = mark.func if isinstance(mark, ast.Call) else mark
                if getattr(target, "id", getattr(target, "attr", None)) != "paper":
                    continue
                ids = [getattr(argument, "value", None) for argument in getattr(mark, "args", [])]
                assert ids, f"{name}: @paper needs ids"
                assert all(isinstance(given, str) for given in ids), f"{name}: @paper takes plain strings"
                yield from ((given, name) for given in ids)
            inner = name if isinstance(child, ast.ClassDef) else f"{name}.<locals>"
            yield from visit(child, inner)

    yield from visit(ast.parse(code), module)


def marks_in_package() -> list[tuple[str, str]]:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.extend(marks_in(file.read_text(encoding="utf-8"), module))
    return found


def resolve(dotted: str) -> Any:
    """The object behind a dotted name: the longest importable module, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            target: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        for part in parts[cut:]:
            target = getattr(target, part)
        return target
    raise ModuleNotFoundError(dotted)


def defined_at(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def test_the_scan_finds_marks_of_every_shape() -> None:
    code = """
@paper("a", "b")
class Outer:
    @papers.paper("c")
    def method(self): ...
if True:
    @other
    @paper("d")
    def inner():
        @paper("e")
        def local(): ...
@paperback("no")
def not_marked(): ...
"""
    assert sorted(marks_in(code, "m")) == [
        ("a", "m.Outer"),
        ("b", "m.Outer"),
        ("c", "m.Outer.method"),
        ("d", "m.inner"),
        ("e", "m.inner.<locals>.local"),
    ]
    with pytest.raises(AssertionError, match="plain strings"):
        list(marks_in("@paper(NAME)\ndef f(): ...", "m"))
    with pytest.raises(AssertionError, match="needs ids"):
        list(marks_in("@paper\ndef f(): ...", "m"))


def test_names_are_resolved_through_modules_and_attributes() -> None:
    assert resolve("polyhead.papers.find") is find
    assert resolve("polyhead.papers.cards.Paper") is Paper
    with pytest.raises(AttributeError):
        resolve("polyhead.papers.no_such_name")


def test_code_on_a_card_exists_and_is_marked() -> None:
    wrong = []
    for card in catalogue().values():
        if card.state == "planned":
            continue
        if not card.code:
            wrong.append(f"{card.id} is {card.state!r} but names no code")
        for name in card.code:
            try:
                marked = vars(resolve(name)).get("__papers__", ())
            except (ImportError, AttributeError) as error:
                wrong.append(f"{card.id} names {name}, which cannot be imported: {error}")
                continue
            if card.id not in marked:
                wrong.append(f"{card.id} names {name}, which lacks @paper({card.id!r})")
    assert wrong == []


def test_planned_cards_name_no_code() -> None:
    assert [card.id for card in catalogue().values() if card.state == "planned" and card.code] == []


def test_marked_code_stands_on_its_card() -> None:
    cards = catalogue()
    wrong = []
    for name, where in marks_in_package():
        if name not in cards:
            wrong.append(f"{where} is marked {name!r}, which is no paper of the catalogue")
            continue
        listed = cards[name].code
        if where not in listed and where not in {defined_at(resolve(code)) for code in listed}:
            wrong.append(f"{where} is marked {name!r} but the card does not list it (state {cards[name].state!r})")
    assert wrong == []


def test_files_a_card_names_exist() -> None:
    for card in catalogue().values():
        if card.claim_file is not None:
            assert (SOURCE / card.claim_file).is_file(), card.claim_file
        if card.docs is not None:
            assert (Path(__file__).parents[2] / "docs" / card.docs).is_file(), card.docs
