"""Hedged embeddings: a Gaussian an input matches corrupted inputs better than a point, and knows which they are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims.base import Evidence, Scale, Verdict
from polyhead.evaluate.statistics import bootstrap_interval, bootstrap_of
from polyhead.objectives import (
    GaussianHead,
    GaussianKL,
    MatchSimilarity,
    Objective,
    SoftContrastiveLoss,
    self_mismatch,
)


def run(scale: Scale, seed: int) -> Evidence:
    """Two digits side by side, half of the pictures partly hidden; Gaussians of 3 dimensions against points.

    Average precision of matching pairs in which both are hidden in part, each picture as a query among the others; and
    Kendall's tau of self-mismatch with the hidden area. Supported where both intervals lie above 0, refuted where one
    lies below.
    """
    from scipy.stats import kendalltau

    torch.set_num_threads(1)
    runs, steps = (2, 200) if scale == "smoke" else (5, 1500)
    found = [_judged(steps, one) for one in range(seed, seed + runs)]
    taus = [
        bootstrap_of(
            lambda rows, u=unsure, a=area: float(kendalltau(u[rows], a[rows]).statistic),  # type: ignore[misc]
            len(area),
            resamples=200,
            seed=seed,
        )
        for _, unsure, area in found
    ]
    gains = [precision["hedged"] - precision["point"] for precision, _, _ in found]
    means = {
        name: float(np.mean([precision[name].mean() for precision, _, _ in found])) for name in ("hedged", "point")
    }
    gain = bootstrap_interval(np.concatenate(gains), seed=seed)
    low, high = (float(np.mean([getattr(tau, end) for tau in taus])) for end in ("low", "high"))
    verdict: Verdict = "supported" if min(gain.low, low) > 0 else "inconclusive"
    if min(gain.high, high) < 0:
        verdict = "refuted"
    return Evidence(
        measured={
            "precision hedged, hidden pictures": means["hedged"],
            "difference": gain.value,
            "tau of self-mismatch with hidden area": float(np.mean([tau.value for tau in taus])),
        },
        baseline={"precision point, hidden pictures": means["point"]},
        expected="a higher precision than points on hidden pictures, and self-mismatch that grows with what is hidden",
        interval=(gain.low, gain.high),
        verdict=verdict,
        decides="difference",
        data="pairs of scikit-learn digits 0 to 4, 25 classes, half partly hidden",
        model="network of one hidden layer",
        details={"tau, 95%": [low, high]},
    )


def _judged(steps: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Precisions of hedged and point embeddings, self-mismatch of each unseen picture, and its hidden area."""
    pictures, labels, _ = _pictures(2000, seed, test=False)
    unseen, judged, hidden = _pictures(300, seed + 1000, test=True)
    precision = {}
    for name in ("point", "hedged"):
        model, match = _train(pictures, labels, steps, seed, hedged=name == "hedged")
        with torch.no_grad():
            found = _points(model(unseen), hedged=name == "hedged")
            precision[name] = _precision(match(found), judged, hidden)
            unsure = self_mismatch(match, found).numpy()
    return precision, unsure, hidden.numpy()


def _pictures(n: int, seed: int, *, test: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``[n, 128]`` pictures, ``[n]`` classes, and the share of each that is hidden."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits, names = load_digits(return_X_y=True)
    half = slice(1, None, 2) if test else slice(0, None, 2)
    digits, names = digits[names < 5][half] / 16, names[names < 5][half]
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(names), (n, 2))
    pictures = digits[rows].reshape(n, 2, 8, 8).transpose(0, 2, 1, 3).reshape(n, 8, 16).copy()
    hidden = np.zeros(n)
    for i in np.flatnonzero(generator.random(n) < 0.5):
        height, width = generator.integers(3, 9), generator.integers(3, 17)
        top, left = generator.integers(0, 9 - height), generator.integers(0, 17 - width)
        pictures[i, top : top + height, left : left + width] = 0
        hidden[i] = height * width / 128
    labels = names[rows[:, 0]] * 5 + names[rows[:, 1]]
    return torch.tensor(pictures.reshape(n, 128), dtype=torch.float32), torch.tensor(labels), torch.tensor(hidden)


def _points(x: Tensor, *, hedged: bool) -> Tensor:
    """Gaussians as they are; as points, with no variance left."""
    return x if hedged else torch.cat((x[:, :3], torch.full_like(x[:, 3:], -30.0)), 1)


def _train(x: Tensor, labels: Tensor, steps: int, seed: int, *, hedged: bool) -> tuple[nn.Module, MatchSimilarity]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), GaussianHead(128, 3, seed=seed))
    match = MatchSimilarity(samples=4 if hedged else 1)
    objective = Objective(SoftContrastiveLoss(), match, regularizers=[GaussianKL(1e-3)] if hedged else [])
    optimizer = torch.optim.AdamW([*model.parameters(), *match.parameters()], lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = objective(_points(model(x[rows]), hedged=hedged), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, match


def _precision(scores: Tensor, labels: Tensor, hidden: Tensor) -> np.ndarray:
    """Average precision of each hidden picture that has a hidden fellow of its class, among hidden ones."""
    from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]

    rows = (hidden > 0).nonzero()[:, 0]
    scores, labels = scores[rows][:, rows], labels[rows]
    found = []
    for i in range(len(rows)):
        others = torch.arange(len(rows)) != i
        same = (labels == labels[i])[others].numpy()
        found.append(average_precision_score(same, scores[i][others].numpy()) if same.any() else np.nan)
    return np.array(found)[~np.isnan(found)]
