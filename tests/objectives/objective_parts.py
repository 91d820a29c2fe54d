"""The objectives' parts, by name, for the tests that hold for all of them."""

from __future__ import annotations

from polyhead import objectives as o

LOSSES = {
    "infonce": o.InfoNCE,
    "supcon": lambda: o.InfoNCE(positives="together"),
    "focal": lambda: o.InfoNCE(gamma=0.5),
    "triplet": o.TripletLoss,
    "soft-triplet": lambda: o.TripletLoss(smooth=True, reduction="nonzero"),
    "contrastive": lambda: o.ContrastiveLoss(pos_margin=0.9, neg_margin=0.1),
    "multi-similarity": o.MultiSimilarityLoss,
    "proxy-nca": o.ProxyNCALoss,
    "proxy-nca-first": lambda: o.ProxyNCALoss(among_all=False),
    "proxy-anchor": lambda: o.ProxyAnchorLoss(alpha=8),
    "align-uniform": o.AlignUniformLoss,
    "cosent": o.CoSENTLoss,
    "soft-contrastive": o.SoftContrastiveLoss,
    "mean-field": o.MeanFieldContrastiveLoss,
    "mean-field-ms": lambda: o.MeanFieldMultiSimilarityLoss(beta=8),
}
"""Every loss."""

CLASSWISE = [LOSSES["proxy-anchor"], LOSSES["mean-field-ms"]]
"""Losses whose anchors are columns; the second one's columns are classes, all of which belong together."""

SIMILARITIES = {
    "cosine": o.CosineSimilarity,
    "dot": o.DotProductSimilarity,
    "euclidean": o.EuclideanSimilarity,
    "squared": lambda: o.EuclideanSimilarity(squared=True, normalize=True),
    "snr": o.SNRSimilarity,
    "angle": o.AngleSimilarity,
    "hyperbolic": lambda: o.HyperbolicSimilarity(0.3),
    "gaussian-kl": o.NegativeKLSimilarity,
}

MINERS = {
    "false-negatives": lambda: o.FalseNegativeMask(margin=0.1, above=0.6),
    "hardest": lambda: o.HardestNegatives(2),
    "multi-similarity": o.MultiSimilarityMiner,
    "semihard": o.TripletMiner,
    "hard-all": lambda: o.TripletMiner("hard", one=False),
    "random": lambda: o.TripletMiner("random"),
    "ratios": o.RatioWeights,
}
