"""A two-layer attention-only model that learns in seconds to go on with what repeats: a circuit to test methods on.

Sequences are random tokens that repeat with a random period. What follows can be told from the first period on by heads
of two layers together: those of layer 0 bring a token's neighbour to it, those of layer 1 look for what followed the
present token the last time (Olsson et al. 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from polyhead.errors import InputError
from polyhead.model import HeadedModel, load

__all__ = ["VOCABULARY", "recall", "repeating", "train_induction"]

VOCABULARY = 24
_WAVES = (3.0, 7.0, 15.0, 31.0)


def repeating(
    rows: int, length: int = 32, *, generator: torch.Generator, shortest: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences with a period: ids ``[rows, length]`` and the periods ``[rows]``, at most length - 7."""
    period = torch.randint(shortest, length - 6, (rows,), generator=generator)
    fresh = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return fresh.gather(1, torch.arange(length)[None] % period[:, None]), period


def train_induction(
    seed: int = 0, *, heads: int = 8, head_dim: int = 8, steps: int = 450, length: int = 32
) -> HeadedModel:
    """Train one: a GPT-2 of two layers whose feed-forward blocks are zero and stay so.

    From random weights the first neighbour head takes thousands of steps to appear. So positions begin as waves and
    layer 0 head 0 as a head that looks at the token before; the rest begins at random, and all of it is trained.

    Args:
        seed: of weights and sequences.
        heads, head_dim: of each layer.
        steps: of 32 sequences; 450 of them take 6 seconds on one core.
        length: of the sequences.

    Example:
        >>> model = train_induction(steps=2)
        >>> model.layers, model.heads
        (2, 8)
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if steps < 1 or length < 16 or head_dim < 8:
        raise InputError(
            f"steps={steps}, length={length}, head_dim={head_dim} were given; expected at least 1, 16 and 8."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=length,
                n_embd=heads * head_dim,
                n_layer=2,
                n_head=heads,
                n_inner=1,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.1,
            )
        ).eval()  # no dropout
        _begin(module, head_dim)
    for block in module.transformer.h:
        for parameter in block.mlp.parameters():
            parameter.data.zero_()
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.01)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
            ids, period = repeating(32, length, generator=generator)
            _loss(module, ids, period).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return load(module)


def _begin(module: Any, head_dim: int) -> None:
    """Positions as waves in the first 8 features, and layer 0 head 0 a previous-token head on them."""
    frequency = 2 * math.pi / torch.tensor(_WAVES)
    with torch.no_grad():
        places = module.transformer.wpe.weight
        phase = torch.arange(len(places))[:, None] * frequency
        places.zero_()
        places[:, :8] = 0.7 * torch.cat([phase.cos(), phase.sin()], 1)
        weight = module.transformer.h[0].attn.c_attn.weight
        query, key = weight[:, :head_dim], weight[:, len(weight) : len(weight) + head_dim]
        query.zero_()
        key.zero_()
        query[:8, :8] = 1.5 * torch.eye(8)
        turn = frequency.cos().repeat(2).diag()
        turn[range(4), range(4, 8)] = frequency.sin()
        turn[range(4, 8), range(4)] = -frequency.sin()
        key[:8, :8] = turn


def _loss(module: torch.nn.Module, ids: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Mean loss ``[rows]`` of the tokens that can be told from those before."""
    logits = module(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    # The token after the first that repeats: one that begins the second period can't be told.
    known = (torch.arange(1, ids.shape[1])[None] > period[:, None]).to(loss.dtype)
    return (loss * known).sum(1) / known.sum(1)


def recall(model: HeadedModel, ids: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats ``[rows]`` of the tokens of each sequence that can be told from those before."""
    with torch.no_grad():
        return _loss(model.module, ids, period)
