"""Information flow routes: the heads on a prediction's route are the ones whose loss changes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.model import HeadedModel

_NAMES = ("Mary", "John", "Anna", "Peter", "Laura", "David", "Emma", "James")
_PLACES = ("store", "park", "school", "station", "office", "beach")
_THINGS = ("drink", "book", "letter", "ring", "ticket", "gift")


def run(scale: Scale, seed: int) -> Evidence:
    """Spearman correlation, over all heads of Gemma-3-270M, of route importance with mean-ablation effect.

    The baseline is attention mass (what the last token attends to beside itself and the first token). The effect of a
    head is how much the log-probability of the model's own prediction changes, in absolute value, when the head's
    output is replaced by its mean. Prompts are repeated lists of words, indirect-object sentences and beginnings of
    AG News, a third each; smoke takes 6 and
    every third layer, full 30 and all layers.
    """
    from scipy.stats import spearmanr

    model = loaded("gemma-3-270m", lm_head=True)
    prompts = make_prompts(6 if scale == "smoke" else 30, seed)
    layers = list(range(0, model.layers, 3 if scale == "smoke" else 1))
    routes, mass = (values[:, layers] for values in _importances(model, prompts))
    effect = _effects(model, prompts, layers)

    def correlation(rows: np.ndarray, values: np.ndarray) -> float:
        return float(spearmanr(values[rows].mean(0).ravel(), effect[rows].mean(0).ravel()).statistic)

    everything, rng = np.arange(len(prompts)), np.random.default_rng(seed)
    samples = [rng.choice(everything, len(everything)) for _ in range(1000)]
    differences = [correlation(rows, routes) - correlation(rows, mass) for rows in samples]
    low, high = (float(value) for value in np.quantile(differences, (0.025, 0.975)))
    route, attention = correlation(everything, routes), correlation(everything, mass)
    random = float(spearmanr(rng.random(effect[0].size), effect.mean(0).ravel()).statistic)
    best = np.argsort(-routes.mean(0).ravel())[:5]
    return Evidence(
        measured={"spearman of routes with ablation": route, "difference": route - attention},
        baseline={"spearman of attention mass": attention, "random": random},
        expected="head importance on routes follows the effect of mean ablation better than attention mass does",
        interval=(low, high),
        verdict=verdict_of(low, high),
        decides="difference",
        data=f"{len(prompts)} prompts, {len(layers)} layers: repeated words, indirect objects, AG News",
        model=model.name,
        notes="The paper shows roles of heads of Llama 2 and no such correlation; the interval is over prompts.",
        details={"top heads": [f"{layers[i // model.heads]}.{i % model.heads}" for i in best.tolist()]},
    )


def make_prompts(count: int, seed: int) -> list[str]:
    """A third each of repeated words, indirect-object sentences and beginnings of news, ``count`` in all."""
    from polyhead.data import load_texts

    rng = np.random.default_rng(seed)
    words = [word for text in load_texts("ag-news", 50) for word in text.split() if word.isalpha() and len(word) > 3]
    found = []
    for _ in range(count // 3):
        repeated = [str(word) for word in rng.choice(words, 7, replace=False)]
        found.append(" ".join(repeated + repeated[:5]))
        first, second = rng.choice(_NAMES, 2, replace=False)
        place, thing = rng.choice(_PLACES), rng.choice(_THINGS)
        found.append(f"When {first} and {second} went to the {place}, {second} gave a {thing} to")
    news = load_texts("ag-news", 1000)
    found += [" ".join(news[int(i)].split()[:14]) for i in rng.choice(len(news), count - len(found), replace=False)]
    return found


def _importances(model: HeadedModel, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Route importance and attention mass of each head for each prompt, ``[prompts, layers, heads]``."""
    from polyhead.heads.info_flow_routes import InformationFlowRoutes

    score = InformationFlowRoutes(over="route")
    routes, mass = [], []
    for prompt in prompts:
        routes.append(score.extract(model, prompt).head_importance())
        with model.record("attention") as recording, torch.inference_mode():
            model(**model.tokenize([prompt]), logits_to_keep=1)
        mass.append(recording.attention[0, :, :, -1, 1:-1].sum(-1).double().numpy())
    return np.stack(routes), np.stack(mass)


def _effects(model: HeadedModel, prompts: list[str], layers: list[int]) -> np.ndarray:
    """Absolute change of the predicted token's log-probability without each head, ``[prompts, layers, heads]``."""
    inputs = model.tokenize(prompts)
    real = inputs["attention_mask"].bool()
    assert bool(real[:, -1].all())  # Gemma's tokenizer pads on the left
    rows = torch.arange(len(prompts))
    chosen: dict[str, Any] = {}

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(**inputs, logits_to_keep=1).logits[:, -1].float(), -1)

    plain = forward()
    token = plain.argmax(-1)
    base = plain[rows, token]

    def ablate(layer: int, z: torch.Tensor) -> torch.Tensor:
        changed = z.clone()
        changed[:, :, chosen["head"]] = z[real][:, chosen["head"]].mean(0)
        return changed

    effect = np.zeros((len(prompts), len(layers), model.heads))
    for row, layer in enumerate(layers):
        for head in range(model.heads):
            chosen["head"] = head
            with model.tap_heads(ablate, layers=[layer]):
                effect[:, row, head] = (forward()[rows, token] - base).abs().double().numpy()
    return effect
