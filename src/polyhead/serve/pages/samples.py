"""What the catalogue's code looks like: how to import it, its signature and the example of its docstring."""

from __future__ import annotations

import inspect
import pkgutil
import re
import textwrap
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Sample", "sample_of"]


class Sample(NamedTuple):
    """One public name of the package.

    Attributes:
        name: dotted.
        line: imports it.
        signature: how it is called; "" where that cannot be read.
        summary: first sentence of its docstring.
        example: of its docstring; "" without one.
    """

    name: str
    line: str
    signature: str
    summary: str
    example: str


@lru_cache(maxsize=512)
def sample_of(name: str) -> Sample:
    """Look a dotted name of the catalogue up; one that an extra is missing for has its name alone."""
    module, _, last = name.rpartition(".")
    line = f"from {module} import {last}"
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        return Sample(name, line, "", f"It cannot be loaded here: {error}", "")
    doc = inspect.getdoc(target) or ""
    return Sample(name, line, _signature(target, last), " ".join(doc.split("\n\n")[0].split()), _example(doc))


def _signature(target: Any, name: str) -> str:
    try:
        return name + str(inspect.signature(target))
    except (TypeError, ValueError):
        return ""


def _example(doc: str) -> str:
    found = re.search(r"^Examples?:\n((?:[ \t]+.*\n|\n)+)", doc + "\n", re.MULTILINE)
    if found is None:
        return ""
    return re.sub(r"\s*# doctest: .*", "", textwrap.dedent(found.group(1))).strip()
