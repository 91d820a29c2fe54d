"""Vectors that may be cut: in width (Matryoshka), and in depth too (2DMSE, Starbucks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.training.calls import Wrapper, embedding_loss
from polyhead.training.layers import LayerObjective

__all__ = ["Matryoshka", "Starbucks", "TwoDMatryoshka", "truncated"]


def truncated(vectors: Tensor, dim: int) -> Tensor:
    """The first ``dim`` coordinates of ``vectors [..., d]``, at length 1.

    Raises:
        InputError: more than there are.
    """
    if not 1 <= dim <= vectors.shape[-1]:
        raise InputError(f"Vectors of {vectors.shape[-1]} cannot be cut to {dim}: give 1 to {vectors.shape[-1]}.")
    return nn.functional.normalize(vectors[..., :dim], dim=-1)


class Matryoshka(Wrapper):
    """The objective at several widths at once: ``sum_d w_d L(first d coordinates)`` (arXiv 2205.13147).

    Cut vectors are brought to length 1 before they are compared. The values are those of sentence-transformers'
    ``MatryoshkaLoss``.

    Args:
        objective: any objective or loss without parameters of one width.
        dims: widths; name the full one too, or it is not trained.
        weights: of each; None: 1.

    Raises:
        InputError: no widths, or other than one weight for each.

    Example:
        >>> import torch
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import Matryoshka
        >>> objective = Matryoshka(InfoNCE(), dims=(2, 4, 8))
        >>> objective(torch.eye(8), other=torch.eye(8)).ndim
        0
    """

    def __init__(self, objective: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None) -> None:
        super().__init__(objective)
        if not dims or (weights is not None and len(weights) != len(dims)):
            raise InputError(f"Widths {list(dims)} and weights {weights}: give at least one width, and a weight each.")
        self.dims = tuple(int(dim) for dim in dims)
        self.weights = (1.0,) * len(self.dims) if weights is None else tuple(float(each) for each in weights)

    def forward(self, embeddings: Tensor, relation: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        """The objective; arguments as of :class:`~polyhead.objectives.Objective`, labels or scores as ``relation``."""
        return self.of(embeddings, *([] if other is None else [other]), labels=relation)

    def of(self, *columns: Tensor, labels: Tensor | None = None) -> Tensor:
        """The objective of columns of vectors ``[batch, dim]``."""
        total = columns[0].sum() * 0
        for dim, weight in zip(self.dims, self.weights, strict=True):
            cut = [truncated(vectors, dim) for vectors in columns]
            total = total + weight * embedding_loss(self.objective, cut, labels)
        return total


def _follow(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """``t KL(softmax(teacher / t) || softmax(student / t))`` over coordinates, mean over texts; teacher fixed."""
    to = (torch.cat(list(teacher)).detach() / temperature).log_softmax(-1)
    own = (torch.cat(list(student)) / temperature).log_softmax(-1)
    return temperature * nn.functional.kl_div(own, to, reduction="batchmean", log_target=True)


@paper("2dmse")
class TwoDMatryoshka(LayerObjective):
    """2D Matryoshka sentence embeddings: each step trains the last layer and ``draws`` random earlier ones, at all
    widths, and pulls the earlier ones to the last.

    ``L = M(last) + prior_weight mean_n M(n) + kl_weight sum_n t KL(softmax(v_last / t) || softmax(v_n / t))`` with
    ``M`` the :class:`Matryoshka` objective and softmax over the coordinates of a vector, the last layer's held fixed.
    The values are those of sentence-transformers' ``Matryoshka2dLoss`` with the same layers and widths.

    Args:
        objective: any objective or loss.
        dims: widths trained.
        layers: earlier layers to draw from; None: all but the last, the embeddings (layer 0) left out.
        draws: how many of them a step; None: all.
        prior_weight: of the earlier layers' losses.
        kl_weight: of the pull to the last layer; 0: none.
        temperature: ``t``.

    Example:
        >>> import torch
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import TwoDMatryoshka
        >>> objective = TwoDMatryoshka(InfoNCE(), dims=(4, 8), draws=None)
        >>> objective.draw(depth=3)
        [3, 1, 2]
    """

    def __init__(
        self,
        objective: nn.Module,
        dims: Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        draws: int | None = 1,
        prior_weight: float = 1.0,
        kl_weight: float = 1.0,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(Matryoshka(objective, dims))
        if temperature <= 0 or (draws is not None and draws < 1):
            raise InputError(f"temperature {temperature} and draws {draws}: expected both above 0.")
        self.layers = None if layers is None else tuple(layers)
        self.draws = draws
        self.prior_weight = prior_weight
        self.kl_weight = kl_weight
        self.temperature = temperature

    def draw(self, depth: int) -> list[int]:
        """The last layer, then the earlier ones of this step, by torch's random numbers."""
        earlier = list(range(1, depth)) if self.layers is None else list(self.layers)
        if any(not 0 <= layer < depth for layer in earlier):
            raise InputError(f"Layers {earlier} are to be trained beside the last; the model has {depth}.")
        if self.draws is not None and self.draws < len(earlier):
            earlier = [earlier[i] for i in torch.randperm(len(earlier))[: self.draws].tolist()]
        return [depth, *earlier]

    def forward(self, layered: Sequence[Mapping[int, Tensor]], labels: Tensor | None = None) -> Tensor:
        """See :class:`LayerObjective`."""
        last, *earlier = layered[0]
        matryoshka = self.objective
        assert isinstance(matryoshka, Matryoshka)
        teacher = [column[last] for column in layered]
        total = matryoshka.of(*teacher, labels=labels)
        for layer in earlier:
            vectors = [column[layer] for column in layered]
            total = total + self.prior_weight / len(earlier) * matryoshka.of(*vectors, labels=labels)
            if self.kl_weight:
                total = total + self.kl_weight * _follow(vectors, teacher, self.temperature)
        return total


@paper("starbucks")
class Starbucks(LayerObjective):
    """Starbucks: a fixed ladder of (layer, width), all of it trained in every step, each rung pulled to the top.

    ``L = mean_(n, d) L(v_n[:d]) + kl_weight mean_(n, d) t KL(softmax(v_N[:d] / t) || softmax(v_n[:d] / t))``, the top
    ``v_N`` held fixed. The paper's pretraining is :class:`~polyhead.training.LadderAutoencoder`.

    Args:
        objective: any objective or loss.
        sizes: ``(layer, width)`` from small to large; the last must be the whole model.
        kl_weight: of the pull to the top; 0: none.
        temperature: ``t``.

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import Starbucks
        >>> ladder = Starbucks(InfoNCE(), sizes=[(1, 64), (2, 128), (4, 256), (6, 384)])
        >>> ladder.draw(depth=6)
        [6, 1, 2, 4]
    """

    def __init__(
        self,
        objective: nn.Module,
        sizes: Sequence[tuple[int, int]],
        *,
        kl_weight: float = 1.0,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(objective)
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise InputError(f"sizes is {list(sizes)}: expected (layer, width) from small to large, none twice.")
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}: expected above 0.")
        self.sizes = [(int(layer), int(width)) for layer, width in sizes]
        self.kl_weight, self.temperature = kl_weight, temperature

    def draw(self, depth: int) -> list[int]:
        """All layers of the ladder, the top one first."""
        if self.sizes[-1][0] != depth:
            raise InputError(f"The ladder ends at layer {self.sizes[-1][0]}; the model has {depth}: end it there.")
        return [depth, *dict.fromkeys(layer for layer, _ in self.sizes if layer != depth)]

    def forward(self, layered: Sequence[Mapping[int, Tensor]], labels: Tensor | None = None) -> Tensor:
        """See :class:`LayerObjective`."""
        top = self.sizes[-1][0]
        losses, pulls = [], []
        for layer, width in self.sizes:
            vectors = [truncated(column[layer], width) for column in layered]
            losses.append(embedding_loss(self.objective, vectors, labels))
            if self.kl_weight and layer != top:
                teacher = [column[top][..., :width] for column in layered]
                pulls.append(_follow([column[layer][..., :width] for column in layered], teacher, self.temperature))
        total = torch.stack(losses).mean()
        return total + self.kl_weight * torch.stack(pulls).mean() if pulls else total
