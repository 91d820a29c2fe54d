"""The laboratory: theories of attention on toy data, each a seeded run of minutes that draws its plot."""

from __future__ import annotations

from polyhead.lab.base import Experiment, draw, experiments, find

__all__ = ["Experiment", "draw", "experiments", "find"]
