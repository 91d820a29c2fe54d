"""Effective rank of logits, against the rank that a head's size allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.errors import InputError
from polyhead.heads.logit_rank import effective_rank, head_rank


def test_effective_rank_is_rank_where_all_values_are_equal() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    assert float(effective_rank(basis @ values @ basis.T)) == pytest.approx(3.0)
    uneven = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert float(effective_rank(uneven)) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    assert effective_rank(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]


def test_a_heads_logits_have_at_most_its_own_rank() -> None:
    # 4 heads of 8 numbers on 20 tokens: the bound binds.
    model = polyhead.load(tiny("bert").eval())
    ids = torch.randint(3, 98, (3, 20), generator=torch.Generator().manual_seed(2))
    texts = [{"input_ids": one[None], "attention_mask": torch.ones(1, 20, dtype=torch.int64)} for one in ids]
    found = head_rank(model, texts)
    assert found.values.shape == (2, 4)
    assert (found.values <= 8).all()
    assert (found.values > 1).all()
    np.testing.assert_allclose(head_rank(model, texts, relative=True).values, found.values / 8, rtol=1e-6)
    # The same from queries and keys, without going through attention weights.
    bert = model.module
    layer, expected = bert.encoder.layer[0].attention.self, []
    for one in texts:
        hidden = bert.embeddings(one["input_ids"]).detach()
        query, key = ((m(hidden)[0].unflatten(-1, (4, 8)).transpose(0, 1)).double() for m in (layer.query, layer.key))
        logits = query @ key.mT / 8**0.5
        expected.append(effective_rank(logits - logits.mean(-1, keepdim=True)).detach().numpy())
    np.testing.assert_allclose(found.values[0], np.mean(expected, 0), rtol=1e-3)


def test_masked_attention_and_no_text_are_refused() -> None:
    model = polyhead.load(tiny("gpt2").eval())
    with pytest.raises(InputError, match="in no head do all see"):
        head_rank(model, [{name: value[1:] for name, value in inputs_for("gpt2").items()}])
    with pytest.raises(InputError, match="No texts"):
        head_rank(model, [])
