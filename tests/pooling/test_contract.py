"""The contract of poolers with weights: saved, folded, the same in Encoder and sentence-transformers, trained there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from polyhead.embed import Encoder
from polyhead.errors import InputError
from polyhead.pooling import (
    AttentionPooler,
    ConcatenatedPooler,
    LatentAttentionPooler,
    MeanPooler,
    Pooler,
    WeightedLayersPooler,
    load_pooler,
    pooler_from,
)
from polyhead.pooling.sentence import PoolerModule, fold, save
from polyhead.training.models import trainable

TEXTS = ["a b c d e f g", "c", "b e", "g f e d c b a a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers with states of 16 numbers, and a tokenizer of seven words."""
    where = tmp_path_factory.mktemp("pooled")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(where)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=24, pad_token_id=0, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(where)
    return where


def sentences(folder: Path, pooler: Pooler, *after: torch.nn.Module) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(folder)), PoolerModule(pooler, 16), *after], device="cpu")


def disturbed(pooler: Pooler) -> Pooler:
    """With weights that are not the first ones."""
    torch.manual_seed(1)
    for weight in pooler.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return pooler


class TextHeads(Pooler):
    """The mean of head outputs, the plainest reader of heads: a class of a user's own."""

    reads = "heads"

    def pool(self, states: torch.Tensor, counted: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return MeanPooler().pool(states.flatten(2), counted, positions)


def test_weighted_layers_by_hand() -> None:
    random = np.random.default_rng(0)
    states = random.normal(size=(1, 3, 3, 4))
    pooler = WeightedLayersPooler(2).double()
    pooler.weights.data = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    expected = (0.5 * states[0, :2, 0] - states[0, :2, 1] + 2 * states[0, :2, 2]).mean(0) / 1.5
    found = pooler(torch.from_numpy(states), torch.tensor([[1, 1, 0]]))
    np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-12)
    with pytest.raises(InputError, match=r"expected \[batch, tokens, 3, dim\]"):
        pooler(torch.zeros(1, 3, 2, 4), torch.ones(1, 3))
    with pytest.raises(InputError, match="does not read tokens"):
        WeightedLayersPooler(2, WeightedLayersPooler(2))


@pytest.mark.parametrize(
    ("pooler", "stock"),
    [
        (AttentionPooler(16, 4), False),
        (WeightedLayersPooler(2), True),
        (WeightedLayersPooler(2, ConcatenatedPooler([MeanPooler(), AttentionPooler(16, 2)])), False),
    ],
    ids=["attention", "weighted layers", "nested"],
)
def test_one_pooler_everywhere(pooler: Pooler, stock: bool, folder: Path, tmp_path: Path) -> None:
    pooler, width = disturbed(pooler), pooler.output_dim(16)
    after = [Dense(width, 8, activation_function=torch.nn.Identity()), Normalize()]
    model = sentences(folder, pooler, *after)
    expected = model.encode(TEXTS)
    assert expected.shape == (4, 8)
    where = tmp_path / "saved"
    assert bool(save(model, where)) is not stock
    if stock:
        assert "polyhead" not in (where / "modules.json").read_text()
    else:
        assert "Install Polyhead" in (where / "README.md").read_text()
        with pytest.raises(ValueError, match="trust_remote_code"):
            SentenceTransformer(str(where), device="cpu")
    again = SentenceTransformer(str(where), device="cpu", trust_remote_code=not stock)
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-6)
    ours = Encoder(str(where), backend="torch", cache_dir=tmp_path, device="cpu")
    np.testing.assert_allclose(ours.encode(TEXTS, heads=True).dense, expected, atol=1e-6)
    # Without saving the model, the pooler from a file of its own.
    pooler.save(tmp_path / "pooler")
    given = load_pooler(tmp_path / "pooler")
    direct = Encoder(str(folder), backend="torch", pooling=given, cache_dir=tmp_path, device="cpu")
    assert direct.dim == width
    with torch.no_grad():
        vectors = after[0]({"sentence_embedding": torch.from_numpy(direct.encode(TEXTS).dense)})
    np.testing.assert_allclose(after[1](vectors)["sentence_embedding"].numpy(), expected, atol=1e-6)


def test_weights_tell_encoders_apart(folder: Path, tmp_path: Path) -> None:
    prints = {
        Encoder(str(folder), pooling=pooler, cache_dir=tmp_path).fingerprint
        for pooler in (AttentionPooler(16, 4), disturbed(AttentionPooler(16, 4)), AttentionPooler(16, 2), "mean")
    }
    assert len(prints) == 4


def test_heads_are_read_by_the_encoder_and_refused_by_the_other(folder: Path, tmp_path: Path) -> None:
    encoder = Encoder(
        str(folder), backend="torch", pooling=TextHeads(), layers=(0, 1), cache_dir=tmp_path, device="cpu"
    )
    found = encoder.encode(TEXTS, heads=True)
    np.testing.assert_allclose(found.dense, found.heads.reshape(4, -1), atol=1e-6)
    with pytest.raises(InputError, match="reads head outputs"):
        PoolerModule(TextHeads(), 16)


def test_trains_in_sentence_transformers(folder: Path) -> None:
    model = sentences(folder, AttentionPooler(16, 4))
    features = model.preprocess(TEXTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[1].pooler.queries.detach().clone()
    model(features)["sentence_embedding"].square().sum().backward()
    optimizer.step()
    assert (model[1].pooler.queries - before).abs().min() > 0
    assert model[0].auto_model.embeddings.word_embeddings.weight.grad is not None
    assert model.get_embedding_dimension() == 16


def test_unpadded_batches_and_prompts() -> None:
    pooler = disturbed(AttentionPooler(4, 2))
    states, ids = torch.randn(1, 5, 4), torch.arange(5).view(1, 5)
    flat: dict[str, Any] = {"token_embeddings": states, "input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    padded = torch.stack([torch.cat([states[0, :2], torch.full((1, 4), 9.0)]), states[0, 2:]])
    rows: dict[str, Any] = {"token_embeddings": padded, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    for include in (True, False):
        module = PoolerModule(pooler, 4, include_prompt=include)
        found = [module({**features, "prompt_length": 1})["sentence_embedding"] for features in (flat, rows)]
        torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0][0], states[0, 1])


def test_folding_leaves_the_model_alone(folder: Path) -> None:
    model = sentences(folder, WeightedLayersPooler(2))
    before = model.encode(TEXTS)
    np.testing.assert_allclose(fold(model).encode(TEXTS), before, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS), before)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            {"pooler": "os.system", "settings": {}},
            "expected a Pooler class of polyhead.pooling; for a class of your own",
        ),
        ({"pooler": "polyhead.pooling.attention.nn", "settings": {}}, "expected a Pooler class"),
        ({"pooler": "polyhead.pooling.nowhere.X"}, "cannot be imported"),
        ({"pooler": "polyhead.pooling.attention.AttentionPooler", "settings": {"size": 3}}, "does not take"),
    ],
)
def test_descriptions_that_are_refused(description: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pooler_from(description)


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no saved pooler"):
        load_pooler(tmp_path)
    AttentionPooler(8, 2).save(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("8", "16"))
    with pytest.raises(InputError, match="no saved pooler"):
        load_pooler(tmp_path)


@pytest.mark.filterwarnings("ignore::polyhead.embed.LongTextWarning")
@pytest.mark.parametrize("pooler", ["last", WeightedLayersPooler(2), AttentionPooler(16, 4)], ids=str)
def test_an_encoder_saved_encodes_the_same(pooler: str | Pooler, folder: Path, tmp_path: Path) -> None:
    given = pooler if isinstance(pooler, str) else disturbed(pooler)
    encoder = Encoder(str(folder), backend="torch", pooling=given, cache_dir=tmp_path, max_tokens=6, device="cpu")
    expected = encoder.encode(TEXTS, on_long="truncate").dense
    custom = encoder.save(tmp_path / "saved")
    assert custom == (["AttentionPooler"] if isinstance(pooler, AttentionPooler) else [])
    peer = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=bool(custom))
    np.testing.assert_allclose(peer.encode(TEXTS), expected, atol=1e-6)
    if isinstance(given, Pooler):
        np.testing.assert_allclose(trainable(encoder).encode(TEXTS), expected, atol=1e-6)
    # And once more, from the saved folder.
    again = Encoder(str(tmp_path / "saved"), backend="torch", cache_dir=tmp_path, device="cpu")
    assert again.save(tmp_path / "twice") == custom
    peer = SentenceTransformer(str(tmp_path / "twice"), device="cpu", trust_remote_code=bool(custom))
    np.testing.assert_allclose(peer.encode(TEXTS), expected, atol=1e-6)


def test_openvino_runs_attention_to_shared_latents(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pooler = disturbed(LatentAttentionPooler(16, latents=5, heads=4, hidden=8))
    found = [
        Encoder(str(folder), backend=backend, precision="fp32", pooling=pooler, cache_dir=tmp_path, device="cpu")
        for backend in ("torch", "openvino")
    ]
    np.testing.assert_allclose(*(encoder.encode(TEXTS).dense for encoder in found), atol=1e-5)
