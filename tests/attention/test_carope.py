"""Context-aware rotary positions against their definition, rotary positions, and steps that carry phases."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.mae_heads import MixtureOfAttentiveExperts
from polyhead.attention.mhla import TokenLevelMultiHeadLinearAttention
from polyhead.attention.rcmha import RelativeConvAttention
from polyhead.errors import InputError
from polyhead.positions import ContextRotaryPositions, RotaryPositions, rate_maps
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4, kv_heads=2)


def layer_of(causal: bool, kind: type[Attention] = Attention) -> Attention:
    return kind(SHAPE, causal=causal, positions=ContextRotaryPositions(32, 2, 8))


# exact_cache=False: phases are kept besides what the layer says of keys and values
CASES = {"carope": Case(lambda causal: layer_of(causal), exact_cache=False)}


def test_turned_by_definition() -> None:
    layer, hidden = layer_of(False).double(), torch.randn(1, 6, 32, dtype=torch.float64)
    positions = layer.positions
    assert isinstance(positions, ContextRotaryPositions)
    q, k, _ = layer.project(hidden)
    found = layer.score(*layer._prepared(hidden, None)[:2], layer._prepared(hidden, None)[3])
    rate = 1 / (1 + torch.log(1 + torch.exp(hidden[0] @ positions.route.weight.T)))
    for head in range(4):
        for m in range(6):
            for n in range(6):
                wanted = 0.0
                for pair in range(1, 5):
                    turn = [sum(rate[t, head // 2] ** pair for t in range(at + 1)) for at in (m, n)]
                    one = torch.complex(q[0, head, m, pair - 1], q[0, head, m, pair + 3])
                    other = torch.complex(k[0, head // 2, n, pair - 1], k[0, head // 2, n, pair + 3])
                    wanted = wanted + (one * other.conj() * torch.exp(1j * (turn[0] - turn[1]))).real
                assert torch.allclose(found[0, head, m, n], wanted / 8**0.5)


def test_starts_as_rotary_where_a_base_is_given() -> None:
    ours, rotary = ContextRotaryPositions(32, 2, 8, base=100.0).double(), RotaryPositions(8, base=100.0)
    phases = ours.phases(torch.randn(1, 6, 32).double())
    wanted = torch.arange(1, 7).double()[:, None] * rotary.frequencies(torch.device("cpu"))[1:]
    assert torch.allclose(phases[0, :, :, :3], wanted.expand(2, -1, -1))
    assert ours.route.weight.abs().sum() == 0
    assert (ContextRotaryPositions(32, 2, 8).rates(1e3 * torch.randn(2, 9, 32)).sub(0.5).abs() <= 0.5).all()


def test_phases_survive_bfloat16_sums() -> None:
    positions = ContextRotaryPositions(8, 1, 4, base=10.0).to(torch.bfloat16)
    phases = positions.phases(torch.zeros(1, 2000, 8, dtype=torch.bfloat16))
    assert phases.dtype == torch.float32
    step = phases[0, 0, 1999, 0] / 2000
    assert torch.allclose(phases[0, 0, :, 0], step * torch.arange(1, 2001), rtol=1e-4)


def test_rates_of_heads_leave_padding_out() -> None:
    model, hidden = torch.nn.Sequential(layer_of(False), layer_of(True)), torch.randn(2, 6, 32)
    mean, spread = rate_maps(model, hidden)
    assert mean.values.shape == (2, 2)
    own = [model[0].positions.rates(hidden), model[1].positions.rates(model[0](hidden))]
    for layer, rates in enumerate(own):
        flat = rates.transpose(0, 1).flatten(1).double()
        assert torch.allclose(torch.from_numpy(mean.values[layer]), flat.mean(1))
        assert torch.allclose(torch.from_numpy(spread.values[layer]), flat.std(1, correction=0))
    real = torch.tensor([[False, True, True, True, True, True]]).expand(2, -1)
    padded, alone = rate_maps(model[0], hidden, real)[0], rate_maps(model[0], hidden[:, 1:])[0]
    assert padded.values == pytest.approx(alone.values)
    with pytest.raises(InputError, match="without context-aware positions"):
        rate_maps(torch.nn.Linear(3, 3), hidden)


def test_steps_carry_phases_beside_what_else_they_carry() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 32, dtype=torch.float64)
    for kind, kept in ((RelativeConvAttention, 4), (MixtureOfAttentiveExperts, 4), (LinearAttention, 2)):
        layer = layer_of(True, kind).double()
        state, parts = None, []
        for piece in hidden.split([1, 5, 3], 1):
            part, state = layer.step(piece, state)
            parts.append(part)
        assert len(state.tensors) == kept
        assert torch.allclose(torch.cat(parts, 1), layer(hidden))


def test_what_cannot_be_told_is_refused() -> None:
    for dim, heads, size, base in ((32, 2, 7, None), (32, 2, 8, 1.0)):
        with pytest.raises(InputError, match="expected"):
            ContextRotaryPositions(dim, heads, size, base=base)
    with pytest.raises(InputError, match="multiple of 3 heads"):
        Attention(SHAPE, positions=ContextRotaryPositions(32, 3, 8))(torch.randn(1, 5, 32))
    other = TokenLevelMultiHeadLinearAttention(
        AttentionShape(32, 4), causal=True, positions=ContextRotaryPositions(32, 4, 8), block_size=8
    )
    _, state = other.step(torch.randn(1, 3, 32))
    with pytest.raises(InputError, match="does not carry"):
        other.step(torch.randn(1, 3, 32), state)
