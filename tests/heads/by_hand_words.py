"""A GPT-2 set by hand whose head (1, 0) turns every word into the next one of its list; a tokenizer of those words."""

from __future__ import annotations

import torch

from polyhead.model import HeadedModel, load

WORDS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "one", "two", "three", "four"]
WORDS += ["five", "six", "seven", "cat", "dog", "house", "car", "book", "tree"]
WIDTH = 64


class Words:
    """A tokenizer: a word of the list is one token, any other is two."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        found: list[int] = []
        for word in text.split():
            found += [WORDS.index(word)] if word in WORDS else [25, 26]
        return {"input_ids": found}

    def decode(self, ids: list[int]) -> str:
        return WORDS[ids[0]] if ids[0] < len(WORDS) else f"<{ids[0]}>"


def next_word_model(sign: float = 1.0) -> HeadedModel:
    """Vocabulary of 30; head (1, 1) has a zero value matrix, layer 0's heads write nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=WIDTH)
    module = GPT2LMHeadModel(config).eval()
    eye = torch.eye(WIDTH)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0) if "ln_" in name and name.endswith("weight") else parameter.zero_()
        module.transformer.wte.weight.copy_(eye[:30])
        module.transformer.wpe.weight.copy_(torch.randn(16, WIDTH))  # no business of a token's state
        for block in module.transformer.h:
            block.mlp.c_fc.weight.copy_(eye)
            block.mlp.c_proj.weight.copy_(eye)
        attention = module.transformer.h[1].attn
        attention.c_attn.weight[:, 2 * WIDTH : 2 * WIDTH + 32] = eye[:, :32]
        attention.c_proj.weight[:32] = sign * eye[:32].roll(1, dims=1)
        attention.c_proj.weight[32:] = torch.randn(32, WIDTH)
        module.lm_head.weight = module.transformer.wte.weight
    model = load(module)
    model.__dict__["tokenizer"] = Words()
    return model
