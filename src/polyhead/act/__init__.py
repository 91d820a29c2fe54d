"""Actions: what to do with heads. Each takes a HeadMap, a mask or per-head vectors, and is put on with a block."""

from polyhead.act.attention import AttentionAction
from polyhead.act.base import Action, HeadAction
from polyhead.act.boost import AttentionBoost, select_tokens
from polyhead.act.calibrate import AttentionCalibration, calibration_gain, find_sinks
from polyhead.act.decore import DeCoRe
from polyhead.act.gate import Gate
from polyhead.act.headmask import HeadMask, gini
from polyhead.act.lofit import LoFiT
from polyhead.act.mask import LearnedGates
from polyhead.act.project import ProjectOut
from polyhead.act.redistribute import RedistributeAttention, sink_dimensions, sink_tokens
from polyhead.act.reinforce import Reinforce
from polyhead.act.replace import MeanAblate, Replace, ReplaceRecorded
from polyhead.act.soft_injection import SoftInjection, shot_prompts, task_embedding
from polyhead.act.steer import Steer
from polyhead.act.temperature import LengthRow, Temperature, length_collapse, length_report
from polyhead.act.vectors import VectorAction, head_mask, mean_heads

__all__ = [
    "Action",
    "AttentionAction",
    "AttentionBoost",
    "AttentionCalibration",
    "DeCoRe",
    "Gate",
    "HeadAction",
    "HeadMask",
    "LearnedGates",
    "LengthRow",
    "LoFiT",
    "MeanAblate",
    "ProjectOut",
    "RedistributeAttention",
    "Reinforce",
    "Replace",
    "ReplaceRecorded",
    "SoftInjection",
    "Steer",
    "Temperature",
    "VectorAction",
    "calibration_gain",
    "find_sinks",
    "gini",
    "head_mask",
    "length_collapse",
    "length_report",
    "mean_heads",
    "select_tokens",
    "shot_prompts",
    "sink_dimensions",
    "sink_tokens",
    "task_embedding",
]
