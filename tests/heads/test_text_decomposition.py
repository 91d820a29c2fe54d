"""Embeddings as sums: parts add up in every family, a head's part is the definition, relevance is by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.errors import InputError
from polyhead.heads.text_decomposition import EmbeddingDecomposer, EmbeddingParts, EmbeddingShare, patch_map
from polyhead.model import HeadedModel, load
from polyhead.pooling import POOLERS

TEXT = ["bert", "roberta", "mpnet", "distilbert", "modernbert", "gpt2", "llama", "gemma3", "gpt-neox"]


def shaken(family: str) -> torch.nn.Module:
    """A tiny model none of whose biases and gains are trivial, in float64."""
    module = tiny(family)
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return module.double()


def towers(family: str, tower: str) -> tuple[EmbeddingDecomposer, dict[str, torch.Tensor], torch.Tensor]:
    """A two-tower model's decomposer, inputs for it, and the embedding that the whole model gives."""
    module = shaken(family)
    inputs = inputs_for(f"{family}-{tower}")
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"].double()}
    whole = {**inputs_for(f"{family}-text"), "pixel_values": inputs_for(f"{family}-vision")["pixel_values"].double()}
    with torch.no_grad():
        outputs = module(**whole)
    expected = outputs.image_embeds if tower == "vision" else outputs.text_embeds
    return EmbeddingDecomposer.of_tower(module, tower), inputs, expected


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", TEXT)
def test_parts_sum_to_the_pooled_vector(family, pooling):
    model = load(shaken(family))
    inputs = inputs_for(family)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    expected = POOLERS[pooling]()(states, inputs["attention_mask"])
    parts = EmbeddingDecomposer(model, pooling)(inputs)
    assert torch.allclose(parts.vector, expected)
    assert (parts.total() - expected).norm(dim=-1).max() < 1e-4 * expected.norm(dim=-1).max()
    assert parts.heads.abs().amax((0, 3)).min() > 1e-4


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_parts_sum_to_the_embedding_of_a_two_tower_model(family, tower):
    decomposer, inputs, expected = towers(family, tower)
    parts = decomposer(inputs)
    assert torch.allclose(parts.vector, expected, atol=1e-6)
    assert (parts.total() - expected).norm(dim=-1).max() < 1e-4
    assert parts.heads.norm(dim=-1).max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_heads_part_is_the_definition(family):
    """One head's output at one token, norm by norm as the model's own modules have it, with statistics held."""
    model = load(shaken(family))
    module = model.module
    inputs = {"input_ids": inputs_for(family)["input_ids"][1:]}
    given: dict[torch.nn.Module, torch.Tensor] = {}
    norms = [part for part in module.modules() if isinstance(part, torch.nn.LayerNorm)]
    handles = [norm.register_forward_pre_hook(lambda part, args: given.update({part: args[0]})) for norm in norms]
    with model.record("heads") as recording, torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()

    def held(norm: torch.nn.LayerNorm, vectors: torch.Tensor) -> torch.Tensor:
        deviation = (given[norm][0].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return norm.weight * (vectors - vectors.mean(-1, keepdim=True)) / deviation

    parts = EmbeddingDecomposer(model)(inputs)
    for layer in range(model.layers):
        for head in range(model.heads):
            found = recording.heads[0, layer, head] @ model.output_weight(layer)[head]
            if family == "bert":
                for block in module.encoder.layer[layer:]:
                    found = held(block.output.LayerNorm, held(block.attention.output.LayerNorm, found))
            else:
                found = held(module.ln_f, found)
            assert torch.allclose(parts.heads[0, layer, head], found.mean(0), atol=1e-7)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_padded_batch_is_one_by_one(family):
    model = load(shaken(family))
    inputs = inputs_for(family)
    together = EmbeddingDecomposer(model, normalize=True)(inputs)
    short = {key: value[:1, :-3] for key, value in inputs.items()}
    alone = EmbeddingDecomposer(model, normalize=True)(short)
    for name in ("heads", "feedforward", "embedding", "rest", "vector"):
        assert torch.allclose(getattr(together, name)[:1], getattr(alone, name), atol=1e-6), name
    assert torch.allclose(together.vector.norm(dim=-1), torch.ones(2).double())


@pytest.mark.parametrize("case", ["bert", "llama", "clip-vision", "siglip-vision"])
def test_relevance_of_tokens_sums_to_the_heads_part_and_is_its_parts(case):
    if "-" in case:
        decomposer, inputs, _ = towers(*case.split("-"))
    else:
        decomposer, inputs = EmbeddingDecomposer(load(shaken(case)), normalize=True), inputs_for(case)
    parts = decomposer(inputs)
    directions = torch.randn(2, parts.vector.shape[1], dtype=torch.float64)
    found = decomposer.token_relevance(inputs, directions)
    assert torch.allclose(found.sum(-1), torch.einsum("blhd,bd->blh", parts.heads, directions), atol=1e-6)
    vectors = decomposer.token_parts(inputs, [(0, 3), (1, 2)])
    for (layer, head), each in vectors.items():
        along = torch.einsum("btd,bd->bt", each, directions)
        assert torch.allclose(found[:, layer, head], along, atol=1e-6)
    assert float(found.std(-1).max()) > 1e-4
    if case in ("bert", "llama"):
        assert found[0, ..., -3:].abs().max() == 0  # nothing comes from padding


def test_a_patch_that_no_head_can_read_has_no_relevance():
    decomposer, inputs, _ = towers("clip", "vision")
    before = decomposer.token_relevance(inputs, torch.randn(decomposer(inputs).vector.shape[1]))
    maps = patch_map(before.sum((1, 2)))
    assert maps.shape == (2, 4, 4)
    assert torch.equal(maps[0].flatten(), before.sum((1, 2))[0, 1:])
    assert patch_map(before, (2, 8)).shape == (2, 2, 4, 2, 8)
    with pytest.raises(InputError, match="5 x 5"):
        patch_map(before, (5, 5))


def test_mean_ablation_takes_what_texts_differ_in():
    model = load(shaken("bert"))
    batch = inputs_for("bert", batch=5)
    parts = EmbeddingDecomposer(model)(batch)
    ablated = parts.mean_ablated([(1, 0), (1, 3)])
    expected = parts.vector.clone()
    for head in (0, 3):
        expected += parts.heads[:, 1, head].mean(0) - parts.heads[:, 1, head]
    assert torch.allclose(ablated, expected)
    halves = [EmbeddingDecomposer(model)({k: v[rows] for k, v in batch.items()}) for rows in (slice(2), slice(2, 5))]
    assert torch.allclose(EmbeddingParts.joined(halves).heads, parts.heads)


def numbered(model: HeadedModel) -> HeadedModel:
    def tokenize(texts, truncation=True, max_length=None):
        rows = [[int(word) for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    model.tokenize = tokenize
    return model


def test_shares_are_covariances_with_the_embedding():
    model = numbered(load(shaken("bert")))
    texts = ["5 9 2", "7 7", "12 40 3 8 1", "66", "9 5 2 2"]
    found = EmbeddingShare(batch_size=2).score(model, texts).values
    parts = EmbeddingDecomposer(model, normalize=True).texts(texts)
    centred = parts.vector - parts.vector.mean(0)
    for layer in range(model.layers):
        for head in range(model.heads):
            part = parts.heads[:, layer, head] - parts.heads[:, layer, head].mean(0)
            assert found[layer, head] == pytest.approx(float((part * centred).sum() / centred.square().sum()))
    others = parts.feedforward.sum(1) + parts.embedding + parts.rest
    share = float(((others - others.mean(0)) * centred).sum() / centred.square().sum())
    assert np.nansum(found) + share == pytest.approx(1, abs=1e-4)


def test_bf16_runs_and_what_is_no_weighted_sum_is_refused():
    model = load(tiny("bert").bfloat16())
    parts = EmbeddingDecomposer(model)(inputs_for("bert"))
    assert (parts.total() - parts.vector).norm() < 0.05 * parts.vector.norm()
    with pytest.raises(InputError, match="weighted sum"):
        EmbeddingDecomposer(load(shaken("bert")), "max")(inputs_for("bert"))
    with pytest.raises(InputError, match="Tanh stands between"):
        EmbeddingDecomposer(load(shaken("bert")), "own")(inputs_for("bert"))
    with pytest.raises(InputError, match="no vector of its own"):
        EmbeddingDecomposer(load(shaken("llama")), "own")(inputs_for("llama"))
    with pytest.raises(InputError, match="No pooling"):
        EmbeddingDecomposer(load(tiny("bert")), "middle")
    with pytest.raises(InputError, match="projection"):
        EmbeddingDecomposer(load(tiny("bert")), projection=torch.zeros(4, 7))(inputs_for("bert"))
    with pytest.raises(InputError, match="two texts"):
        EmbeddingShare().score(load(tiny("bert")), ["one"])


@pytest.mark.real_model
def test_parts_of_a_real_encoder_sum_to_what_the_encoder_gives(minilm_path):
    from polyhead.embed import Encoder

    texts = ["Stocks fell on Friday.", "The match was won in the last minute of extra time, to everyone's surprise."]
    expected = torch.tensor(Encoder(minilm_path, backend="torch", precision="fp32").encode(texts).dense)
    parts = EmbeddingDecomposer(load(minilm_path), normalize=True).texts(texts)
    assert (parts.total() - expected).abs().max() < 1e-4
