"""Actions: what to do with heads. Each takes a HeadMap, a mask or per-head vectors, and is put on with a block."""

from polyhead.act.base import Action, HeadAction
from polyhead.act.gate import Gate
from polyhead.act.lofit import LoFiT
from polyhead.act.mask import LearnedGates
from polyhead.act.project import ProjectOut
from polyhead.act.replace import MeanAblate, Replace, ReplaceRecorded
from polyhead.act.soft_injection import SoftInjection, shot_prompts, task_embedding
from polyhead.act.steer import Steer
from polyhead.act.vectors import VectorAction, head_mask, mean_heads

__all__ = [
    "Action",
    "Gate",
    "HeadAction",
    "LearnedGates",
    "LoFiT",
    "MeanAblate",
    "ProjectOut",
    "Replace",
    "ReplaceRecorded",
    "SoftInjection",
    "Steer",
    "VectorAction",
    "head_mask",
    "mean_heads",
    "shot_prompts",
    "task_embedding",
]
