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
    """Toy cross-attention of 16 heads, each tuned with noise to one of 4 concepts: area under the weakening curve.

    Heads are weakened (attention on the concept's word times -2) one after the other, most relevant first or in a
    random order; the area under what is left of the concept is compared. The interval is over toy models.
    """
    import torch

    from polyhead.heads.cross_attention import ordered_weakening
    from polyhead.heads.span_heads import ConceptHeads

    models = 6 if scale == "smoke" else 40
    areas: dict[str, list[float]] = {"most": [], "random": [], "least": []}
    precision: list[float] = []
    clear: list[float] = []
    for number in range(models):
        random = np.random.default_rng((seed, number))
        model, planted = _toy(random)
        maps = ConceptHeads().measure(model, [_sample(random) for _ in range(24)])
        order = np.argsort(-maps["0"].values[0], kind="stable")
        count = _HEADS // _CONCEPTS
        precision.append(float((planted[order[:count]] == 0).mean()))
        quiet, where = _toy(random, 0.1)
        found = ConceptHeads().measure(quiet, [_sample(random) for _ in range(24)])["0"].values[0]
        clear.append(float((where[np.argsort(-found, kind="stable")[:count]] == 0).mean()))
        sample = _sample(random)
        at = sample.concepts["0"][0]

        def concept(model: HeadedModel = model, sample: ConceptSample = sample) -> float:
            with torch.inference_mode(), model.record("heads") as recording:
                model(**sample.inputs)
            return float(recording.heads[0, 0, :, list(sample.queries), 1].sum())

        for name, heads in (("most", order), ("least", order[::-1]), ("random", random.permutation(_HEADS))):
            left = ordered_weakening(model, [(0, int(head)) for head in heads], (at, at + 1), concept)
            areas[name].append(float((left / left[0]).mean()))
    gap = bootstrap_interval(np.array(areas["random"]) - areas["most"], seed=seed)
    return Evidence(
        measured={
            "difference": gap.value,
            "area, most relevant first": float(np.mean(areas["most"])),
            "precision": float(np.mean(precision)),
            "precision at low noise": float(np.mean(clear)),
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
        model="toy encoder-decoder",
        notes="The mechanism only, with planted heads: no diffusion model is here, so nothing is said about images.",
    )


def _toy(random: np.random.Generator, noise: float = 0.4) -> tuple[HeadedModel, np.ndarray]:
    """An encoder-decoder whose head h of cross-attention asks, noisily, for concept ``planted[h]``, token one up."""
    import torch
    from transformers import BartConfig, BartModel

    from polyhead.heads.cross_attention import cross_attention

    size = _HEADS * _DIM
    config = BartConfig(
        vocab_size=_DIM, max_position_embeddings=16, d_model=size, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=_HEADS, decoder_attention_heads=_HEADS, encoder_ffn_dim=8, decoder_ffn_dim=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    module = BartModel(config).eval()
    planted = random.permutation(np.arange(_HEADS) % _CONCEPTS)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        module.shared.weight[:, :_DIM] = torch.eye(_DIM)
        attention = module.decoder.layers[0].encoder_attn
        for head in range(_HEADS):
            at = slice(head * _DIM, (head + 1) * _DIM)
            query = noise * random.standard_normal(_DIM)
            query[1 + planted[head]] += 1.0
            attention.q_proj.bias[at] = torch.tensor(query, dtype=torch.float32)
            attention.k_proj.weight[at, :_DIM] = torch.eye(_DIM)
            attention.v_proj.weight[at, :_DIM] = torch.eye(_DIM)
    return cross_attention(module, "toy cross-attention"), planted


def _sample(random: np.random.Generator) -> ConceptSample:
    import torch

    from polyhead.heads.span_heads import ConceptSample

    ids = random.permutation([1, 2, 3, 4, 5, 6, 7])
    places = {str(concept): [int(np.flatnonzero(ids == concept + 1)[0])] for concept in range(_CONCEPTS)}
    inputs = {"input_ids": torch.tensor([ids.tolist()]), "decoder_input_ids": torch.tensor([[5, 6]])}
    return ConceptSample(inputs, [0, 1], places)
