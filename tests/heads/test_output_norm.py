"""Output norms by the Gram form against the explicit product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.output_norm import OutputNorm
from polyhead.model import HeadedModel, load

TEXTS = ["abc", "defghijk", "lm"]


def _model(family: str = "llama", **changes) -> HeadedModel:
    model = load(tiny(family, **changes))

    def tokenize(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
        longest = max(map(len, texts))
        ids = torch.tensor([[ord(c) - 94 for c in text] + [0] * (longest - len(text)) for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    model.tokenize = tokenize
    return model


def _definition(model: HeadedModel) -> np.ndarray:
    lengths = []
    for text in TEXTS:
        with model.record("heads") as recording, torch.no_grad():
            model(**model.tokenize([text]))
        z = recording.heads[0].double()  # [layers, heads, tokens, dim]
        wrote = torch.stack([z[at] @ model.output_weight(at).double() for at in range(model.layers)])
        lengths.append(wrote.norm(dim=-1))
    return torch.cat(lengths, dim=-1).mean(-1).detach().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3"])
def test_equals_the_explicit_product_text_by_text(family):
    model = _model(family)
    assert np.allclose(OutputNorm(batch_size=2).score(model, TEXTS).values, _definition(model), rtol=1e-5)


def test_bf16_model():
    model = _model()
    model.module.bfloat16()
    assert np.allclose(OutputNorm().score(model, TEXTS).values, _definition(model), rtol=0.02)


def test_head_with_a_zero_value_matrix_writes_nothing():
    model = _model(num_key_value_heads=4)
    model.module.layers[0].self_attn.v_proj.weight.data[8:16] = 0
    values = OutputNorm().score(model, TEXTS).values
    assert values[0, 1] == 0
    assert (np.delete(values.ravel(), 1) > 0).all()


def test_anything_but_texts_is_refused():
    for wrong in ("one text", [], [1]):
        with pytest.raises(InputError, match="list of texts"):
            OutputNorm().score(_model(), wrong)
