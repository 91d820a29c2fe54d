"""A small Llama that learns associative recall in seconds: a real layer for conversions and caches to work on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.claims._tiny_tasks import Batch, recall_batch, trained_accuracy

if TYPE_CHECKING:
    from polyhead.cache import CachePolicy
    from polyhead.compress import Report
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["RecallTask", "TinyDecoder", "converted", "decoded", "looks_back"]


class TinyDecoder(nn.Module):
    """``[batch, tokens, features]`` -> ``[batch, tokens, classes]`` through a Llama of transformers."""

    def __init__(self, features: int = 80, classes: int = 16, *, dim: int = 64, kv_heads: int = 8, layers: int = 2):
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            intermediate_size=2 * dim,
        )
        config._attn_implementation = "sdpa"
        self.enter = nn.Linear(features, dim)
        self.body: Any = LlamaModel(config)
        self.leave = nn.Linear(dim, classes)

    def forward(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits of each token."""
        states = self.body(inputs_embeds=self.enter(inputs), **{"use_cache": False, **kwargs}).last_hidden_state
        logits: torch.Tensor = self.leave(states)
        return logits


class RecallTask:
    """Recall of ``pairs`` names and values, with a test that training never sees.

    ``twice`` asks for so many of the names, and for the same ones again.
    """

    def __init__(self, pairs: int, seed: int, *, count: int = 256, twice: int = 0) -> None:
        self.pairs, self.seed, self.twice = pairs, seed, twice
        self.test = self.batch(torch.Generator().manual_seed(10_000 + seed), count)

    def batch(self, generator: torch.Generator, count: int = 32) -> Batch:
        """Texts of the task."""
        drawn = recall_batch(generator, count, self.pairs)
        if not self.twice:
            return drawn
        keep = [*range(self.pairs + self.twice), *range(self.pairs, self.pairs + self.twice)]
        return Batch(drawn.inputs[:, keep], drawn.labels[:, keep])

    def train(self, decoder: TinyDecoder, steps: int, *, stream: int = 0, rate: float = 5e-3) -> float:
        """Accuracy after ``steps`` more steps; models trained on one ``stream`` see the same texts."""
        return trained_accuracy(decoder, self.batch, self.test, steps, 100 * self.seed + stream, rate)

    @torch.no_grad()
    def accuracy(self, decoder: TinyDecoder) -> float:
        """Share of values recalled."""
        asked = self.test.labels >= 0
        return float((decoder(self.test.inputs).argmax(-1) == self.test.labels)[asked].float().mean())

    @torch.no_grad()
    def loss(self, decoder: TinyDecoder) -> float:
        """Mean cross-entropy in nats."""
        logits = decoder(self.test.inputs).flatten(0, 1)
        return float(F.cross_entropy(logits, self.test.labels.flatten(), ignore_index=-1))


@torch.no_grad()
def looks_back(decoder: TinyDecoder, task: RecallTask, seed: int) -> HeadMap:
    """Attention ``[layers, heads]`` of asked names to the pair that holds their value, on texts of their own."""
    from polyhead.headmap import HeadMap
    from polyhead.model import load

    texts = task.batch(torch.Generator().manual_seed(30_000 + seed), 64).inputs
    with load(decoder.body).record("attention") as found:
        decoder(texts)
    said = texts[:, :, :-16].argmax(-1)  # the names; recall_batch puts 16 values behind them
    hit = said[:, task.pairs :, None] == said[:, None, : task.pairs]
    on_it = (found.attention[:, :, :, task.pairs :, : task.pairs] * hit[:, None, None]).sum(-1).mean((0, 3))
    return HeadMap(on_it.numpy(), name="looks at the pair asked for")


@torch.no_grad()
def decoded(decoder: TinyDecoder, task: RecallTask, policy: CachePolicy, prompt: int) -> tuple[float, int]:
    """Accuracy of what is asked after the first ``prompt`` tokens, read first, and bytes the cache then held."""
    from polyhead.model import load

    texts, labels = task.test.inputs, task.test.labels[:, prompt:]
    with policy.on(load(decoder.body)) as cache:
        decoder(texts[:, :prompt], past_key_values=cache, use_cache=True)
        held = cache.bytes
        logits = decoder(texts[:, prompt:], past_key_values=cache, use_cache=True)
    return float((logits.argmax(-1) == labels)[labels >= 0].float().mean()), held


def converted(
    decoder: TinyDecoder, transform: Callable[[HeadedModel], tuple[HeadedModel, Report]]
) -> tuple[TinyDecoder, Report]:
    """A copy of the decoder whose body went through a transform, and the transform's report."""
    from polyhead.model import load

    body, report = transform(load(decoder.body))
    made = copy.deepcopy(decoder)
    made.body = body.module
    return made, report
