"""The claim of mha-memorization, measured by ``polyhead lab run mha-memorization``."""

from __future__ import annotations

from polyhead.lab.memorization import EXPERIMENT

run = EXPERIMENT.run
