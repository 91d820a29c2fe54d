"""Actions: what to do with heads. Each takes a HeadMap, a mask or per-head vectors, and is put on with a block."""

from polyhead.act.base import Action, HeadAction
from polyhead.act.gate import Gate

__all__ = ["Action", "Gate", "HeadAction"]
