"""Every mechanism to be tested by the matrix: what the test files of this folder list under ``CASES``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polyhead.attention import Attention


@dataclass(frozen=True)
class Case:
    """A mechanism of 32 features.

    Attributes:
        make: gives it, causal or not.
        causal: whether it has a causal form.
        both: whether it has a form that sees both directions.
        steps: whether it can decode step by step.
        padding: whether outputs must not depend on padding (False where the paper defines it for whole blocks only).
        gradients: whether outputs are differentiable everywhere a float64 check could land (False for hard choices).
        exact_cache: whether ``State.bytes`` equals ``cache_bytes``.
    """

    make: Callable[[bool], Attention]
    causal: bool = True
    both: bool = True
    steps: bool = True
    padding: bool = True
    gradients: bool = True
    exact_cache: bool = True


def all_cases() -> dict[str, Case]:
    """Case by name, from ``CASES`` of every ``test_*.py`` beside this file."""
    found: dict[str, Case] = {}
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        if file.name == "test_matrix.py" or "CASES" not in file.read_text():
            continue
        spec = importlib.util.spec_from_file_location(f"attention_cases_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.CASES
    return found
