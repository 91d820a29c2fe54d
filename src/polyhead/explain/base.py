"""The contract of explanations: one score a token of one text, for one answer of a model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Attribution", "Attributor", "ClassReadout", "NextTokenReadout", "Readout"]


@dataclass(eq=False)
class Attribution:
    """How much each token of one text mattered for one answer.

    Args:
        tokens: ``[n]`` as written.
        scores: ``[n]`` float; higher means the token speaks more for the target. NaN where a token is not judged, such
            as one the tokenizer added; such a token is never removed by the metrics nor spoken of in words.
        target: what is explained: the predicted word, or the class.
        method: that gave the scores.

    Raises:
        InputError: not one score a token.

    Example:
        >>> found = Attribution(["A", "rose", "is", "a"], [0.1, 0.7, 0.15, 0.05], target="flower")
        >>> found.top(2), found.rank(1)
        ([1, 2], 1)
    """

    tokens: Sequence[str]
    scores: np.ndarray
    target: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.scores = np.array(self.scores, dtype=np.float64)
        if self.scores.shape != (len(self.tokens),):
            raise InputError(
                f"An attribution needs one score a token: {len(self.tokens)} tokens were given with scores of shape "
                f"{list(self.scores.shape)}."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def judged(self) -> np.ndarray:
        """Boolean ``[n]``, True where a token has a score."""
        return np.isfinite(self.scores)

    def top(self, k: int) -> list[int]:
        """Positions of the ``k`` highest scores, best first, ties to the earlier token; all where fewer are judged."""
        order = np.argsort(-np.where(self.judged, self.scores, -np.inf), kind="stable")
        return [int(i) for i in order[: min(k, int(self.judged.sum()))]]

    def rank(self, position: int) -> int:
        """1 for the highest score; equal scores share the middle of their ranks, rounded up.

        Raises:
            InputError: a token that is not judged.
        """
        if not 0 <= position < len(self) or not self.judged[position]:
            raise InputError(f"Token {position} of {len(self)} has no score, so it has no rank.")
        known, own = self.scores[self.judged], self.scores[position]
        return int((known > own).sum() + (int((known == own).sum()) + 2) // 2)

    def words(self, text: str, offsets: Sequence[tuple[int, int]]) -> Attribution:
        """The same by whole words: the pieces of a word are added up.

        Args:
            text: that was tokenized.
            offsets: ``[n]`` of (start, end) of each token in it, as a fast tokenizer gives them.

        Raises:
            InputError: not one offset a token.
        """
        if len(offsets) != len(self):
            raise InputError(f"{len(offsets)} offsets were given for {len(self)} tokens; expected one each.")
        words: list[str] = []
        scores: list[float] = []
        end = -1
        for (first, last), score in zip(offsets, self.scores, strict=True):
            piece = text[first:last]
            first += len(piece) - len(piece.lstrip())
            if first >= last or not np.isfinite(score):
                continue
            if first == end and text[first].isalnum() and words[-1][-1:].isalnum():
                words[-1] += text[first:last]
                scores[-1] += float(score)
            else:
                words.append(text[first:last].strip())
                scores.append(float(score))
            end = last
        return replace(self, tokens=words, scores=np.array(scores))


class Readout(ABC):
    """What is explained: the probabilities a model gives, from tokens or from their embeddings.

    All rows of a call have the same length, without padding: an explanation looks at one text and changed copies of it.

    Args:
        model: that answers.
        batch_size: rows in one forward pass.
    """

    def __init__(self, model: HeadedModel, batch_size: int = 32) -> None:
        self.model, self.batch_size = model, batch_size

    @abstractmethod
    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """``[rows, classes]`` float32 from ``input_ids`` or ``inputs_embeds``, part of the autograd graph."""

    @abstractmethod
    def reads(self, tokens: int) -> torch.Tensor:
        """Weights ``[tokens]`` of the token states that the answer is read from; they sum to 1."""

    @abstractmethod
    def name_of(self, target: int) -> str:
        """The class in words."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings ``[..., hidden]`` as the model itself takes them."""
        embeddings: Any = self.model.module.get_input_embeddings()  # type: ignore[operator]
        return embeddings(ids.to(self.model.device))

    def probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """``[rows, classes]`` float32 of token ids ``[rows, tokens]``."""
        return self._batched("input_ids", ids)

    def from_states(self, states: torch.Tensor) -> torch.Tensor:
        """``[rows, classes]`` float32 of embeddings ``[rows, tokens, hidden]``."""
        return self._batched("inputs_embeds", states)

    def probability_of(self, target: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function ``ids [rows, tokens] -> [rows]`` that the faithfulness metrics take."""
        return lambda ids: self.probabilities(ids)[:, target]

    def _batched(self, key: str, rows: torch.Tensor) -> torch.Tensor:
        if rows.dim() < 2 or rows.shape[1] == 0:
            raise InputError(f"A readout takes rows of at least one token, got the shape {list(rows.shape)}.")
        found = []
        with torch.inference_mode():
            for first in range(0, len(rows), self.batch_size):
                some = rows[first : first + self.batch_size].to(self.model.device)
                found.append(torch.softmax(self.logits(**{key: some}), -1))
        return torch.cat(found)


class NextTokenReadout(Readout):
    """The next token of a text, by a causal model with its language-model head.

    Raises:
        InputError: a model that attends in both directions; one without a language-model head when it is called.
    """

    def __init__(self, model: HeadedModel, batch_size: int = 32) -> None:
        super().__init__(model, batch_size)
        if not all(getattr(layer.module, "is_causal", True) for layer in model.attention_layers):
            raise InputError(f"'{model.name}' attends in both directions; a next token needs a causal decoder.")
        parameters = inspect.signature(model.module.forward).parameters
        self._few = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """See :class:`Readout`; classes are the vocabulary."""
        logits = getattr(self.model(**inputs, use_cache=False, **self._few), "logits", None)
        if logits is None:
            raise InputError(f"'{self.model.name}' gives no logits: load it with load(name, lm_head=True).")
        return logits[:, -1].float()

    def reads(self, tokens: int) -> torch.Tensor:
        """The last token alone."""
        return torch.nn.functional.one_hot(torch.tensor(tokens - 1), tokens).float()

    def name_of(self, target: int) -> str:
        """The token as written; its number where the model has no tokenizer."""
        if self.model.files is None:
            return str(target)
        return str(self.model.tokenizer.decode([target])).strip()


class ClassReadout(Readout):
    """Classes by a linear classifier on the mean of an encoder's token states.

    Args:
        model: an encoder.
        weight: ``[classes, hidden]``.
        bias: ``[classes]``.
        names: of the classes.
        batch_size: rows in one forward pass.
    """

    def __init__(
        self,
        model: HeadedModel,
        weight: torch.Tensor,
        bias: torch.Tensor,
        names: Sequence[str],
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, batch_size)
        if weight.dim() != 2 or len(weight) != len(bias) or len(weight) != len(names):
            raise InputError(
                f"A classifier of {len(names)} named classes needs weights [{len(names)}, hidden] and as many biases, "
                f"got {list(weight.shape)} and {list(bias.shape)}."
            )
        self.weight, self.bias, self.names = weight, bias, list(names)

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """See :class:`Readout`."""
        states = self.model(**inputs).last_hidden_state.float()
        return states.mean(1) @ self.weight.to(states).T + self.bias.to(states)

    def reads(self, tokens: int) -> torch.Tensor:
        """All tokens alike."""
        return torch.full((tokens,), 1 / tokens)

    def name_of(self, target: int) -> str:
        """The class's name."""
        return self.names[target]


@dataclass
class Attributor(ABC):
    """A way to score the tokens of one text: a dataclass of knobs with one method.

    Example:
        >>> from polyhead.explain.baselines import LeaveOneOut
        >>> model = load("gemma-3-270m", lm_head=True)
        >>> found = LeaveOneOut().text(NextTokenReadout(model), "The key is in the drawer. Yes, the key is in the")
        >>> found.target, found.tokens[found.top(1)[0]]
        ('drawer', ' drawer')
    """

    name = "attributor"

    @abstractmethod
    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """Scores ``[tokens]`` float64 of one text.

        Args:
            readout: what is explained.
            ids: ``[tokens]``.
            target: which class of it.
            judged: boolean ``[tokens]``, False for tokens to leave alone, whose score is NaN; None judges all.
        """

    def text(self, readout: Readout, text: str, target: int | None = None) -> Attribution:
        """Scores of a text's tokens for a class, the likeliest where none is given.

        Tokens that stand for no text, such as those the tokenizer adds by itself, have no score.
        """
        model = readout.model
        ids = torch.tensor(model.tokenizer(text, truncation=True)["input_ids"], device=model.device)
        if target is None:
            target = int(readout.probabilities(ids[None])[0].argmax())
        judged = ~np.isin(ids.cpu().numpy(), model.tokenizer.all_special_ids)
        scores = self.attribute(readout, ids, target, judged)
        tokens = [model.tokenizer.decode([i]) for i in ids.tolist()]
        return Attribution(tokens, scores, readout.name_of(target), self.name)
