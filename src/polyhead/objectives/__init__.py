"""Objectives for metric learning: similarity, relation, miners and loss are chosen apart and fit together freely."""

from polyhead.objectives.align_uniform import AlignUniformLoss, alignment, head_alignment_uniformity, uniformity
from polyhead.objectives.base import Loss, Miner, Objective, Regularizer, Symmetric, Terms
from polyhead.objectives.contextual import ContextualLoss, contextual_similarity
from polyhead.objectives.contrastive import ContrastiveLoss
from polyhead.objectives.gaussian import (
    GaussianHead,
    GaussianKL,
    MatchSimilarity,
    NegativeKLSimilarity,
    SoftContrastiveLoss,
    self_mismatch,
    to_inner_product,
)
from polyhead.objectives.graded import CoSENTLoss
from polyhead.objectives.hard_mixing import HardNegativeMixer
from polyhead.objectives.hyperbolic import HyperbolicSimilarity, PoincareHead, gromov_delta
from polyhead.objectives.infonce import InfoNCE
from polyhead.objectives.large_batch import LargeBatchInfoNCE, cached_step
from polyhead.objectives.mean_field import (
    MeanFieldContrastive,
    MeanFieldContrastiveLoss,
    MeanFieldMultiSimilarity,
    MeanFieldMultiSimilarityLoss,
)
from polyhead.objectives.metrix import Metrix, MixPlan, utilization
from polyhead.objectives.miners import FalseNegativeMask, HardestNegatives
from polyhead.objectives.multi_head import AdaptiveTemperature, MultiHeadObjective, MultiHeadProjector
from polyhead.objectives.multi_similarity import MultiSimilarityLoss, MultiSimilarityMiner, pair_weights
from polyhead.objectives.nbc_softmax import NBCSoftmax, block_contrast
from polyhead.objectives.pooling_bias import CoupledEstimator, RatioWeights, false_negative_rate, judged_within
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
from polyhead.objectives.verification import EmbeddingVerifier

__all__ = [
    "AdaptiveTemperature",
    "AlignUniformLoss",
    "AngleSimilarity",
    "CoSENTLoss",
    "ContextualLoss",
    "ContrastiveLoss",
    "CosineSimilarity",
    "CoupledEstimator",
    "DotProductSimilarity",
    "EmbeddingVerifier",
    "EuclideanSimilarity",
    "FalseNegativeMask",
    "GaussianHead",
    "GaussianKL",
    "HardNegativeMixer",
    "HardestNegatives",
    "HyperbolicSimilarity",
    "InfoNCE",
    "LargeBatchInfoNCE",
    "Loss",
    "MatchSimilarity",
    "MeanFieldContrastive",
    "MeanFieldContrastiveLoss",
    "MeanFieldMultiSimilarity",
    "MeanFieldMultiSimilarityLoss",
    "Metrix",
    "Miner",
    "MixPlan",
    "MultiHeadObjective",
    "MultiHeadProjector",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NBCSoftmax",
    "NegativeKLSimilarity",
    "Objective",
    "PoincareHead",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "ProxyObjective",
    "RatioWeights",
    "Regularizer",
    "Relation",
    "SNRSimilarity",
    "Similarity",
    "SoftContrastiveLoss",
    "SquaredUnitEuclidean",
    "Symmetric",
    "Terms",
    "TripletLoss",
    "TripletMiner",
    "ZeroMeanRegularizer",
    "alignment",
    "block_contrast",
    "cached_step",
    "contextual_similarity",
    "false_negative_rate",
    "gromov_delta",
    "head_alignment_uniformity",
    "judged_within",
    "pair_weights",
    "self_mismatch",
    "to_inner_product",
    "uniformity",
    "utilization",
]
