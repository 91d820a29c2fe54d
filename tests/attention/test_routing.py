"""Routing attention against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyhead.attention import AttentionShape
from polyhead.attention.routing import RoutingAttention
from polyhead.errors import InputError
from polyhead.positions import RotaryPositions
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
CASES = {
    # gradients=False: which cluster a token belongs to is a hard choice, and bfloat16 may choose another
    "routing-transformer": Case(
        lambda causal: RoutingAttention(SHAPE, causal=causal, clusters=3, window=4), gradients=False
    ),
    "routing-transformer-one-cluster": Case(
        lambda causal: RoutingAttention(
            AttentionShape(32, 4, bias=True), causal=causal, local_heads=0 if causal else 3, clusters=1, window=70
        )
    ),
}


def normed(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def made(causal: bool, **knobs: object) -> tuple[RoutingAttention, torch.Tensor]:
    torch.manual_seed(0)
    layer = RoutingAttention(SHAPE, causal=causal, **knobs).double().eval()  # type: ignore[arg-type]
    return layer, torch.randn(2, 13, 32, dtype=torch.float64)


def test_in_order_by_definition() -> None:
    layer, hidden = made(True, clusters=3, window=4, positions=RotaryPositions(8))
    q, v = layer.split(layer.q_proj(hidden)), layer.split(layer.v_proj(hidden))
    turned, keys = layer.positions(q[:, :2], layer.split(layer.k_proj(hidden)), layer._prepared(hidden, None)[3])
    centroids = layer.centroids / layer.centroids.norm(dim=-1, keepdim=True)
    wanted, assigned = torch.zeros_like(q), layer.assignments(hidden)
    for b in range(2):
        for h in range(4):
            route = normed(q[b, h])
            own = [int((centroids[h - 2] @ x).argmax()) for x in route] if h >= 2 else [0] * 13
            if h >= 2:
                assert assigned[b, h - 2].tolist() == own
            for i in range(13):
                seen = [j for j in range(i + 1) if own[j] == own[i]][-4:]
                logits = (keys[b, h, seen] @ turned[b, h, i] if h < 2 else route[seen] @ route[i]) / 8**0.5
                wanted[b, h, i] = logits.softmax(0) @ v[b, h, seen]
    assert torch.allclose(layer.heads_of(hidden), wanted, atol=1e-10)
    assert torch.allclose(layer.attention_weights(hidden) @ v, wanted, atol=1e-10)


def test_both_directions_by_definition() -> None:
    layer, hidden = made(False, clusters=3, window=4, local_heads=1)
    q, k, v = (layer.split(proj(hidden)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.zeros_like(q)
    for b in range(2):
        for i in range(13):
            near = slice(max(0, i - 3), i + 4)
            wanted[b, 0, i] = (k[b, 0, near] @ q[b, 0, i] / 8**0.5).softmax(0) @ v[b, 0, near]
        for h in range(1, 4):
            asks, seen = normed(q[b, h]), normed(k[b, h])
            said: dict[int, list[torch.Tensor]] = {i: [] for i in range(13)}
            for centroid in layer.centroids[h - 1]:
                members = sorted(range(13), key=lambda j, c=centroid, x=seen: -float(c @ x[j]))[:4]
                for i in sorted(range(13), key=lambda j, c=centroid, x=asks: -float(c @ x[j]))[:4]:
                    said[i].append((seen[members] @ asks[i] / 8**0.5).softmax(0) @ v[b, h, members])
            for i, parts in said.items():
                wanted[b, h, i] = torch.stack(parts).mean(0) if parts else 0
    assert torch.allclose(layer.heads_of(hidden), wanted, atol=1e-10)
    assert torch.allclose(layer.attention_weights(hidden) @ v, wanted, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_one_cluster_of_all_is_dense_attention(causal: bool) -> None:
    layer, hidden = made(causal, clusters=1, window=13, local_heads=0)
    q, v = normed(layer.split(layer.q_proj(hidden))), layer.split(layer.v_proj(hidden))
    k = q if causal else normed(layer.split(layer.k_proj(hidden)))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert torch.allclose(layer.heads_of(hidden), dense, atol=1e-10)


def test_centroids_follow_what_is_assigned_to_them() -> None:
    layer, hidden = made(True, clusters=3, window=4, decay=0.9)
    padding = torch.arange(13)[None].expand(2, -1) < torch.tensor([[13], [9]])
    before, assigned = layer.centroids.clone(), layer.assignments(hidden, padding)
    q = normed(layer.split(layer.q_proj(hidden)))[:, 2:]
    layer(hidden, padding)
    assert torch.equal(layer.centroids, before)
    layer.train()(hidden, padding)
    for h in range(2):
        for c in range(3):
            points = q[:, h][assigned[:, h] == c]
            wanted = 0.9 * before[h, c] + 0.1 * points.mean(0) if len(points) else before[h, c]
            assert torch.allclose(layer.centroids[h, c], wanted)


def test_bad_knobs_are_refused() -> None:
    for knobs in ({"local_heads": 5}, {"clusters": 0}, {"window": 0}, {"decay": 1.5}):
        with pytest.raises(InputError, match="expected"):
            RoutingAttention(SHAPE, **knobs)
    with pytest.raises(InputError, match="keys of its own"):
        RoutingAttention(AttentionShape(32, 4, kv_heads=2))
    with pytest.raises(InputError, match="no conversion"):
        RoutingAttention.from_mha(None)  # type: ignore[arg-type]
