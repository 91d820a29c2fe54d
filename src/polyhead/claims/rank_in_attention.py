"""The claim of rank-in-attention, measured by ``polyhead lab run rank-in-attention``."""

from __future__ import annotations

from polyhead.lab.rank_in_attention import EXPERIMENT

run = EXPERIMENT.run
