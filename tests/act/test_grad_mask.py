"""Gradients of chosen heads alone: each slice against the model's own layout, and what the others lose."""

from __future__ import annotations

import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.act.grad_mask import HeadGradMask
from polyhead.errors import InputError
from polyhead.model import HeadedModel, load


def _backward(model: HeadedModel, family: str, mask: HeadGradMask | None) -> dict[str, torch.Tensor]:
    model.module.zero_grad()
    outputs = model(**inputs_for(family))
    loss = outputs.last_hidden_state.square().mean() + outputs.last_hidden_state[..., 0].sum()
    if mask is None:
        loss.backward()
    else:
        with mask.on(model):
            loss.backward()
    return {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


def _check(family: str, kept: dict[str, torch.Tensor], heads: list[tuple[int, int]]) -> None:
    """``kept``: parameters of attention with the mask written by hand; all others of attention get no gradient."""
    model = load(tiny(family))
    plain = _backward(model, family, None)
    masked = _backward(model, family, HeadGradMask(heads))
    again = _backward(model, family, None)
    attention = {id(p) for layer in model.attention_layers for p in layer.module.parameters()}
    attention |= {id(p) for layer in model.attention_layers for p in layer.output_projection.parameters()}
    own = {name: p for name, p in model.module.named_parameters() if name in plain}
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)  # gone after the block
        if name in kept:
            torch.testing.assert_close(masked[name], gradient * kept[name])
            assert masked[name].abs().sum() > 0
        elif id(own[name]) in attention:
            assert masked[name].abs().sum() == 0, name
        else:
            torch.testing.assert_close(masked[name], gradient)


def test_three_projections() -> None:
    rows = torch.zeros(32)
    rows[16:24] = 1  # head 2 of 4 heads of 8
    own = "encoder.layer.1.attention."
    kept = {f"{own}self.{part}.weight": rows[:, None] for part in ("query", "key", "value")}
    kept |= {f"{own}self.{part}.bias": rows for part in ("query", "value")}
    # The gradient of a key's bias is 0 but for rounding: it moves all scores of a query alike.
    _check("bert", {**kept, f"{own}self.key.bias": rows, f"{own}output.dense.weight": rows}, [(1, 2)])


def test_a_fused_projection_that_keeps_its_weights_the_other_way_round() -> None:
    rows = torch.zeros(32)
    rows[8:16] = 1
    own = "h.0.attn."
    kept = {f"{own}c_attn.weight": rows.repeat(3), f"{own}c_attn.bias": rows.repeat(3)}
    _check("gpt2", {**kept, f"{own}c_proj.weight": rows[:, None]}, [(0, 1)])


def test_a_shared_key_head_is_let_through() -> None:
    query, shared = torch.zeros(32, 1), torch.zeros(16, 1)
    query[24:], shared[8:] = 1, 1  # query head 3 of 4, key-value head 1 of 2
    own = "layers.0.self_attn."
    kept = {f"{own}q_proj.weight": query, f"{own}k_proj.weight": shared, f"{own}v_proj.weight": shared}
    _check("llama", {**kept, f"{own}o_proj.weight": query.T}, [(0, 3)])


def test_shared_layers_and_unknown_heads_are_refused() -> None:
    with pytest.raises(InputError, match="shared between layers"):
        HeadGradMask([(0, 0)]).masks(load(tiny("albert")))
    with pytest.raises(InputError):
        HeadGradMask([(7, 0)]).masks(load(tiny("bert")))
