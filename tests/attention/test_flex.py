"""FlexAttention against SDPA with a mask, and every reason not to use it. One compilation for the whole file."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention import flex as module
from polyhead.attention.flex import UNIT, _block_mask, _masked, flex_refusal, span_attention
from polyhead.attention.moa_sparse import ElasticSpan, SpanAttention

USABLE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and shutil.which("g++") is not None


def drawn(batch: int = 1, heads: int = 4, kv_heads: int = 4, tokens: int = 300) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, tokens, 16, generator=generator) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(("tokens", "sinks"), [(300, 0), (513, 4), (256, 200)])
def test_blocks_are_those_that_pairs_are_in(tokens: int, sinks: int) -> None:
    """No pair that is seen lies in a skipped block, none that is not in a block taken as a whole; none is idle."""
    places = torch.arange(tokens)
    spans = [(1, 0.0), (150, 0.0), (1, 0.4), (0, 1.0)]
    mask = _block_mask(torch.tensor([ElasticSpan(*span).fixed for span in spans]), sinks, tokens)
    reach = torch.tensor([[max(1, int(a + b * (i + 1) + 1e-4)) for i in range(tokens)] for a, b in spans])
    met = ((places >= (places - reach + 1)[..., None]) | (places < sinks)) & (places <= places[:, None])
    blocks = -(-tokens // 128)
    padded = torch.zeros(4, blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:, :tokens, :tokens] = met
    counts = padded.view(4, blocks, 128, blocks, 128).sum((2, 4))
    real = torch.full((blocks,), 128)
    real[-1] = tokens - 128 * (blocks - 1)
    part = torch.zeros(4, blocks, blocks, dtype=torch.bool)
    whole = torch.zeros_like(part)
    for found, number, index in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for h in range(4):
            for row in range(blocks):
                found[h, row, index[0, h, row, : number[0, h, row]].long()] = True
    assert torch.equal(part | whole, counts > 0)
    assert not (part & whole).any()
    assert (counts == real[:, None] * real)[whole].all()


@pytest.mark.skipif(not USABLE, reason="FlexAttention needs AVX2 and a C++ compiler")
def test_values_are_those_of_a_mask() -> None:
    shape, spans = AttentionShape(64, 4, kv_heads=2), [ElasticSpan(*each) for each in ((1,), (40,), (0, 0.3), (0, 1))]
    layer, faster = (SpanAttention(shape, spans=spans, flex=flex).eval() for flex in (False, True))
    faster.load_state_dict(layer.state_dict())
    hidden = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlexAttention failed")
        q, k, v, _ = faster._prepared(hidden, None)
        assert flex_refusal(q, k, v) == ""
        assert torch.allclose(faster(hidden), layer(hidden), atol=1e-5)
        longer = torch.randn(2, 640, 64, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(faster(longer), layer(longer), atol=1e-5)
        padding = torch.arange(300)[None] >= torch.tensor([[0], [7]])
        assert torch.equal(faster(hidden, padding), layer(hidden, padding))


def test_it_is_refused_where_it_does_not_apply() -> None:
    q, k, v = drawn()
    assert "gradients" in flex_refusal(q.clone().requires_grad_(), k, v)
    assert "probed for" in flex_refusal(q.double(), k.double(), v.double())
    assert "256 tokens or more" in flex_refusal(q[:, :, :200], k[:, :, :200], v[:, :, :200])
    assert "whole texts" in flex_refusal(q[:, :, -1:], k, v)


def test_gradients_flow_through_the_mask() -> None:
    q, k, v = drawn(tokens=260)
    spans = torch.tensor([[5 * UNIT, 0]] * 4)
    q.requires_grad_()
    span_attention(q, k, v, spans, 1).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_a_failure_is_said_and_sdpa_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn()
    spans = torch.tensor([[9 * UNIT, 0]] * 4)

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(module, "_probe", lambda *_: "")
    monkeypatch.setattr(module, "_flexed", broken)
    with pytest.warns(UserWarning, match="no such instruction"):
        found = span_attention(q, k, v, spans, 2)
    assert torch.equal(found, _masked(q, k, v, spans, 2))


def test_a_probe_that_differs_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flexed", lambda q, k, v, spans, sinks: _masked(q, k, v, spans, sinks) + 0.01)
    module._probe.cache_clear()
    try:
        q, k, v = drawn(heads=3, kv_heads=3)
        if USABLE:
            assert "differs from SDPA" in flex_refusal(q, k, v)
        monkeypatch.setattr(module.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        module._probe.cache_clear()
        assert "AVX2" in flex_refusal(q, k, v)
    finally:
        module._probe.cache_clear()
