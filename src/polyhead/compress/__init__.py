"""Smaller models out of larger ones: each transform gives ``(model, Report)``."""

from polyhead.compress.prune import prune, save_pruned
from polyhead.compress.report import Cost, Report, cost_of
from polyhead.compress.share import alike_groups, convert_to_gqa, pool_heads, tie_key_values

__all__ = [
    "Cost",
    "Report",
    "alike_groups",
    "convert_to_gqa",
    "cost_of",
    "pool_heads",
    "prune",
    "save_pruned",
    "tie_key_values",
]
