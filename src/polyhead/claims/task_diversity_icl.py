"""The claim of task-diversity-icl, measured by ``polyhead lab run task-diversity-icl``."""

from __future__ import annotations

from polyhead.lab.task_diversity import EXPERIMENT

run = EXPERIMENT.run
