"""The claim of icl-linreg-softmax, measured by ``polyhead lab run icl-linreg-softmax``."""

from __future__ import annotations

from polyhead.lab.icl_linreg import EXPERIMENT

run = EXPERIMENT.run
