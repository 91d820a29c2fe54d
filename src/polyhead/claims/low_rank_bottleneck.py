"""The claim of low-rank-bottleneck, measured by ``polyhead lab run low-rank-bottleneck``."""

from __future__ import annotations

from polyhead.lab.low_rank_bottleneck import EXPERIMENT

run = EXPERIMENT.run
