"""MAE: are mixtures of h-1 heads better than h heads, and do experts divide two dialects among them?"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.mae_heads import BlockCoordinates, MixtureOfAttentiveExperts, text_responsibilities
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, accuracy_and_bits, seed_interval, train
from polyhead.claims.base import Evidence, Scale, verdict_of

_LETTERS, _LENGTH = 16, 8
_KINDS = ("MHA", "joint", "block coordinates")


def dialects(generator: torch.Generator, count: int) -> Batch:
    """Words of 8 letters, a mark of the dialect first: one is read backwards, the other through a lexicon."""
    word = torch.randint(_LETTERS, (count, _LENGTH), generator=generator)
    dialect = torch.arange(count) % 2
    lexicon = torch.randperm(_LETTERS, generator=torch.Generator().manual_seed(1))
    said = torch.where(dialect[:, None] == 0, word.flip(1), lexicon[word])
    tokens = torch.cat([_LETTERS + dialect[:, None], word], 1)
    labels = torch.cat([torch.full((count, 1), -1), said], 1)
    return Batch(F.one_hot(tokens, _LETTERS + 2).float(), labels)


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of plain heads, of experts trained jointly and by blocks; entropy of gates and what they tell."""
    full = scale == "full"
    seeds, steps = range(seed, seed + (5 if full else 3)), 400 if full else 120
    shape = AttentionShape(32, 4)
    found: dict[str, list[float]] = {name: [] for name in _KINDS}
    gates: dict[str, list[tuple[float, float]]] = {name: [] for name in _KINDS if name != "MHA"}
    for each in seeds:
        test = dialects(torch.Generator().manual_seed(10_000 + each), 256)
        for name in _KINDS:
            torch.manual_seed(each)
            kind = Attention if name == "MHA" else MixtureOfAttentiveExperts
            model = TinyTransformer([kind(shape) for _ in range(2)], _LETTERS + 2, _LETTERS, places=_LENGTH + 1)
            if name == "block coordinates":
                blocks = BlockCoordinates(model, gate_every=5)
                train(model, _batch, steps, each, 5e-3, around=blocks.round)
            else:
                train(model, _batch, steps, each, 5e-3)
            found[name].append(accuracy_and_bits(model.eval(), test)[0])
            if name != "MHA":
                gates[name].append(_told(text_responsibilities(model, test.inputs)))
    ours = np.array(found["block coordinates"])
    gain = seed_interval((ours - np.array(found["MHA"])).tolist())
    over = seed_interval((ours - np.array(found["joint"])).tolist())
    means = {name: np.mean(rows, 0) for name, rows in gates.items()}
    return Evidence(
        measured={
            "accuracy by blocks less MHA": gain.value,
            "accuracy by blocks less joint": over.value,
            "accuracy, block coordinates": float(ours.mean()),
            **{f"entropy of gates in bits, {name}": float(values[0]) for name, values in means.items()},
            **{f"bits gates tell of the dialect, {name}": float(values[1]) for name, values in means.items()},
        },
        baseline={
            "accuracy, MHA": float(np.mean(found["MHA"])),
            "accuracy, joint": float(np.mean(found["joint"])),
            "entropy of a uniform gate in bits": float(np.log2(shape.heads)),
        },
        expected="experts trained by blocks are more accurate than plain heads; gates know the dialect",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="accuracy by blocks less MHA",
        data="words of 8 letters in two dialects: backwards, or through a lexicon",
        model=f"2 layers of 4 heads, 32 features, {steps} steps, {len(seeds)} seeds",
        notes="A uniform gate is plain attention exactly. Every fifth step trains gates; the paper counts epochs.",
        details={"accuracies": found, "gates": gates, "blocks less joint": [over.low, over.high]},
    )


def _batch(generator: torch.Generator) -> Batch:
    return dialects(generator, 32)


def _told(gates: torch.Tensor) -> tuple[float, float]:
    """Mean entropy of ``[texts, layers, heads]``, and what an expert drawn from them tells of the dialect, in bits."""
    own = torch.stack([gates[0::2].mean(0), gates[1::2].mean(0)])

    def entropy(shares: torch.Tensor) -> torch.Tensor:
        return -(shares * shares.clamp_min(1e-12).log2()).sum(-1)

    return entropy(gates).mean().item(), (entropy(own.mean(0)) - entropy(own).mean(0)).mean().item()
