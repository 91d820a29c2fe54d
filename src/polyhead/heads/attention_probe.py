"""A parser made of attention alone: all heads' weights, combined by two learned numbers a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.base import Progress
from polyhead.heads.relations import ParsedSentence, word_attention
from polyhead.heads.streaming import Pattern, stream_attention
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["AttentionProbe"]


@paper("bert-attention")
@dataclass
class AttentionProbe:
    """The head word ``i`` of a word ``j``: ``p(i | j) ~ exp(sum_k w_k a^k_ji + u_k a^k_ij)`` (bert-attention).

    ``a^k_ji`` is head ``k``'s attention from word ``j`` to word ``i``. Trained on one set of parsed sentences, judged
    on another by the share of words that get their head word (unlabelled attachment; roots are left out).

    Args:
        steps: of L-BFGS.
        penalty: on the squared weights.

    Attributes:
        weights_: ``[2, layers * heads]`` float64 after :meth:`fit`: ``w`` and ``u``.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> parsed = [ParsedSentence(("The", "king", "sleeps"), (1, 2, -1), ("det", "nsubj", "root"))]
        >>> AttentionProbe().fit(model, parsed).score(model, parsed)
        1.0
    """

    steps: int = 50
    penalty: float = 1e-3
    weights_: np.ndarray = field(init=False, repr=False)

    def fit(
        self, model: HeadedModel, data: Sequence[ParsedSentence], *, progress: Progress | None = None
    ) -> AttentionProbe:
        """Learn ``w`` and ``u``; the model is not changed."""
        examples = _examples(model, data, progress)
        features, target, owner = _joined(examples)
        weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=self.steps, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = _loss(features @ weights, target, owner) + self.penalty * (weights**2).sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        self.weights_ = weights.detach().reshape(2, -1).numpy()
        return self

    def score(self, model: HeadedModel, data: Sequence[ParsedSentence], *, progress: Progress | None = None) -> float:
        """Share of words whose most likely head word is the right one.

        Raises:
            InputError: before :meth:`fit`, or a model with another number of heads.
        """
        if getattr(self, "weights_", None) is None:
            raise InputError("AttentionProbe has learned nothing yet: call fit(model, sentences) first.")
        if self.weights_.shape[1] != model.layers * model.heads:
            raise InputError(f"The probe was fitted on {self.weights_.shape[1]} heads; '{model.name}' has others.")
        flat = torch.as_tensor(self.weights_).flatten()
        return float(np.mean([int((x @ flat).argmax()) == at for x, at in _examples(model, data, progress)]))


def _examples(
    model: HeadedModel, data: Sequence[ParsedSentence], progress: Progress | None
) -> list[tuple[torch.Tensor, int]]:
    """For each word with a head word: features of its candidates ``[candidates, 2 * heads]``, and the right one."""
    found = []
    for done, one in enumerate(data, start=1):
        coded = model.tokenizer([list(one.words)], is_split_into_words=True, return_tensors="pt", truncation=True)
        of, n = coded.word_ids(0), len(one.words)
        layers: list[torch.Tensor] = []

        def visit(pattern: Pattern, layers: list[torch.Tensor] = layers, of: list[int | None] = of, n: int = n) -> None:
            layers.append(word_attention(pattern.weights[0], of, n).cpu())

        stream_attention(model, {key: value.to(model.device) for key, value in coded.items()}, visit)
        words = torch.cat(layers)  # [layers * heads, n, n]
        for word, head in enumerate(one.heads):
            if head >= 0 and {word, head} <= set(of):
                others = [at for at in range(n) if at != word and at in of]
                features = torch.cat([words[:, word, others], words[:, others, word]]).T
                found.append((features, others.index(head)))
        if progress is not None:
            progress(done, len(data))
    if not found:
        raise InputError(f"No pairs to learn from: none of the {len(data)} sentences has a word with a head word.")
    return found


def _joined(examples: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All candidates in one table, the rows of the right ones, and which example each row is of."""
    sizes = torch.tensor([len(features) for features, _ in examples])
    owner = torch.repeat_interleave(torch.arange(len(examples)), sizes)
    target = sizes.cumsum(0) - sizes + torch.tensor([at for _, at in examples])
    return torch.cat([features for features, _ in examples]), target, owner


def _loss(scores: torch.Tensor, target: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the right candidates, a softmax within each example."""
    count = len(target)
    most = scores.new_full((count,), -torch.inf).scatter_reduce(0, owner, scores.detach(), "amax")
    total = scores.new_zeros(count).index_add(0, owner, (scores - most[owner]).exp())
    return (total.log() + most - scores[target]).mean()
