"""Smaller models out of larger ones: each transform gives ``(model, Report)``."""

from polyhead.compress.prune import prune, save_pruned
from polyhead.compress.report import Cost, Report, cost_of

__all__ = ["Cost", "Report", "cost_of", "prune", "save_pruned"]
