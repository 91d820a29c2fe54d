"""Tiny models on disk, saved by transformers and sentence-transformers themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# fmt: off
WORDS = [
    "the", "a", "river", "rises", "in", "hills", "and", "runs", "west", "bridge", "of", "iron", "opened",
    "town", "what", "did", "it", "cost", "search", "find", ":", ",",
]
# fmt: on


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers x 4 heads x 8, with a WordPiece tokenizer, inputs of up to 24 tokens."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    size = _tokenizer(folder, 24)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        pad_token_id=0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random causal model of 2 layers x 4 query heads (2 key-value heads) x 8 that pads on the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    size = _tokenizer(folder, 64, padding_side="left")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentence_folder(
    tiny_bert: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, object]]:
    """Makes a sentence-transformers folder of modules and loads it with sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def make(*after: torch.nn.Module, pooling: object, base: str = "bert", **options: object) -> tuple[Path, object]:
        include_prompt = bool(options.pop("include_prompt", True))
        transformer = Transformer(str(tiny_bert if base == "bert" else tiny_llama))
        torch.manual_seed(2)
        pool = Pooling(32, pooling, include_prompt=include_prompt)  # type: ignore[arg-type]
        model = SentenceTransformer(modules=[transformer, pool, *after], device="cpu", **options)  # type: ignore[arg-type]
        folder = tmp_path_factory.mktemp("sentence")
        model.save(str(folder), create_model_card=False)
        return folder, SentenceTransformer(str(folder), device="cpu")

    return make


def _tokenizer(folder: Path, max_length: int, **options: str) -> int:
    """Writes a WordPiece tokenizer that knows a few words and all letters; gives its number of tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.?")
    names = special + WORDS + [each for each in letters if each not in WORDS] + [f"##{letter}" for letter in letters]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=max_length,
        **options,
    ).save_pretrained(folder)
    return len(vocabulary)
