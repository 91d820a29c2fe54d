"""Heads of a circuit from a few examples, without ablation: codes of a small sparse autoencoder (sae-circuits).

Positive examples need the circuit, negative ones are alike and cannot use it. Every head's output at the deciding token
is encoded by one sparse autoencoder, and its code is the number of the feature that fires most. Heads with codes that
occur on positives and never on negatives belong to the circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = [
    "CircuitExamples",
    "DiscreteCircuit",
    "DiscreteSAECircuit",
    "PairScore",
    "Roc",
    "head_vectors",
    "mean_difference",
]

Inputs = dict[str, torch.Tensor]
Where = Literal["last", "mean"]


@dataclass(frozen=True)
class CircuitExamples:
    """Positive and negative examples, five to ten of each or more: lists of texts, or one batch of inputs each."""

    positive: Sequence[str] | Inputs
    negative: Sequence[str] | Inputs


class PairScore(NamedTuple):
    """Two heads, ``(layer, head)``, the earlier first, and how many pairs of codes only positives have."""

    first: tuple[int, int]
    second: tuple[int, int]
    score: float


class Roc(NamedTuple):
    """Receiver operating characteristic: false and true positive rates as the threshold falls, and the area."""

    false_positive: np.ndarray
    true_positive: np.ndarray
    area: float

    @classmethod
    def of(cls, scores: np.ndarray, truth: np.ndarray) -> Roc:
        """Of any scores against a boolean truth; equal scores are passed at once.

        Raises:
            InputError: a truth of another shape, or with no head in or out of the circuit.
        """
        truth = np.asarray(truth, dtype=bool)
        if truth.shape != scores.shape or truth.all() or not truth.any():
            raise InputError(
                f"The circuit has the shape {list(truth.shape)} and {int(truth.sum())} heads; expected "
                f"{list(scores.shape)}, with at least one head in it and one that is not."
            )
        levels = np.unique(scores)[::-1]
        hits = np.array([0.0, *((scores[truth] >= level).mean() for level in levels)])
        false = np.array([0.0, *((scores[~truth] >= level).mean() for level in levels)])
        return cls(false, hits, float(np.trapezoid(hits, false)))


@paper("sae-circuits")
@dataclass(frozen=True)
class DiscreteCircuit:
    """What was found.

    Attributes:
        positive, negative: codes ``[examples, layers, heads]``: features, or ``n_features`` where none fires.
        unique: ``[layers, heads]`` codes of each head that only positives have, of all its codes where normalised.
        pairs: ``[layers, heads, layers, heads]`` pairs of codes that occur together on positives only; symmetric,
            0 for a head with itself.
        loss: of the autoencoder, at each step.
        model: name.
    """

    positive: np.ndarray
    negative: np.ndarray
    unique: np.ndarray
    pairs: np.ndarray
    loss: np.ndarray = field(repr=False)
    model: str = ""

    @property
    def map(self) -> HeadMap:
        """Softmax of ``unique`` over all heads: the node scores."""
        return self._map(_softmax(self.unique))

    def by_pairs(self, k: int | None = None) -> HeadMap:
        """How often each head stands in the ``k`` strongest pairs (as many as half the square of heads where None)."""
        layers, heads = self.unique.shape
        count = layers * heads
        chosen = self.edges(max(1, count * count // 4) if k is None else k)
        values = np.zeros((layers, heads))
        for pair in chosen:
            values[pair.first] += 1
            values[pair.second] += 1
        return self._map(_softmax(values))

    def edges(self, k: int = 10) -> tuple[PairScore, ...]:
        """The ``k`` strongest pairs of heads; those without a pair of codes of their own are left out."""
        heads = self.unique.shape[1]
        count = self.unique.size
        flat = np.triu(self.pairs.reshape(count, count), 1).ravel()
        best = [int(i) for i in np.argsort(-flat, kind="stable")[:k] if flat[i] > 0]
        places = [divmod(i, count) for i in best]
        return tuple(
            PairScore(divmod(a, heads), divmod(b, heads), float(flat[i]))
            for i, (a, b) in zip(best, places, strict=True)
        )

    def circuit(self, threshold: float) -> list[tuple[int, int]]:
        """Heads whose node score is above a threshold, best first."""
        found = self.map
        return found.top(int((found.values > threshold).sum()))

    def roc(self, truth: np.ndarray) -> Roc:
        """How well node scores tell the heads of a known circuit, boolean ``[layers, heads]``, from the others."""
        return Roc.of(self.unique, truth)

    def _map(self, values: np.ndarray) -> HeadMap:
        data = f"{len(self.positive)} positive, {len(self.negative)} negative examples"
        return HeadMap(values, DiscreteSAECircuit.name, self.model, data, DiscreteSAECircuit.higher_means)


@paper("sae-circuits")
@dataclass
class DiscreteSAECircuit(Score):
    """Circuit heads by the codes of a sparse autoencoder (O'Neill and Bui 2024).

    With one autoencoder for all heads, ``c = relu(E (x - b) + e)`` and ``x^ = D c + b`` (rows of E and columns of D of
    length 1), trained on ``|x - x^|^2 / dim + l1 |c|_1``, the code is argmax c, and a head's score is the number of its
    codes on positives that it never has on negatives. Head outputs are divided by the root mean square of them all, so
    that ``l1`` means the same in every model.

    Args:
        n_features: of the autoencoder.
        l1: weight of sparsity.
        steps: of Adam, over all examples at once.
        learning_rate: of Adam.
        normalise: divide a head's count by the number of its codes.
        where: head outputs at the "last" token (the deciding one), or the "mean" over an example's tokens.
        seed: of the autoencoder's first weights.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> examples = CircuitExamples(["one two one", "cat dog cat"], ["one two six", "cat dog hen"])
        >>> DiscreteSAECircuit(steps=20).score(model, examples).shape
        (6, 12)
    """

    n_features: int = 100
    l1: float = 0.02
    steps: int = 300
    learning_rate: float = 3e-3
    normalise: bool = False
    where: Where = "last"
    seed: int = 0

    name: ClassVar[str] = "sae-circuit"
    summary: ClassVar[str] = "codes of a small sparse autoencoder that a head has on positive examples only"
    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "more codes that only positive examples have"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data are :class:`CircuitExamples`."""
        return self.find(model, data).map

    def find(self, model: HeadedModel, data: Any) -> DiscreteCircuit:
        """The circuit with its codes and pairs."""
        if not isinstance(data, CircuitExamples):
            raise InputError(
                f"'{self.name}' was given {type(data).__name__}; expected CircuitExamples(positive, negative): texts "
                "that need the circuit and texts alike that cannot use it."
            )
        positive, negative = (head_vectors(model, given, self.where) for given in (data.positive, data.negative))
        return self.fit(positive, negative, model=model.name)

    def fit(self, positive: torch.Tensor, negative: torch.Tensor, *, model: str = "") -> DiscreteCircuit:
        """Train on head outputs ``[examples, layers, heads, dim]`` and count codes.

        Raises:
            InputError: other shapes, no examples, or outputs that are all 0.
        """
        if positive.dim() != 4 or positive.shape[1:] != negative.shape[1:] or not (len(positive) and len(negative)):
            raise InputError(
                f"Head outputs have the shapes {list(positive.shape)} and {list(negative.shape)}; expected "
                "[examples, layers, heads, dim] twice, with one example at least."
            )
        if self.n_features < 2 or self.steps < 1:
            raise InputError(f"n_features={self.n_features}, steps={self.steps}: expected at least 2 and 1.")
        both = torch.cat([positive, negative]).detach().float().cpu()
        size = both.square().mean().sqrt()
        if not float(size) > 0:
            raise InputError("All head outputs are 0: there is nothing to encode.")
        x = (both / size).flatten(0, 2)
        active, loss = self._encode(x)
        best = torch.where(active.amax(-1) > 0, active.argmax(-1), self.n_features)
        codes: np.ndarray = best.reshape(both.shape[:3]).numpy()
        mine, other = codes[: len(positive)], codes[len(positive) :]
        return DiscreteCircuit(mine, other, self._unique(mine, other), self._pairs(mine, other), loss, model)

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Activations ``[vectors, n_features]`` after training, and the loss on the way."""
        generator = torch.Generator().manual_seed(self.seed)
        encoder, decoder = (torch.randn(self.n_features, x.shape[1], generator=generator) for _ in range(2))
        learned = [encoder, decoder, torch.zeros(x.shape[1]), torch.zeros(self.n_features)]
        for tensor in learned:
            tensor.requires_grad_()
        optimizer, losses = torch.optim.Adam(learned, lr=self.learning_rate), []

        def encode() -> torch.Tensor:
            unit = torch.nn.functional.normalize(encoder, dim=1)
            return torch.relu((x - learned[2]) @ unit.T + learned[3])

        with torch.enable_grad():
            for _ in range(self.steps):
                active = encode()
                back = active @ torch.nn.functional.normalize(decoder, dim=1) + learned[2]
                loss = (back - x).square().mean() + self.l1 * active.sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return encode().detach(), np.array(losses)

    def _unique(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        found = np.zeros(positive.shape[1:])
        for layer, head in np.ndindex(found.shape):
            mine, other = set(positive[:, layer, head].tolist()), set(negative[:, layer, head].tolist())
            found[layer, head] = len(mine - other) / (len(mine | other) if self.normalise else 1)
        return found

    def _pairs(self, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        layers, heads = positive.shape[1], positive.shape[2]
        flat = [codes.reshape(len(codes), -1).astype(np.int64) for codes in (positive, negative)]
        count, base = layers * heads, self.n_features + 1
        found = np.zeros((count, count))
        for a in range(count):
            mine, other = (codes[:, a, None] * base + codes for codes in flat)  # [examples, heads], one number a pair
            for b in range(a + 1, count):
                first, second = set(mine[:, b].tolist()), set(other[:, b].tolist())
                found[a, b] = found[b, a] = len(first - second) / (len(first | second) if self.normalise else 1)
        return found.reshape(layers, heads, layers, heads)


def head_vectors(model: HeadedModel, examples: Sequence[str] | Inputs, where: Where = "last") -> torch.Tensor:
    """What each head adds to the residual stream, ``z_h W_O[h]``, ``[examples, layers, heads, hidden]`` float32.

    Args:
        model: any; layers with fewer heads than the widest give zeros.
        examples: texts, or one batch of inputs.
        where: at each example's last real token, or the mean over its real tokens.

    Raises:
        InputError: no examples, or another place.
    """
    if where not in ("last", "mean") or isinstance(examples, str) or not len(examples):
        raise InputError(
            f"head_vectors was given {type(examples).__name__}, where={where!r}; expected texts or inputs, "
            "and 'last' or 'mean'."
        )
    inputs = examples if isinstance(examples, dict) else model.tokenize(list(examples), truncation=True)
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, z: torch.Tensor) -> None:
        z = z.float() if z.dim() == 4 else z.float()[None]
        mask = inputs.get("attention_mask")
        real = torch.ones(z.shape[:2], device=z.device) if mask is None else mask.to(z)
        if where == "last":
            order = torch.arange(1, z.shape[1] + 1, device=z.device) * real
            real = torch.nn.functional.one_hot(order.argmax(1), z.shape[1]).to(z)
        share = real / real.sum(1, keepdim=True)
        read = torch.einsum("bt,bthd->bhd", share, torch.where(real[..., None, None] > 0, z, 0.0))
        found[layer] = torch.einsum("bhd,hdm->bhm", read, model.output_weight(layer).detach().float())

    with torch.no_grad(), model.tap_heads(keep):
        model(**inputs)
    rows = len(found[0])
    vectors = found[0].new_zeros(rows, model.layers, model.heads, model.hidden_size)
    for layer, value in found.items():
        vectors[:, layer, : value.shape[1]] = value
    return vectors


def mean_difference(positive: torch.Tensor, negative: torch.Tensor) -> np.ndarray:
    """The simple baseline, ``[layers, heads]``: distance between a head's mean outputs on the two kinds of examples."""
    return (positive.double().mean(0) - negative.double().mean(0)).norm(dim=-1).cpu().numpy()


def _softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    result: np.ndarray = raised / raised.sum()
    return result
