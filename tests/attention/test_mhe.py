"""Head embeddings against their definition, the paper's parameter count, and conversion."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.mhe import HeadEmbeddingAttention
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4)
CASES = {
    f"mhe-{mode}": Case(lambda causal, mode=mode: HeadEmbeddingAttention(SHAPE, causal=causal, mode=mode))
    for mode in ("add", "mul", "both")
} | {"mhe-groups": Case(lambda causal: HeadEmbeddingAttention(AttentionShape(32, 4, kv_heads=2), causal=causal))}


@pytest.mark.parametrize("mode", ["add", "mul", "both"])
def test_output_by_definition(mode: str) -> None:
    layer = HeadEmbeddingAttention(SHAPE, mode=mode, spread=1.0).double()  # type: ignore[arg-type]
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    heads = []
    for head in range(4):
        own = []
        for role, linear in (("query", layer.q_proj), ("key", layer.k_proj), ("value", layer.v_proj)):
            states = hidden[0] @ linear.weight.T
            if mode != "add":
                states = states * (layer.embeddings[f"{role}_mul"][head, 0] + 1)
            if mode != "mul":
                states = states + layer.embeddings[f"{role}_add"][head, 0]
            own.append(states)
        heads.append((own[0] @ own[1].T / 8**0.5).softmax(-1) @ own[2])
    assert torch.allclose(layer(hidden)[0], torch.cat(heads, 1) @ layer.o_proj.weight.T, atol=1e-10)


def test_parameters_are_the_papers_formula() -> None:
    n, d = 8, 4
    shape = AttentionShape(n * d, n)
    count = [sum(p.numel() for p in kind(shape).parameters()) for kind in (Attention, HeadEmbeddingAttention)]
    assert count[0] - count[1] == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


def test_conversion_is_exact_where_the_form_allows_and_least_squares_elsewhere() -> None:
    trained = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0]
    hidden = torch.randn(2, 5, 32)
    for mode in ("add", "mul"):
        source = HeadEmbeddingAttention(AttentionShape(32, 4, bias=True), mode=mode, spread=0.5)  # type: ignore[arg-type]
        again = HeadEmbeddingAttention.from_mha(Written(source), mode=mode)  # type: ignore[arg-type]
        assert torch.allclose(again(hidden), source(hidden), atol=1e-5)
    near = HeadEmbeddingAttention.from_mha(trained, mode="mul")
    mean = trained.query.mean(0)
    fitted = near.q_proj.weight.T * (1 + near.embeddings["query_mul"][:, 0])[:, None]
    assert (fitted - trained.query).norm() < (mean - trained.query).norm()


def test_another_mode_is_refused() -> None:
    with pytest.raises(InputError, match="'mul' or 'both'"):
        HeadEmbeddingAttention(SHAPE, mode="concat")  # type: ignore[arg-type]


class Written:
    """A head-embedding layer written out as full matrices."""

    def __init__(self, layer: HeadEmbeddingAttention) -> None:
        for role in ("query", "key", "value"):
            linear = getattr(layer, f"{role[0]}_proj")
            matrix, bias = linear.weight.detach().T.expand(4, -1, -1), linear.bias.detach().expand(4, -1)
            own = layer.embeddings[f"{role}_{layer.mode}"].detach()
            full = (matrix, bias + own[:, 0]) if layer.mode == "add" else (matrix * (1 + own), bias * (1 + own[:, 0]))
            setattr(self, role, full[0])
            setattr(self, f"{role}_bias", full[1])
        self.output = layer.o_proj.weight.detach().T.unflatten(0, (4, 8))
        self.output_bias = layer.o_proj.bias.detach()
