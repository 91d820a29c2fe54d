"""The examples in the docstrings of this room hold."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("align_uniform", "compass", "geometry", "intrinsic", "measured", "selective", "sts", "tasks")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_docstrings_hold(name):
    found = doctest.testmod(importlib.import_module(f"polyhead.evaluate.{name}"))
    assert found.attempted > 0
    assert found.failed == 0
