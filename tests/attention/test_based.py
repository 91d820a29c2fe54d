"""Based's two halves against their definitions."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention.based import BasedLinearAttention, SlidingWindowAttention, based_layers
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    "based": Case(lambda causal: BasedLinearAttention(GROUPS, causal=causal, narrow=6)),
    "based-window": Case(lambda causal: SlidingWindowAttention(GROUPS, causal=causal, window=5)),
}


@pytest.mark.parametrize("causal", [True, False])
def test_taylor_attention_by_definition(causal: bool) -> None:
    torch.manual_seed(0)
    layer = BasedLinearAttention(SHAPE, causal=causal, narrow=6).double()
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = layer.q_proj(hidden)[0], layer.k_proj(hidden)[0], layer.v_proj(hidden)[0]
    out = []
    for i in range(9):
        seen, parts = (i + 1 if causal else 9), []
        for h in range(4):
            x = k[:seen, 6 * h : 6 * h + 6] @ q[i, 6 * h : 6 * h + 6] / 6**0.5
            w = 1 + x + x**2 / 2
            parts.append((w / w.sum()) @ v[:seen, 8 * h : 8 * h + 8])
        out.append(layer.o_proj(torch.cat(parts)))
    assert torch.allclose(layer(hidden)[0], torch.stack(out), atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [2, 5, 13])
def test_window_by_definition(causal: bool, tokens: int) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(SHAPE, causal=causal, window=4).double()
    hidden = torch.randn(1, tokens, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.zeros_like(q)
    for i in range(tokens):
        near = slice(max(0, i - 3), i + 1 if causal else i + 4)
        for h in range(4):
            e = (k[h, near] @ q[h, i] / 8**0.5).exp()
            wanted[h, i] = (e / e.sum()) @ v[h, near]
    assert torch.allclose(layer.heads_of(hidden)[0], wanted, atol=1e-10)
    assert torch.allclose(layer.attention_weights(hidden)[0] @ v, wanted, atol=1e-10)


def test_states_do_not_grow() -> None:
    linear, window = based_layers(SHAPE, 2, narrow=6, window=4)
    assert linear.cache_bytes(10) == linear.cache_bytes(10_000)
    assert window.cache_bytes(3) == window.cache_bytes(10_000) == 2 * 32 * 3 * 2


def test_no_conversion() -> None:
    with pytest.raises(InputError, match="no conversion"):
        BasedLinearAttention.from_mha(None)
    with pytest.raises(InputError, match="at least 1"):
        BasedLinearAttention(SHAPE, narrow=0)
