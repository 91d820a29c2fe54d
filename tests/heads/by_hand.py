"""A GPT-2 whose weights are set by hand: layer 0 head 0 looks at the previous token, layer 1 head 0 copies."""

from __future__ import annotations

import torch
from torch import nn

VOCAB, PLACES, HEAD = 40, 64, 64


def copying_model() -> nn.Module:
    """Two layers of three heads; the induction head of layer 1 writes what followed the present token before.

    A token state has a part for the token, one for its position and one for the token before it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=PLACES, n_embd=3 * HEAD, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    token, place, before = slice(0, HEAD), slice(HEAD, 2 * HEAD), slice(2 * HEAD, 3 * HEAD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ln_" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.zero_()
        eye = torch.eye(HEAD)
        model.transformer.wte.weight[:, token] = eye[:VOCAB]
        model.transformer.wpe.weight[:, place] = eye[:PLACES]
        first, second = (block.attn for block in model.transformer.h)
        query, key, value = (slice(n * 3 * HEAD, n * 3 * HEAD + HEAD) for n in range(3))  # of head 0
        first.c_attn.weight[place, query] = eye * 10
        first.c_attn.weight[place, key] = eye.roll(1, dims=1)  # the key of place j answers the query of j + 1
        first.c_attn.weight[token, value] = eye
        first.c_proj.weight[:HEAD, before] = eye
        second.c_attn.weight[token, query] = eye * 10
        second.c_attn.weight[before, key] = eye
        second.c_attn.weight[token, value] = eye
        second.c_proj.weight[:HEAD, token] = eye * 10
    return model
