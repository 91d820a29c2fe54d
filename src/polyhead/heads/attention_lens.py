"""Attention Lens: a learned map from what one head writes to the model's own next-token distribution.

For head (l, h), ``lens(a) = W a + b`` with ``a = z_h W_O^h`` its contribution to the residual stream; only W and b are
trained, by ``KL(model || lens)`` over ordinary text, with the model frozen (arXiv 2310.16270). Full W are large, so the
vocabulary can be the texts' frequent tokens (both distributions renormalised over them) and W of low rank into the
frozen unembedding, ``W = U A B``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.logit_lens import LogitLens, Pass, logits_at
from polyhead.heads.residual import TokenScale
from polyhead.heads.tasks import NextToken
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["AttentionLens", "AttentionLensScore", "LensSamples", "collect"]

_HELD = 2**26  # contributions held at a time by the score: 256 MB


@dataclass(frozen=True)
class LensSamples:
    """What heads wrote at sampled positions, and what the model predicted there.

    Attributes:
        heads: which, as ``(layer, head)``.
        written: ``[heads, n, hidden]``, contributions to the residual stream (norms after ``o_proj`` left out).
        predicted: ``[n, vocabulary]``, log-probabilities over ``tokens``, renormalised.
        tokens: ``[vocabulary]`` ids.
        text: ``[n]`` which text each position is from.
        direct: ``[heads, n, vocabulary]``, what each head adds to the logits of ``tokens`` through the norms and the
            unembedding, norms at the scale they had; None where it was not asked for.
    """

    heads: list[tuple[int, int]]
    written: torch.Tensor
    predicted: torch.Tensor
    tokens: torch.Tensor
    text: np.ndarray
    direct: torch.Tensor | None = None

    def logit_lens(self, rows: np.ndarray | None = None) -> np.ndarray:
        """``KL(model || logit lens)`` in nats of each head and position, ``[heads, n]``: the baseline without training.

        The logit lens of a head is the softmax of what it adds to the logits, with the final norm (and any norm between
        output projection and residual stream) frozen at the scale of that token.

        Raises:
            InputError: the samples were collected without ``direct=True``.
        """
        if self.direct is None:
            raise InputError("These samples hold no direct logits: collect them with collect(..., direct=True).")
        at = np.arange(len(self.predicted)) if rows is None else rows
        found = [_kl(self.predicted[at], torch.log_softmax(each[at], -1)).cpu().numpy() for each in self.direct]
        return np.stack(found)


def collect(
    model: HeadedModel,
    texts: Sequence[str],
    heads: Sequence[tuple[int, int]],
    *,
    vocabulary: int | None = 4096,
    positions: int = 4,
    max_tokens: int = 64,
    seed: int = 0,
    direct: bool = False,
) -> LensSamples:
    """Run the model over ``texts`` and keep what ``heads`` wrote at ``positions`` random tokens of each.

    Args:
        vocabulary: how many of the texts' most frequent tokens to predict; None for all the model has.
        positions: a text, at most; 1 takes its last token alone, as the paper does.
        max_tokens: texts are cut there.
        seed: of the positions.
        direct: keep each head's direct logits too, ``heads * n * vocabulary`` numbers, for the logit lens.
    """
    lens, task = LogitLens(model), NextToken(texts, "texts", max_tokens, 8)
    batches, random = task.batches(model), np.random.default_rng(seed)
    counts: Counter[int] = Counter()
    for batch in batches:
        counts.update(batch.inputs["input_ids"][batch.inputs["attention_mask"].bool()].tolist())
    chosen = [token for token, _ in counts.most_common(vocabulary)] if vocabulary else range(len(lens.unembedding))
    tokens = torch.tensor(list(chosen), device=lens.unembedding.device)
    layers, written, predicted, text = sorted({layer for layer, _ in heads}), [], [], []
    straight: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        rows, columns = _positions(batch.inputs["attention_mask"].cpu().numpy(), positions, random)
        seen: dict[int, torch.Tensor] = {}

        def keep(layer: int, z: torch.Tensor, at: Any = (rows, columns), into: Any = seen) -> None:
            into[layer] = z[at[0], at[1]]

        if direct:
            held = lens.run(batch.inputs, rows.tolist(), columns.tolist())
            seen.update({layer: held.heads[layer][rows, columns] for layer in layers})
            logits = held.logits
        else:
            with torch.no_grad(), model.tap_heads(keep, layers=layers), logits_at(lens.head, rows, columns):
                logits = model(**batch.inputs, use_cache=False).logits[0]
        weight = {layer: model.output_weight(layer).detach().to(seen[layer].dtype) for layer in layers}
        written.append(torch.stack([(seen[at][:, head] @ weight[at][head]).float() for at, head in heads]))
        if direct:
            states = _through_norms(held, heads, written[-1], rows, columns)
            straight.append(states @ lens.unembedding[tokens].float().T)
        predicted.append(torch.log_softmax(logits[:, tokens].float(), -1))
        text.append(rows.numpy() + number * task.batch_size)
    found = torch.cat(straight, 1) if direct else None
    return LensSamples(list(heads), torch.cat(written, 1), torch.cat(predicted), tokens, np.concatenate(text), found)


def _through_norms(
    seen: Pass, heads: Sequence[tuple[int, int]], written: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Contributions ``[heads, n, hidden]`` as they arrive at the unembedding, norms at the scale they had there."""

    def through(state: torch.Tensor, scale: TokenScale) -> torch.Tensor:
        return TokenScale(scale.token[rows, columns], scale.weight, scale.bias, scale.centers)(state)

    norms = [[*seen.branches[layer], seen.norm] for layer, _ in heads]
    return torch.stack([reduce(through, some, state) for some, state in zip(norms, written, strict=True)])


def _positions(mask: np.ndarray, count: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = [], []
    for row, there in enumerate(mask):
        (known,) = np.nonzero(there)
        taken = known[-1:] if count == 1 else random.choice(known, min(count, len(known)), replace=False)
        rows += [row] * len(taken)
        columns += sorted(taken.tolist())
    return torch.tensor(rows), torch.tensor(columns)


@paper("attention-lens")
class AttentionLens:
    """Learned lenses of several heads, trained together.

    Args:
        model: a decoder with its language-model head.
        heads: which, as ``(layer, head)``.
        rank: of ``W`` into the frozen unembedding; None trains the full ``[vocabulary, hidden]``.
        vocabulary: how many frequent tokens to read in; None for all.
        steps, learning_rate: of Adam, on batches of 128 positions.
        seed: of positions, start and batches.

    Attributes:
        losses_: ``[steps, heads]`` KL in nats of each training batch.

    Example:
        >>> lens = AttentionLens(load("gemma-3-270m", lm_head=True), [(15, 3)], rank=16)
        >>> lens.fit(load_texts("ag-news", 64)).read("The capital of France is", (15, 3), k=3)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: HeadedModel,
        heads: Sequence[tuple[int, int]],
        rank: int | None = 64,
        vocabulary: int | None = 4096,
        steps: int = 200,
        learning_rate: float = 1e-2,
        seed: int = 0,
    ) -> None:
        if not heads or any(not (0 <= at < model.layers and 0 <= h < model.heads) for at, h in heads):
            raise InputError(
                f"Lenses for the heads {list(heads)} were asked for; '{model.name}' has layers 0 to {model.layers - 1} "
                f"with heads 0 to {model.heads - 1}: give some of them as (layer, head)."
            )
        self.model, self.heads, self.rank, self.vocabulary = model, list(heads), rank, vocabulary
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed

    def fit(self, texts: Sequence[str], *, progress: Progress | None = None) -> AttentionLens:
        """Collect what the heads write on ``texts`` and train."""
        samples = collect(self.model, texts, self.heads, vocabulary=self.vocabulary, seed=self.seed)
        return self.fit_samples(samples, progress=progress)

    def fit_samples(
        self, samples: LensSamples, rows: np.ndarray | None = None, *, progress: Progress | None = None
    ) -> AttentionLens:
        """Train on collected samples, or on their positions ``rows`` alone."""
        device = samples.written.device
        generator = torch.Generator().manual_seed(self.seed)
        at = torch.arange(len(samples.predicted)) if rows is None else torch.as_tensor(rows)
        given, wanted = samples.written[:, at.to(device)], samples.predicted[at.to(device)]
        self.tokens_ = samples.tokens
        self._size = given.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)  # of a usual contribution
        frozen = self.model.module.get_output_embeddings().weight.detach()[samples.tokens].float()  # type: ignore[operator]
        heads, _, hidden = given.shape
        inner = hidden if self.rank is None else self.rank
        reads = torch.randn(heads, hidden, inner, generator=generator).to(device) / hidden**0.5
        if self.rank is None:
            self._parts = [torch.zeros(heads, hidden, len(frozen), device=device)]
            self._frozen = None
        else:
            self._parts = [reads, torch.zeros(heads, inner, hidden, device=device)]
            self._frozen = frozen / frozen.square().mean().sqrt() / hidden**0.5
        # The bias starts at the mean prediction, so that training is about what the head adds.
        self.bias_ = wanted.exp().mean(0).clamp(min=1e-9).log().repeat(heads, 1)[:, None].contiguous()
        trained = [part.requires_grad_() for part in [*self._parts, self.bias_]]
        optimizer = torch.optim.Adam(trained, self.learning_rate)
        losses = []
        for step in range(self.steps):
            batch = torch.randint(len(at), (128,), generator=generator).to(device)
            with torch.enable_grad():
                loss = _kl(wanted[batch], self._log_probs(given[:, batch])).mean(1)
                loss.sum().backward()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 - step / self.steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().cpu().numpy())
            if progress is not None:
                progress(step + 1, self.steps)
        for part in trained:
            part.requires_grad_(False)
        self.losses_ = np.array(losses)
        return self

    def _log_probs(self, written: torch.Tensor) -> torch.Tensor:
        """``[heads, n, vocabulary]`` of contributions ``[heads, n, hidden]``."""
        into = self._parts[-1] if self._frozen is None else self._parts[-1] @ self._frozen.T  # small first
        state = written / self._size
        logits = state @ into if self._frozen is None else state @ self._parts[0] @ into
        return torch.log_softmax(logits + self.bias_, -1)

    def kl(self, samples: LensSamples, rows: np.ndarray | None = None) -> np.ndarray:
        """``KL(model || lens)`` in nats of each head and position, ``[heads, n]``."""
        at = np.arange(len(samples.predicted)) if rows is None else rows
        found = []
        for some in np.array_split(at, max(1, len(at) // 256)):
            with torch.no_grad():
                found.append(_kl(samples.predicted[some], self._log_probs(samples.written[:, some])).cpu().numpy())
        return np.concatenate(found, 1)

    def read(self, prompt: str, head: tuple[int, int], k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` likeliest tokens that a head's lens reads at the prompt's last token, with their probabilities."""
        at = self.heads.index(head)
        seen = collect(self.model, [prompt], self.heads, vocabulary=1, positions=1, max_tokens=10**9)
        with torch.no_grad():
            top = self._log_probs(seen.written)[at, 0].exp().topk(k)
        decode = self.model.tokenizer.decode
        return [(decode([int(self.tokens_[i])]), float(p)) for p, i in zip(top.values, top.indices, strict=True)]


def _kl(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return (wanted.exp() * (wanted - given)).sum(-1)


@dataclass
class AttentionLensScore(Score):
    """How far a learned lens on one head stays from the model's prediction, on texts it was not trained on.

    ``data``: texts, three quarters to train on; None takes 64 news items. Knobs as in :class:`AttentionLens`.

    Example:
        >>> AttentionLensScore(rank=16, steps=50).score(load("gemma-3-270m", lm_head=True)).top(3)  # doctest: +SKIP
    """

    name: ClassVar[str] = "attention-lens"
    summary: ClassVar[str] = "held-out KL between the model's prediction and a learned lens on one head alone"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "tells less of what the model predicts"

    rank: int | None = 16
    vocabulary: int | None = 1024
    steps: int = 100
    seed: int = 0

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`. Raises InputError for fewer than four texts."""
        from polyhead.data import load_texts

        texts = load_texts("ag-news", 64) if data is None else data
        if isinstance(texts, str) or len(texts) < 4 or not all(isinstance(text, str) for text in texts):
            raise InputError("attention-lens was given other data: expected a list of four texts or more.")
        values = np.full((model.layers, model.heads), np.nan)
        rows = model.heads * model.hidden_size * 4 * len(texts)  # numbers a layer's contributions take
        for group in _groups(model.layers, max(1, _HELD // rows)):
            heads = [(at, head) for at in group for head in range(model.attention_layers[at].heads)]
            samples = collect(model, texts, heads, vocabulary=self.vocabulary, seed=self.seed)
            train = samples.text < len(texts) * 3 // 4
            lens = AttentionLens(model, heads, self.rank, self.vocabulary, self.steps, seed=self.seed)
            lens.fit_samples(samples, np.flatnonzero(train))
            for (at, head), value in zip(heads, lens.kl(samples, np.flatnonzero(~train)).mean(1), strict=True):
                values[at, head] = value
            if progress is not None:
                progress(group[-1] + 1, model.layers)
        return self._map(values, model, f"{len(texts)} texts")


def _groups(layers: int, size: int) -> list[range]:
    return [range(first, min(layers, first + size)) for first in range(0, layers, size)]
