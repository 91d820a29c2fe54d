"""The contract of a claim: a small experiment that supports or refutes what a paper reports."""

from __future__ import annotations

import importlib
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Evidence", "Scale", "Verdict", "claim_ids", "loaded", "module_of", "run_claim", "verdict_of"]

Scale = Literal["smoke", "full"]
Verdict = Literal["supported", "refuted", "inconclusive", "untestable here"]
_VERDICTS = ("supported", "refuted", "inconclusive", "untestable here")


@dataclass
class Evidence:
    """What was measured, beside what was expected.

    Attributes:
        measured: the quantity the claim is about, by name.
        baseline: the same for what it is compared with.
        expected: what the claim says should be seen, in words; written before the run.
        interval: ``(low, high)`` 95% interval of the difference or quantity that decides, or None where nothing varies.
        verdict: what that says about the claim at this scale.
        decides: which figure of ``measured`` the interval belongs to.
        data, model: what it was measured on.
        notes: what limits the verdict.
        details: anything else worth keeping, plain values only.
    """

    measured: dict[str, float]
    baseline: dict[str, float]
    expected: str
    interval: tuple[float, float] | None
    verdict: Verdict
    decides: str = ""
    data: str = ""
    model: str = ""
    notes: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in _VERDICTS:
            raise InputError(f"The verdict is {self.verdict!r}, expected one of {', '.join(_VERDICTS)}.")


def verdict_of(low: float, high: float, *, more_than: float = 0.0) -> Verdict:
    """Supported where the whole interval lies above ``more_than``, refuted where it lies below, else inconclusive."""
    if low > more_than:
        return "supported"
    return "refuted" if high < more_than else "inconclusive"


def claim_ids() -> list[str]:
    """Ids of the papers that have a claim file here, sorted."""
    here = Path(__file__).parent
    files = [file.stem for file in here.glob("[!_]*.py") if file.stem not in ("base", "report")]
    return sorted(re.sub(r"^paper-(?=\d)", "", name.replace("_", "-")) for name in files)


def module_of(id: str) -> str:
    """Name of a paper's claim module: the id with ``_`` for ``-``, after ``paper_`` where it begins with a digit.

    Example:
        >>> module_of("cd-t"), module_of("2dmse")
        ('cd_t', 'paper_2dmse')
    """
    name = id.replace("-", "_")
    return f"paper_{name}" if name[:1].isdigit() else name


def run_claim(id: str, *, scale: Scale = "smoke", seed: int = 0) -> dict[str, Any]:
    """Run a paper's claim: ``run(scale, seed) -> Evidence`` of ``polyhead/claims/<module_of(id)>.py``.

    Args:
        id: of the paper, as in ``polyhead papers``.
        scale: "smoke" runs for seconds, "full" for minutes.
        seed: of everything random.

    Returns:
        The evidence as plain values, with id, date, scale, seed, seconds, versions and machine.

    Raises:
        InputError: a paper without a claim file, or an unknown scale.
    """
    if id not in claim_ids():
        raise InputError(f"No claim '{id}' here; there are {', '.join(claim_ids())}. `polyhead papers {id}` says more.")
    if scale not in ("smoke", "full"):
        raise InputError(f"scale is {scale!r}, expected 'smoke' or 'full'.")
    run: Callable[[Scale, int], Evidence] = importlib.import_module(f"polyhead.claims.{module_of(id)}").run
    started = time.perf_counter()
    evidence = run(scale, seed)
    return {
        "id": id,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "scale": scale,
        "seed": seed,
        **vars(evidence),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("polyhead", "torch", "transformers", "numpy")},
        "machine": platform.machine(),
    }


@lru_cache(maxsize=3)
def loaded(name: str, *, lm_head: bool = False) -> HeadedModel:
    """A model in float32, loaded once for all claims of a run; every claim leaves it as it found it."""
    from polyhead.model import load

    return load(name, lm_head=lm_head, dtype="float32")
