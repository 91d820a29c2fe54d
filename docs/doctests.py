"""What the site's API pages need of our docstrings: examples in fences, a line for each argument, no Sphinx roles."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?)(?:^[ ]*\S.*\n?)*", re.MULTILINE)
_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Doctests(griffe.Extension):
    """Without fences, Markdown reads ``>>>`` as a quotation and ``['a']`` as a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by mkdocstrings for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(_fenced, _ROLE.sub(r"`\1`", obj.docstring.value))
            obj.docstring.value = _SHARED.sub(_apart, text) if isinstance(obj, griffe.Function) else text


def _fenced(found: re.Match[str]) -> str:
    lines = found[0].rstrip("\n").split("\n")
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    lines = [line.partition("  # doctest:")[0].rstrip() for line in lines]
    return "\n".join([f"{indent}```pycon", *lines, f"{indent}```", ""])


def _apart(found: re.Match[str]) -> str:
    return "\n".join(f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", "))
