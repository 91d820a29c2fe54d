"""MHLA: a summary a block of tokens recalls what one summary for all has blurred."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.mhla import TokenLevelMultiHeadLinearAttention
from polyhead.claims._tiny_tasks import recall_accuracies, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of associative recall with many blocks less that with one, which is linear attention on ``relu``."""
    shape = AttentionShape(32, 2)
    smoke = scale == "smoke"
    pairs = 16 if smoke else 32

    def layers(blocks: int) -> list[Attention]:
        size = 2 * pairs // blocks
        return [TokenLevelMultiHeadLinearAttention(shape, causal=True, blocks=blocks, block_size=size)]

    blocks_of = (1, 16) if smoke else (1, 4, 16)
    makers: dict[str, Callable[[], list[Attention]]] = {str(each): partial(layers, each) for each in blocks_of}
    if not smoke:
        makers["softmax"] = lambda: [Attention(shape, causal=True)]
    found = recall_accuracies(
        makers,
        range(seed, seed + (3 if smoke else 6)),
        pairs,
        steps=200 if smoke else 600,
        rate=2e-3,
    )
    gain = seed_interval([a - b for a, b in zip(found["16"], found["1"], strict=True)])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return Evidence(
        measured={"accuracy 16 blocks": means["16"], "difference": gain.value},
        baseline={f"accuracy {name}": value for name, value in means.items() if name != "16"},
        expected="accuracy grows with the number of blocks",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="difference",
        data="associative recall of names and values, new texts in every step",
        model="one layer of 32 features and 2 heads",
        notes="16 blocks hold 16 states. The rate is 2e-3: at 5e-3 blends fall below zero and 16 blocks fail.",
        details={"accuracies": found},
    )
