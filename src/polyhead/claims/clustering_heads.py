"""The claim of clustering-heads, measured by ``polyhead lab run clustering-heads``."""

from __future__ import annotations

from polyhead.lab.clustering_heads import EXPERIMENT

run = EXPERIMENT.run
