"""Tiny random models saved to folders, with a tokenizer of a few words, that a service can load by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.serve.conftest import ServedEncoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXT = "the river rises in hills and meets sea who lives far subject3 , ."
WORDS = SPECIAL + TEXT.split()
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 80}


class FolderEncoder(ServedEncoder):
    """A :class:`ServedEncoder` by the name of a folder, with the layers and heads of the model in it."""

    prompts: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path) -> None:
        super().__init__(name=str(folder))
        self.head_shape = (2, 4, 3)
        self.head_layers = (0, 1)


def save_encoder(folder: Path) -> Path:
    """A BERT of 2 layers and 4 heads with states of 24 numbers, as many as a ServedEncoder's vectors have."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    # Loud at the start, so that one head of a random model matters.
    config = BertConfig(vocab_size=len(WORDS), hidden_size=24, pad_token_id=0, initializer_range=0.5, **SIZES)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return _with_tokenizer(folder)


def save_decoder(folder: Path) -> Path:
    """A Llama of 2 layers and 4 heads with its language-model head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=24, pad_token_id=0, initializer_range=0.5, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=72, **names).save_pretrained(folder)
    return folder
