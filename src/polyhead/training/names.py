"""Objectives by the names that the command line and configuration files use."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from polyhead.errors import InputError
from polyhead.objectives import (
    AngleSimilarity,
    ContrastiveLoss,
    CoSENTLoss,
    InfoNCE,
    LargeBatchInfoNCE,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    Objective,
    Symmetric,
    TripletLoss,
    TripletMiner,
)
from polyhead.training.data import Kind

__all__ = ["OBJECTIVES", "objective_for"]

OBJECTIVES: dict[str, Callable[[], nn.Module]] = {
    "infonce": lambda: Objective(InfoNCE()),
    "symmetric-infonce": lambda: Objective(Symmetric(InfoNCE())),
    "large-batch-infonce": lambda: LargeBatchInfoNCE(symmetric=True),
    "triplet": lambda: Objective(TripletLoss(), miners=[TripletMiner("semihard")]),
    "multi-similarity": lambda: Objective(MultiSimilarityLoss(), miners=[MultiSimilarityMiner()]),
    "contrastive": lambda: Objective(ContrastiveLoss()),
    "cosent": lambda: Objective(CoSENTLoss()),
    "angle": lambda: Objective(CoSENTLoss(), AngleSimilarity()),
}
_USUAL: dict[str, str] = {
    "pairs": "infonce",
    "triplets": "infonce",
    "labelled": "multi-similarity",
    "scored": "cosent",
}


def objective_for(name: str, kind: Kind) -> nn.Module:
    """The objective of a name; "auto" takes the usual one for that kind of data.

    Raises:
        InputError: no such name, or texts alone, which no objective of these takes.
    """
    if name == "auto":
        if kind not in _USUAL:
            raise InputError("Texts alone do not say which belong together: add labels, or a column of positives.")
        name = _USUAL[kind]
    if name not in OBJECTIVES:
        raise InputError(f"No objective {name!r}; there are auto, {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]()
