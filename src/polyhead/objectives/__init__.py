"""Objectives for metric learning: similarity, relation, miners and loss are chosen apart and fit together freely."""

from polyhead.objectives.align_uniform import AlignUniformLoss, alignment, head_alignment_uniformity, uniformity
from polyhead.objectives.base import Loss, Miner, Objective, Regularizer, Symmetric, Terms
from polyhead.objectives.contrastive import ContrastiveLoss
from polyhead.objectives.graded import CoSENTLoss
from polyhead.objectives.infonce import InfoNCE
from polyhead.objectives.large_batch import LargeBatchInfoNCE, cached_step
from polyhead.objectives.miners import FalseNegativeMask, HardestNegatives
from polyhead.objectives.multi_similarity import MultiSimilarityLoss, MultiSimilarityMiner, pair_weights
from polyhead.objectives.proxies import ProxyAnchorLoss, ProxyNCALoss, ProxyObjective
from polyhead.objectives.regularizers import ZeroMeanRegularizer
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import (
    AngleSimilarity,
    CosineSimilarity,
    DotProductSimilarity,
    EuclideanSimilarity,
    Similarity,
    SNRSimilarity,
)
from polyhead.objectives.triplet import SquaredUnitEuclidean, TripletLoss, TripletMiner

__all__ = [
    "AlignUniformLoss",
    "AngleSimilarity",
    "CoSENTLoss",
    "ContrastiveLoss",
    "CosineSimilarity",
    "DotProductSimilarity",
    "EuclideanSimilarity",
    "FalseNegativeMask",
    "HardestNegatives",
    "InfoNCE",
    "LargeBatchInfoNCE",
    "Loss",
    "Miner",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "Objective",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "ProxyObjective",
    "Regularizer",
    "Relation",
    "SNRSimilarity",
    "Similarity",
    "SquaredUnitEuclidean",
    "Symmetric",
    "Terms",
    "TripletLoss",
    "TripletMiner",
    "ZeroMeanRegularizer",
    "alignment",
    "cached_step",
    "head_alignment_uniformity",
    "pair_weights",
    "uniformity",
]
