"""Relative logits of every method against their definition."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention.relative import RelativeLogitsAttention
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4, kv_heads=2)


def moved(method: str, causal: bool, per_head: bool = True) -> RelativeLogitsAttention:
    layer = RelativeLogitsAttention(SHAPE, causal=causal, method=method, max_distance=3, per_head=per_head)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.table)
    return layer


CASES = {f"relative-{m}": Case(lambda causal, m=m: moved(m, causal)) for m in ("m1", "m2", "m3", "m4", "shaw")}


@pytest.mark.parametrize("method", ["m1", "m2", "m3", "m4", "shaw"])
@pytest.mark.parametrize("per_head", [True, False])
def test_logits_by_definition(method: str, per_head: bool) -> None:
    layer = moved(method, False, per_head).double()
    q, k, _, call = layer._prepared(torch.randn(1, 7, 32, dtype=torch.float64), None)
    found = layer.score(q, k, call)
    for head in range(4):
        for i in range(7):
            for j in range(7):
                one, other, far = q[0, head, i], k[0, head // 2, j], max(-3, min(3, j - i))
                a = layer.table[head if per_head else 0, abs(far) if method == "m1" else far + 3]
                wanted = {
                    "m1": one @ other * a.sum(),
                    "m2": one @ other * a.sum(),
                    "m3": (one * other * a).sum(),
                    "m4": one @ other + (one * a).sum() + (other * a).sum(),
                    "shaw": one @ other + (one * a).sum(),
                }[method]
                assert torch.allclose(found[0, head, i, j], wanted / 8**0.5)


def test_other_methods_are_refused() -> None:
    with pytest.raises(InputError, match="m1, m2"):
        RelativeLogitsAttention(SHAPE, method="m5")  # type: ignore[arg-type]
