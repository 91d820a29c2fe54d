"""An objective, pooler or action in words that are the same for the same thing: what a resumed run is checked by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["describe"]

_PLAIN = (str, int, float, bool, type(None))


def describe(thing: Any) -> Any:
    """Plain values: class and settings of objects, recursively; weights by shape, other arrays by content."""
    if isinstance(thing, _PLAIN):
        return thing
    if isinstance(thing, (list, tuple, nn.ModuleList)):
        return [describe(each) for each in thing]
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(torch.as_tensor(thing).detach().cpu().numpy())
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if hasattr(thing, "encode"):  # a whole model, such as a teacher
        return _name(thing)
    if isinstance(thing, nn.Module):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_") and key != "training"}
        parts = {key: value for key, value in thing.named_children() if key != "model"}
        weights = {key: list(value.shape) for key, value in thing.named_parameters(recurse=False)}
        return {"class": _name(thing), **describe({**own, **parts}), **weights}
    if hasattr(thing, "__dict__") and not callable(thing):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        return {"class": _name(thing), **describe(own)}
    return getattr(thing, "__qualname__", _name(thing))


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
