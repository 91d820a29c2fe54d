"""Based: recall grows with the state, and Taylor features with a window beat plain linear attention at it."""

from __future__ import annotations

from collections.abc import Callable

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.based import BasedLinearAttention, SlidingWindowAttention, based_layers
from polyhead.claims._tiny_tasks import recall_accuracies, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of associative recall beside bytes of state; the hybrid of two layers less two windows decides."""
    shape = AttentionShape(32, 2)
    smoke = scale == "smoke"
    kinds: dict[str, Callable[[], list[Attention]]] = {
        "linear": lambda: [LinearAttention(shape, causal=True) for _ in range(2)],
        "windows": lambda: [SlidingWindowAttention(shape, causal=True, window=8) for _ in range(2)],
        "hybrid narrow 2": lambda: based_layers(shape, 2, narrow=2, window=8),
        "hybrid narrow 8": lambda: based_layers(shape, 2, narrow=8, window=8),
        "full": lambda: [Attention(shape, causal=True) for _ in range(2)],
    }
    if not smoke:
        kinds["taylor"] = lambda: [BasedLinearAttention(shape, causal=True, narrow=8) for _ in range(2)]
    pairs = 12 if smoke else 24
    found = recall_accuracies(kinds, range(seed, seed + (3 if smoke else 5)), pairs, 80 if smoke else 300)
    gain = seed_interval([a - b for a, b in zip(found["hybrid narrow 8"], found["windows"], strict=True)])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    held = {name: sum(layer.cache_bytes(2 * pairs) for layer in make()) for name, make in kinds.items()}
    return Evidence(
        measured={f"accuracy {name}": means[name] for name in kinds if name.startswith("hybrid")}
        | {"difference": gain.value},
        baseline={f"accuracy {name}": means[name] for name in kinds if not name.startswith("hybrid")},
        expected="the hybrid above windows alone, more with wider features; full attention the ceiling",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="difference",
        data="associative recall of names and values, new texts in every step",
        model="two layers of 32 features and 2 heads",
        notes="Names and values share a token, so no convolution is needed. Speed is not measured here.",
        details={"accuracies": found, "state_bytes": held},
    )
