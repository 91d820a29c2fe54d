"""Landmark attention against its definition."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention.landmark import LandmarkAttention, insert_landmarks, without_landmarks
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    "landmark-attention": Case(lambda causal: LandmarkAttention(GROUPS, causal=causal, every=2), both=False),
    # gradients=False: which blocks are opened is a hard choice, and bfloat16 may open others
    "landmark-attention-top": Case(
        lambda causal: LandmarkAttention(SHAPE, causal=causal, every=2, top=1), both=False, gradients=False
    ),
}


def defined(logits: torch.Tensor, every: int, top: int | None = None) -> torch.Tensor:
    """Weights of one head ``[tokens, tokens]`` by groups, as the paper writes them; ``top`` of ``logits``'s own."""
    tokens, size = len(logits), every + 1
    p = [j // size * size + every for j in range(tokens)]
    weights = torch.zeros_like(logits)
    for i in range(tokens):
        best = sorted((j for j in range(i) if p[j] == j and p[i] != j), key=lambda j, i=i: -logits[i, j].item())[:top]
        group = {}
        for j in range(i + 1):
            if p[j] != j:
                group[j] = p[j]
            elif p[i] != j and j in best:
                group[j] = p[i]
        soft = {}
        for j, name in group.items():
            soft[j] = logits[i, j].exp() / sum(logits[i, y].exp() for y, other in group.items() if other == name)
        for j, name in group.items():
            if p[j] == j:
                continue
            if name == p[i]:
                weights[i, j] = soft[j]
            elif p[j] in best:
                weights[i, j] = soft[j] * soft[p[j]]
    return weights


@pytest.mark.parametrize("top", [None, 1, 2, 9])
def test_weights_by_definition(top: int | None) -> None:
    torch.manual_seed(0)
    layer = LandmarkAttention(SHAPE, every=3, top=top).double().eval()
    hidden = torch.randn(1, 14, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0].detach() for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.stack([defined(q[h] @ k[h].T / 8**0.5, 3, top) for h in range(4)])
    found = layer.attention_weights(hidden)[0]
    assert torch.allclose(found, wanted, atol=1e-10)
    assert torch.allclose(found.sum(-1), torch.ones(4, 14, dtype=torch.float64))
    assert torch.allclose(layer.heads_of(hidden)[0], wanted @ v, atol=1e-10)


def test_all_blocks_fetched_is_what_training_sees() -> None:
    torch.manual_seed(0)
    hidden, whole = torch.randn(1, 23, 32), LandmarkAttention(SHAPE, every=3)
    fetching = LandmarkAttention(SHAPE, every=3, top=5)
    fetching.load_state_dict(whole.state_dict())
    _, state = fetching.step(hidden[:, :20])
    out, _ = fetching.step(hidden[:, 20:], state)
    assert torch.allclose(out, whole(hidden)[:, 20:], atol=1e-6)


def test_one_choice_for_all_heads_is_that_of_the_greatest_logit() -> None:
    torch.manual_seed(0)
    layer, hidden = LandmarkAttention(SHAPE, every=3, top=1, per_head=False), torch.randn(1, 13, 32)
    opened = layer.attention_weights(hidden)[0, :, 12].view(4, -1)[:, :12].view(4, 3, 4).sum(-1) > 0
    q, k = layer.split(layer.q_proj(hidden))[0, :, 12], layer.split(layer.k_proj(hidden))[0, :, 3::4]
    best = torch.einsum("hd,hcd->hc", q, k).amax(0).argmax()
    assert opened.int().tolist() == [[int(c == best) for c in range(3)]] * 4
    _, state = layer.step(hidden[:, :12])
    assert torch.allclose(layer.step(hidden[:, 12:], state)[0], layer(hidden)[:, 12:], atol=1e-6)


def test_landmarks_come_and_go() -> None:
    ids = torch.arange(1, 8)[None]
    marked = insert_landmarks(ids, 0, every=3)
    assert marked.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7]]
    assert torch.equal(without_landmarks(marked, every=3), ids)
    states = insert_landmarks(torch.zeros(2, 3, 5), torch.ones(5), every=1)
    assert states[0, :, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        LandmarkAttention(SHAPE, every=0)
    with pytest.raises(InputError, match="at least 1"):
        LandmarkAttention(SHAPE, top=0)
    with pytest.raises(InputError, match="at least 1"):
        insert_landmarks(torch.zeros(1, 4), 0, every=0)
    with pytest.raises(InputError, match="causal=True"):
        LandmarkAttention(SHAPE, causal=False)
