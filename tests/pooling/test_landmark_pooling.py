"""Landmarks stand where they should, and their mean is what is pooled: by hand, in the encoder and in stock modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from polyhead.embed import Encoder
from polyhead.errors import InputError
from polyhead.pooling import LandmarkPooler, Landmarks, position_bias
from polyhead.pooling.sentence import PoolerModule, save

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg", "##b", ".", "a.", "c."]


def tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")


def test_stretches_of_tokens() -> None:
    landmarks = Landmarks(tokenizer(), interval=2)
    assert landmarks.mark("a b c d e") == "a b [SEP] c d [SEP] e"
    # A stretch does not end within a word: "ab" is two tokens.
    assert landmarks.mark("c ab d e") == "c ab [SEP] d e"
    assert landmarks.mark("") == ""
    made = landmarks(["a b c", "d"])
    assert made["input_ids"].tolist() == [[2, 4, 5, 3, 6, 3], [2, 7, 3, 0, 0, 0]]
    assert made["landmarks"].tolist() == [[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]]


def test_a_tokenizer_without_an_end_gets_the_last_landmark() -> None:
    assert Landmarks(tokenizer(ends=False), interval=2).mark("a b c") == "a b [SEP] c [SEP]"


def test_sentences_and_drawn_stretches() -> None:
    marked = Landmarks(tokenizer(), "sentence").mark("The river rises. It runs west! Does it end?")
    assert marked == "The river rises. [SEP] It runs west! [SEP] Does it end?"
    text = " ".join("abcdefg" * 8)
    drawn = Landmarks(tokenizer(), (2, 9), seed=1)
    counts = {len(drawn.mark(text).split("[SEP]")[0].split()) for _ in range(40)}
    assert counts == set(range(2, 10))
    again = Landmarks(tokenizer(), (2, 9), seed=1)
    assert again.mark(text) == Landmarks(tokenizer(), (2, 9), seed=1).mark(text)


def test_pools_landmarks_only() -> None:
    states, ids = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([[2, 3, 7, 3, 0], [0, 2, 7, 3, 3]])
    mask = (ids != 0).long()
    found = LandmarkPooler(3)(states, mask, ids=ids).numpy()
    np.testing.assert_allclose(found, [states[0, [1, 3]].mean(0), states[1, 3:].mean(0)], rtol=1e-12)
    # Landmarks within the prompt are left out, padding that is the landmark too.
    skipped = LandmarkPooler(3)(states, mask, 2, ids)
    torch.testing.assert_close(skipped[0], states[0, 3])
    ids[0, 4] = 3
    np.testing.assert_allclose(LandmarkPooler(3)(states, mask, ids=ids).numpy(), found, rtol=1e-12)
    with pytest.raises(InputError, match="pass ids="):
        LandmarkPooler(3)(states, mask)


def test_the_same_in_stock_modules(tmp_path: Path) -> None:
    made = tokenizer()
    made.save_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, pad_token_id=0, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "plain")
    landmarks = Landmarks(made, interval=3)
    texts = [landmarks.mark(text) for text in ("a b c d e f g", "c", "g f e d")]
    pooler = LandmarkPooler(landmarks.id, vocabulary=len(WORDS))
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "plain")), PoolerModule(pooler, 16)], device="cpu")
    expected = model.encode(texts)
    assert save(model, tmp_path / "saved") == []
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert [type(module).__name__ for module in plain] == ["Transformer", "WordWeights", "Pooling"]
    np.testing.assert_allclose(plain.encode(texts), expected, atol=1e-6)
    for encoder in (
        Encoder(str(tmp_path / "saved"), backend="torch", cache_dir=tmp_path),
        Encoder(str(tmp_path / "plain"), backend="torch", cache_dir=tmp_path, pooling=pooler),
    ):
        np.testing.assert_allclose(encoder.encode(texts).dense, expected, atol=1e-6)
    # Without landmarks only the last token is pooled, which is another vector.
    assert abs(model.encode(["a b c d e f g"]) - expected[:1]).max() > 1e-3


def test_position_bias_probe() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> np.ndarray:
        seen.extend(texts)
        return np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 5.0]])

    np.testing.assert_allclose(position_bias(encode, "q", "n", ["x", "y"]), [1.0, 0.5**0.5, 0.0], atol=1e-12)
    assert seen == ["q", "n x y", "x n y", "x y n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"interval": 0}, "interval = 0"), ({"interval": "words"}, "'words'"), ({"landmark": "[X]"}, "no special token")],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Landmarks(tokenizer(), **arguments)
