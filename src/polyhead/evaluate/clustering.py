"""Clustering: do clusters of the vectors, found without labels, agree with the labels?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from polyhead.errors import InputError, MissingExtraError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.task_data import LabelledTexts
from polyhead.evaluate.vectors import Encodes, Progress, vectors

__all__ = ["measure_clustering", "v_measure"]

SEED = 42  # mteb's, of samples and centres


def v_measure(table: np.ndarray) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007) of a table of counts.

    Args:
        table: ``[labels, clusters]``, how many (or with what weight) of each label fell into each cluster.
    """
    shares = table / table.sum()
    label, cluster = shares.sum(1), shares.sum(0)
    known = shares > 0
    information = float((shares[known] * np.log(shares[known] / np.outer(label, cluster)[known])).sum())
    entropies = [-float((part[part > 0] * np.log(part[part > 0])).sum()) for part in (label, cluster)]
    homogeneity, completeness = (information / entropy if entropy > 0 else 1.0 for entropy in entropies)
    return 2 * homogeneity * completeness / (homogeneity + completeness) if homogeneity + completeness > 0 else 0.0


def _k_means(clusters: int, variant: str) -> Any:
    try:
        from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("Clustering needs scikit-learn: pip install 'polyhead[evaluate]'") from error
    size = {"bootstrapped": 512, "whole": 500}[variant]
    return MiniBatchKMeans(
        clusters,
        batch_size=size,
        init="k-means++",
        n_init=1 if variant == "bootstrapped" else "auto",
        random_state=SEED,
    )


def measure_clustering(
    data: LabelledTexts,
    encoder: Encodes,
    *,
    variant: Literal["bootstrapped", "whole"] = "bootstrapped",
    experiments: int = 10,
    size: int = 16_384,
    texts: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """Cluster the texts to be judged by, as many clusters as labels, and take the V-measure with the labels.

    "bootstrapped" draws ``size`` texts with replacement, clusters them, and repeats that ``experiments`` times:
    ``v_measure`` is the mean, mteb's for the same vectors (its ``AbsTaskClustering``). "whole" clusters all texts once
    (its older ``AbsTaskClusteringLegacy``). In the interval texts are resampled and keep the clusters they were put in;
    the chance of the centres is not in it.

    Args:
        data: whose test part is clustered.
        encoder: gives vectors, taken as they come.
        variant: see above.
        experiments, size: of "bootstrapped".
        texts: cluster only so many, drawn as mteb draws them for ``max_document_to_embed``.
        progress: called with texts encoded and texts to encode.

    Raises:
        InputError: an unknown variant, counts below 1, or fewer than two labels.
        MissingExtraError: scikit-learn is not installed.
    """
    if variant not in ("bootstrapped", "whole"):
        raise InputError(f"variant = {variant!r}, expected 'bootstrapped' or 'whole'.")
    if min(experiments, size, texts or 1) < 1:
        raise InputError(f"experiments = {experiments}, size = {size}, texts = {texts}: at least 1 each.")
    generator = random.Random(SEED)
    rows = list(range(len(data.test)))
    if texts is not None:
        rows = generator.sample(rows, k=min(texts, len(rows)))
    labels = np.unique([str(data.test_labels[row]) for row in rows], return_inverse=True)[1]
    clusters = int(labels.max()) + 1
    if clusters < 2:
        raise InputError(f"'{data.name}' has one label; clusters need at least two to agree with.")
    found = vectors(encoder, [data.test[row] for row in rows], progress=progress)
    if variant == "whole":
        draws = [np.arange(len(rows))]
    else:
        draws = [np.array(generator.choices(range(len(rows)), k=size)) for _ in range(experiments)]
    assigned = [_k_means(clusters, variant).fit_predict(found[drawn]) for drawn in draws]
    return {"v_measure": Measured(len(rows), _agreement(labels, clusters, draws, assigned))}


def _agreement(
    labels: np.ndarray, clusters: int, draws: list[np.ndarray], assigned: list[np.ndarray]
) -> Callable[[np.ndarray], float]:
    cells = [labels[drawn] * clusters + cluster for drawn, cluster in zip(draws, assigned, strict=True)]

    def of(rows: np.ndarray) -> float:
        weight = np.bincount(rows, minlength=len(labels)).astype(np.float64)  # a text drawn twice counts twice
        tables = [
            np.bincount(cell, weights=weight[drawn], minlength=clusters**2).reshape(clusters, clusters)
            for cell, drawn in zip(cells, draws, strict=True)
        ]
        return float(np.mean([v_measure(table) for table in tables]))

    return of
