"""Head relevance vectors: planted concept heads are found, and weakening them first removes the concept first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval

if TYPE_CHECKING:
    from polyhead.heads.span_heads import ConceptSample
    from polyhead.model import HeadedModel

_CONCEPTS, _HEADS, _DIM = 4, 16, 8


def run(scale: Scale, seed: int) -> Evidence:
    """Toy layers of 16 heads, each tuned with noise to one of 4 concepts: area under the weakening curve.

    Heads are weakened (attention on the concept's word times -2) one after the other, most relevant first or in a
    random order; the area under what is left of the concept is compared. The interval is over toy models.
    """
    import torch

    from polyhead.act.rescale import RescaleAttention
    from polyhead.heads.span_heads import ConceptHeads

    models = 6 if scale == "smoke" else 40
    areas: dict[str, list[float]] = {"most": [], "random": [], "least": []}
    precision = []
    for number in range(models):
        random = np.random.default_rng((seed, number))
        model, planted = _toy(random)
        maps = ConceptHeads().measure(model, [_sample(random) for _ in range(24)])
        order = np.argsort(-maps["0"].values[0], kind="stable")
        count = _HEADS // _CONCEPTS
        precision.append(float((planted[order[:count]] == 0).mean()))
        sample = _sample(random)
        for name, heads in (("most", order), ("least", order[::-1]), ("random", random.permutation(_HEADS))):
            left = []
            for weakened in range(_HEADS + 1):
                factors = np.ones((1, _HEADS))
                factors[0, heads[:weakened]] = -2.0
                at = sample.concepts["0"][0]
                weaker = RescaleAttention((at, at + 1), factors).on(model)
                with torch.inference_mode(), weaker, model.record("heads") as recording:
                    model(**sample.inputs)
                left.append(float(recording.heads[0, 0, :, list(sample.queries), 1].sum()))
            curve = np.array(left) / left[0]
            areas[name].append(float(curve.mean()))
    gap = bootstrap_interval(np.array(areas["random"]) - areas["most"], seed=seed)
    return Evidence(
        measured={
            "difference": gap.value,
            "area, most relevant first": float(np.mean(areas["most"])),
            "precision": float(np.mean(precision)),
        },
        baseline={
            "area, random order": float(np.mean(areas["random"])),
            "area, least relevant first": float(np.mean(areas["least"])),
            "precision by chance": 1 / _CONCEPTS,
        },
        expected="the concept leaves faster when its most relevant heads are weakened first than in a random order",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high),
        decides="difference",
        data=f"{models} toy models of {_HEADS} noisy heads, {_CONCEPTS} concepts, 24 samples each",
        model="toy attention layer",
        notes="The mechanism only, with planted heads: no diffusion model is here, so nothing is said about images.",
    )


def _toy(random: np.random.Generator) -> tuple[HeadedModel, np.ndarray]:
    """A layer whose head h asks for concept ``planted[h]`` (token ``concept + 1``), with noise in every key."""
    import torch
    from transformers import GPT2Config, GPT2Model

    from polyhead.model import load

    size = _HEADS * _DIM
    config = GPT2Config(
        vocab_size=_DIM, n_positions=16, n_embd=size, n_layer=1, n_head=_HEADS, bos_token_id=0, eos_token_id=0
    )
    module = GPT2Model(config).eval()
    planted = random.permutation(np.arange(_HEADS) % _CONCEPTS)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        module.wte.weight[:, :_DIM] = torch.eye(_DIM)
        attention = module.h[0].attn.c_attn
        for head in range(_HEADS):
            at = slice(head * _DIM, (head + 1) * _DIM)
            query = 0.4 * random.standard_normal(_DIM)
            query[1 + planted[head]] += 1.0
            attention.bias[at] = torch.tensor(query, dtype=torch.float32)
            attention.weight[:_DIM, size + at.start : size + at.stop] = torch.eye(_DIM)
            attention.weight[:_DIM, 2 * size + at.start : 2 * size + at.stop] = torch.eye(_DIM)
    return load(module), planted


def _sample(random: np.random.Generator) -> ConceptSample:
    import torch

    from polyhead.heads.span_heads import ConceptSample

    ids = random.permutation([1, 2, 3, 4, 5, 6, 7])
    places = {str(concept): [int(np.flatnonzero(ids == concept + 1)[0])] for concept in range(_CONCEPTS)}
    return ConceptSample({"input_ids": torch.tensor([[*ids.tolist(), 5, 6]])}, [7, 8], places)
