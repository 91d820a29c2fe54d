"""Tasks that a head can matter for: batches for a model, a loss an example, and a quality over all examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.data import SentencePairs
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["Batch", "FunctionTask", "NextToken", "PairSimilarity", "Task", "run_task", "task_for"]


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and what the answers are.

    Attributes:
        inputs: keyword arguments of the model, tensors ``[rows, ...]``.
        targets: tensors ``[examples, ...]`` that the loss needs.
        examples: how many; an example may take several rows, which then follow each other.
    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    examples: int

    def repeat(self, times: int) -> Batch:
        """The whole batch ``times`` times over, one after the other: ``[times * rows, ...]``."""

        def several(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {key: value.repeat(times, *[1] * (value.dim() - 1)) for key, value in tensors.items()}

        return Batch(several(self.inputs), several(self.targets), times * self.examples)


class Task(ABC):
    """Something a model does more or less well, example by example.

    Attributes:
        name: for maps and tables.
        metric: name of :meth:`quality`.
    """

    name: str
    metric: str

    @abstractmethod
    def batches(self, model: HeadedModel) -> Sequence[Batch]:
        """All examples, in order, on the model's device."""

    @abstractmethod
    def predict(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """One number an example, ``[examples]``, differentiable, from the model's outputs."""

    @abstractmethod
    def loss(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Loss of each example, ``[examples]``; lower is better."""

    @abstractmethod
    def quality(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        """Quality over the examples ``rows`` (with repeats, for a bootstrap); higher is better.

        Args:
            predictions: ``[n]`` of all examples, in order.
            rows: indices.
        """


def run_task(task: Task, model: HeadedModel, progress: Progress | None = None) -> np.ndarray:
    """Predictions ``[n]`` float64 of the model as it stands (under whatever actions are on)."""
    batches = task.batches(model)
    found = []
    for done, batch in enumerate(batches, start=1):
        with torch.inference_mode():
            found.append(task.predict(model(**batch.inputs), batch).double().cpu().numpy())
        if progress is not None:
            progress(done, len(batches))
    return np.concatenate(found)


class PairSimilarity(Task):
    """Sentence pairs with graded similarity, for encoders: mean-pooled cosine, judged by Spearman correlation.

    The loss of a pair is the squared difference between its cosine and ``gold / 5``.

    Args:
        data: pairs and gold scores of 0 to 5, such as ``load_sts(2015)``.
        batch_size: pairs a batch.
    """

    metric = "spearman"

    def __init__(self, data: SentencePairs, batch_size: int = 32) -> None:
        self.data = data
        self.name = f"{data.name} ({len(data)} pairs)"
        self.batch_size = batch_size

    def batches(self, model: HeadedModel) -> list[Batch]:
        """See :class:`Task`; the two sentences of a pair are two rows, one after the other."""
        found = []
        for first in range(0, len(self.data), self.batch_size):
            pairs = self.data.pairs[first : first + self.batch_size]
            inputs = model.tokenize([sentence for pair in pairs for sentence in pair], truncation=True)
            gold = torch.tensor(self.data.gold[first : first + self.batch_size], dtype=torch.float32)
            found.append(Batch(inputs, {"gold": gold.to(model.device)}, len(pairs)))
        return found

    def predict(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Cosine of the two mean-pooled sentences."""
        states = outputs.last_hidden_state.float()
        mask = batch.inputs["attention_mask"][..., None].to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.cosine_similarity(pooled[0::2], pooled[1::2])

    def loss(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See the class."""
        return (predictions - batch.targets["gold"] / 5) ** 2

    def quality(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        """Spearman correlation with the gold scores."""
        from scipy.stats import spearmanr

        return float(spearmanr(predictions[rows], self.data.gold[rows]).statistic)


class NextToken(Task):
    """Texts to predict token by token, for decoders with their language-model head (``load(..., lm_head=True)``).

    The prediction of a text is its mean log-likelihood a token in nats; the loss is its negative.

    Args:
        texts: what to predict.
        name: of the texts.
        max_tokens: each text is cut there; how many were is in ``cut`` after :meth:`batches`.
        batch_size: texts a batch.
    """

    metric = "log-likelihood a token"

    def __init__(self, texts: Sequence[str], name: str = "texts", max_tokens: int = 128, batch_size: int = 8) -> None:
        if not texts:
            raise InputError("NextToken was given no texts; expected at least one.")
        self.texts, self.max_tokens, self.batch_size = list(texts), max_tokens, batch_size
        self.name = f"{name} ({len(texts)} texts)"
        self.cut = 0

    def batches(self, model: HeadedModel) -> list[Batch]:
        """See :class:`Task`."""
        found, self.cut = [], 0
        for first in range(0, len(self.texts), self.batch_size):
            texts = self.texts[first : first + self.batch_size]
            inputs = model.tokenize(texts)
            too_long = int((inputs["attention_mask"].sum(1) > self.max_tokens).sum())
            if too_long:  # cut by the tokenizer, before it pads: some pad on the left
                inputs = model.tokenize(texts, truncation=True, max_length=self.max_tokens)
                self.cut += too_long
            found.append(Batch(inputs, {}, len(inputs["input_ids"])))
        return found

    def predict(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Mean log-likelihood of each text's tokens after the first."""
        if getattr(outputs, "logits", None) is None:
            raise InputError(
                "NextToken needs logits: load the model with its language-model head, load(name, lm_head=True)."
            )
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        logp = torch.log_softmax(outputs.logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        counted = (mask[:, 1:] * mask[:, :-1]).to(logp.dtype)
        return (logp * counted).sum(1) / counted.sum(1).clamp(min=1)

    def loss(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Negative log-likelihood a token."""
        return -predictions

    def quality(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        """Mean log-likelihood a token."""
        return float(predictions[rows].mean())


class FunctionTask(Task):
    """A task made of ready batches and a function, for anything else.

    Args:
        batches: as the model takes them.
        predict: ``predict(outputs, batch) -> [examples]``, higher is better; the loss is its negative.
        name: of the task.
        metric: of the mean prediction.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        predict: Callable[[Any, Batch], torch.Tensor],
        name: str = "task",
        metric: str = "mean",
    ) -> None:
        self._batches, self._predict, self.name, self.metric = list(batches), predict, name, metric

    def batches(self, model: HeadedModel) -> list[Batch]:
        """As they were given."""
        return self._batches

    def predict(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """By the given function."""
        return self._predict(outputs, batch)

    def loss(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The prediction's negative."""
        return -predictions

    def quality(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        """The mean prediction."""
        return float(predictions[rows].mean())


def task_for(model: HeadedModel, data: str | None = None, *, limit: int = 200, seed: int = 0) -> Task:
    """The task of a named data set for a model: sentence similarity for encoders, next token for decoders.

    Args:
        model: what it is for; one that gives logits is a decoder.
        data: "sts-2012" to "sts-2015", "ag-news" or a file with one text a line; None takes sts-2015 for an encoder
            and ag-news for a decoder.
        limit: pairs, chosen at random, or texts, from the beginning.

    Raises:
        InputError: texts without gold scores for an encoder.
    """
    from polyhead.data import load_sts, load_texts

    if getattr(model.module, "lm_head", None) is not None:
        name = data or "ag-news"
        return NextToken(load_texts(name, limit), name)
    name = data or "sts-2015"
    if not name.startswith("sts-"):
        raise InputError(
            f"'{model.name}' gives no logits, so its task is sentence similarity: '{name}' has no graded pairs; "
            "expected sts-2012 to sts-2015."
        )
    return PairSimilarity(load_sts(int(name[4:])).sample(limit, seed))
