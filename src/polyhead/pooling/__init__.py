"""States to one vector (or a few) per text: one pooling a file.

Those without weights are found by name with :func:`pooler_for`; the others are made by their classes, trained like any
``nn.Module``, saved with :meth:`Pooler.save` and used in :class:`polyhead.embed.Encoder` or, through
:class:`polyhead.pooling.sentence.PoolerModule`, in sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyhead.errors import InputError
from polyhead.pooling.attention import AttentionPooler
from polyhead.pooling.base import ConcatenatedPooler, Pooler, Reads, load_pooler, pooler_from
from polyhead.pooling.cls import ClsPooler
from polyhead.pooling.generalized_sum import GeneralizedSumPooler, ZeroShotPrototypeLoss
from polyhead.pooling.ggem import GGeMPooler
from polyhead.pooling.heads import HeadPooler
from polyhead.pooling.landmark import LandmarkPooler, Landmarks, position_bias
from polyhead.pooling.last import LastPooler
from polyhead.pooling.latent_attention import LatentAttentionPooler
from polyhead.pooling.layers import WeightedLayersPooler
from polyhead.pooling.low_rank import LowRankPooler, redundancy
from polyhead.pooling.max import MaxPooler
from polyhead.pooling.mean import MeanPooler
from polyhead.pooling.mean_sqrt_len import MeanSqrtLenPooler
from polyhead.pooling.multi_layer import MultiLayerPooler
from polyhead.pooling.weighted_mean import WeightedMeanPooler

__all__ = [
    "POOLERS",
    "AttentionPooler",
    "ClsPooler",
    "ConcatenatedPooler",
    "GGeMPooler",
    "GeneralizedSumPooler",
    "HeadPooler",
    "LandmarkPooler",
    "Landmarks",
    "LastPooler",
    "LatentAttentionPooler",
    "LowRankPooler",
    "MaxPooler",
    "MeanPooler",
    "MeanSqrtLenPooler",
    "MultiLayerPooler",
    "Pooler",
    "Reads",
    "WeightedLayersPooler",
    "WeightedMeanPooler",
    "ZeroShotPrototypeLoss",
    "load_pooler",
    "pooler_for",
    "pooler_from",
    "position_bias",
    "redundancy",
]

POOLERS: dict[str, type[Pooler]] = {
    "mean": MeanPooler,
    "cls": ClsPooler,
    "last": LastPooler,
    "weighted_mean": WeightedMeanPooler,
    "max": MaxPooler,
    "mean_sqrt_len": MeanSqrtLenPooler,
}


def pooler_for(name: str | Sequence[str]) -> Pooler:
    """The pooler of a name, or the concatenation of several.

    Args:
        name: one of ``mean``, ``cls``, ``last``, ``weighted_mean``, ``max``, ``mean_sqrt_len``, or a sequence of them.

    Raises:
        InputError: the name is not one of these.

    Example:
        >>> import torch
        >>> from polyhead.pooling import pooler_for
        >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])           # [batch, tokens, dim]
        >>> pooler_for("mean")(states, torch.tensor([[1, 1, 0]])).tolist()
        [[2.0]]
    """
    if not isinstance(name, str):
        poolers = [pooler_for(each) for each in name]
        if not poolers:
            raise InputError("pooling was given no names; give at least one of: " + ", ".join(POOLERS))
        return poolers[0] if len(poolers) == 1 else ConcatenatedPooler(poolers)
    if name not in POOLERS:
        raise InputError(f"pooling {name!r} is not known; it is one of: {', '.join(POOLERS)}")
    return POOLERS[name]()
