"""Scores: what each head of a model does, as a HeadMap. One file a score; ``scores()`` finds them all."""

from polyhead.heads.base import Score, scores
from polyhead.heads.tasks import Batch, FunctionTask, NextToken, PairSimilarity, Task, run_task, task_for

__all__ = [
    "Batch",
    "FunctionTask",
    "NextToken",
    "PairSimilarity",
    "Score",
    "Task",
    "run_task",
    "scores",
    "task_for",
]
