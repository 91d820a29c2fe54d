"""Three views of a vision Transformer: importance, strength by distance, and patterns of its heads' attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import MissingExtraError
from polyhead.evaluate.statistics import bootstrap_interval

if TYPE_CHECKING:
    import torch

    from polyhead.model import HeadedModel

_REMOVED = 4


def run(scale: Scale, seed: int) -> Evidence:
    """A ViT of 4 layers x 4 heads trained here on scikit-learn's digits: do the three views show what they should?

    Decided by accuracy on held-out images without 4 random heads (20 draws), less that without the 4 heads whose
    removal changes answers most (mean of the three metrics); the interval is over images. Supported where it is above
    0, the metrics' ranks correlate, and planted patterns are told apart (adjusted Rand index above 0.8). Smoke trains
    one model, full three.
    """
    found = [_study(seed + number, scale == "full") for number in range(1 if scale == "smoke" else 3)]
    gap = bootstrap_interval(np.concatenate([each["random"] - each["top"] for each in found]), seed=seed)
    index = float(np.mean([_planted(seed + number) for number in range(3)]))

    def mean(name: str) -> float:
        return float(np.mean([np.mean(each[name]) for each in found]))

    firm = index > 0.8 and mean("agreement") > 0
    return Evidence(
        measured={
            "difference": gap.value,
            "accuracy without the top 4": mean("top"),
            "rank correlation between metrics": mean("agreement"),
            "attention on ring 1, first layer": mean("early"),
            "adjusted Rand index of planted patterns": index,
        },
        baseline={
            "accuracy": mean("whole"),
            "accuracy without 4 random heads": mean("random"),
            "accuracy without the bottom 4": mean("bottom"),
            "attention on ring 1, last layer": mean("late"),
            "attention on ring 1, were it even": mean("even"),
        },
        expected="accuracy falls most without the top heads, least without the bottom; early layers look nearer",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high) if firm else "refuted",
        decides="difference",
        data="scikit-learn digits of 8 x 8 in patches of 2 x 2",
        model=f"{len(found)} ViT of 4 layers x 4 heads, trained here",
        notes="A tiny model on tiny images; the paper's experts and their case studies have no counterpart here.",
        details={"models": [each["details"] for each in found]},
    )


def _study(seed: int, full: bool) -> dict[str, Any]:
    from polyhead.act import Gate
    from polyhead.heads.output_change import OutputChange
    from polyhead.heads.pattern_codes import AttentionPatternAE, attention_maps
    from polyhead.heads.ring_profile import ring_profile
    from polyhead.heads.tasks import Batch

    images, labels = _digits(seed)
    train, judge = 1200, 1200 + (250 if full else 100)
    model = _trained(images[:train], labels[:train], seed, 600 if full else 200)
    batch = Batch({"pixel_values": images[train:judge]}, {"label": labels[train:judge]}, judge - train)
    changes = {name: each.mean(-1) for name, each in OutputChange().changes(model, [batch]).items()}
    by_metric: dict[str, list[np.ndarray]] = {"top": [], "bottom": []}

    def right(off: list[tuple[int, int]]) -> np.ndarray:
        import torch

        with torch.inference_mode(), Gate.off(off, model).on(model):
            found = model(pixel_values=images[judge:]).logits.argmax(-1)
        return (found == labels[judge:]).double().numpy()

    every = list(np.ndindex(model.layers, model.heads))
    for values in changes.values():
        order = [every[i] for i in np.argsort(-values.ravel(), kind="stable")]
        by_metric["top"].append(right(order[:_REMOVED]))
        by_metric["bottom"].append(right(order[-_REMOVED:]))
    generator = np.random.default_rng(seed)
    draws = [right([every[i] for i in generator.choice(len(every), _REMOVED, replace=False)]) for _ in range(20)]
    rings = ring_profile(model, images[train:judge]).rings[:, :, 1]
    pairs = ring_profile(model, images[train : train + 1])
    even = pairs.rings[0, 0, 1] / pairs.per_patch[0, 0, 1] / (np.prod(pairs.grid) + 1)
    maps = attention_maps(model, {"pixel_values": images[train : train + 16]}).flatten(0, 2)
    coder = AttentionPatternAE(steps=200, seed=seed).fit(maps)
    clusters = coder.cluster(maps, 4).reshape(model.layers, model.heads, -1)
    return {
        "whole": right([]),
        "top": np.mean(by_metric["top"], axis=0),
        "bottom": np.mean(by_metric["bottom"], axis=0),
        "random": np.mean(draws, axis=0),
        "agreement": _agreement(list(changes.values())),
        "early": rings[0].mean(),
        "late": rings[-1].mean(),
        "even": even,
        "details": {
            "changes": {name: values.tolist() for name, values in changes.items()},
            "ring 1": rings.tolist(),
            "pattern of most images": [[int(np.bincount(head).argmax()) for head in layer] for layer in clusters],
            "images in a head's pattern": float(
                np.mean([np.bincount(head).max() / len(head) for layer in clusters for head in layer])
            ),
            "error of the autoencoder": coder.error(maps),
        },
    }


def _agreement(values: list[np.ndarray]) -> float:
    """Mean rank correlation of the metrics, pair by pair."""
    from itertools import combinations

    from scipy.stats import spearmanr

    return float(np.mean([spearmanr(a.ravel(), b.ravel()).statistic for a, b in combinations(values, 2)]))


def _planted(seed: int, size: int = 17, each: int = 40) -> float:
    """Adjusted Rand index of clusters of codes with the kind of map: to oneself, to the first token, to all alike."""
    import torch

    from polyhead.heads.pattern_codes import AttentionPatternAE

    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(size, size)
    first[:, 0] = 4.0
    logits = torch.stack([4 * torch.eye(size), first, torch.zeros(size, size)]).repeat_interleave(each, 0)
    maps = torch.softmax(logits + torch.randn(logits.shape, generator=generator), -1)
    found = AttentionPatternAE(steps=150, seed=seed).fit(maps).cluster(maps, 3)
    return float(_sklearn("metrics").adjusted_rand_score(np.repeat(np.arange(3), each), found))


def _digits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[n, 1, 8, 8]`` of -1 to 1 in random order, and their digits."""
    import torch

    data: Any = _sklearn("datasets").load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 8.0 - 1.0, dtype=torch.float32)[:, None]
    return images, torch.tensor(data.target[order])


def _sklearn(part: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise MissingExtraError("The claim reads scikit-learn's digits: pip install 'polyhead[claims]'") from error


def _trained(images: torch.Tensor, labels: torch.Tensor, seed: int, steps: int) -> HeadedModel:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from polyhead.model import load

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module: Any = ViTForImageClassification(config)
    optimiser = torch.optim.AdamW(module.parameters(), 2e-3, weight_decay=0.01)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        optimiser.zero_grad()
        logits = module(pixel_values=images[rows]).logits
        torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
        optimiser.step()
    return load(module.eval())
