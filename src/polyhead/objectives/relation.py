"""What is known of pairs: how much each counts as positive and as negative, its grade, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.errors import InputError

__all__ = ["Relation"]


@dataclass(frozen=True)
class Relation:
    """A row an anchor, a column something it is compared with.

    Both matrices say *how many times* a pair counts: 1 once, 0 not at all, 0.3 as three tenths of a pair. A pair that
    counts as neither is ignored; one that was mixed of a positive and a negative counts partly as each. Miners set
    weights to 0, weightings scale them, and every loss reads them the same way.

    Attributes:
        positive: ``[n, m]`` float (at least 0) or bool.
        negative: ``[n, m]`` float (at least 0) or bool.
        grades: ``[n, m]`` how alike people find each pair, NaN where nobody said; or None.
        triplets: ``[t, 3]`` rows ``(anchor, positive column, negative column)`` where a miner chose triplets; or None.
        paired: the i-th row is compared with the i-th of the others only: all matrices are ``[n, 1]``.

    Example:
        >>> import torch
        >>> from polyhead.objectives import Relation
        >>> relation = Relation.from_labels(torch.tensor([0, 0, 1]))
        >>> relation.positive.int().tolist()
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
        >>> relation.negative.int().tolist()
        [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    """

    positive: Tensor
    negative: Tensor
    grades: Tensor | None = None
    triplets: Tensor | None = None
    paired: bool = False

    def __post_init__(self) -> None:
        shapes = {tuple(part.shape) for part in (self.positive, self.negative, self.grades) if part is not None}
        if len(shapes) != 1 or self.positive.ndim != 2:
            raise InputError(f"A relation needs matrices of one shape [n, m], got {sorted(shapes)}.")

    @classmethod
    def from_labels(cls, labels: Tensor, other: Tensor | None = None) -> Relation:
        """Same label: positive; another label: negative.

        Args:
            labels: ``[n]`` integers of the anchors.
            other: ``[m]`` of what they are compared with; None where that is the batch itself, in which case nothing
                is compared with itself.
        """
        if labels.ndim != 1 or (other is not None and other.ndim != 1):
            raise InputError(f"Labels are one integer a vector, [n]; got shape {tuple(labels.shape)}.")
        same = labels[:, None] == (labels if other is None else other)[None, :]
        differs = ~same
        if other is None:
            same = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        return cls(same, differs)

    @classmethod
    def diagonal(cls, n: int, m: int | None = None, *, device: torch.device | str = "cpu") -> Relation:
        """The i-th of the others is the i-th anchor's positive, the rest are negatives (columns past ``n`` too)."""
        m = n if m is None else m
        if m < n:
            raise InputError(f"{n} anchors need at least {n} others, one positive each; got {m}.")
        same = torch.zeros(n, m, dtype=torch.bool, device=device)
        same.fill_diagonal_(True)
        return cls(same, ~same)

    @classmethod
    def from_pairs(
        cls, shape: tuple[int, int], positive: Tensor, negative: Tensor | None = None, *, itself: bool = False
    ) -> Relation:
        """Listed pairs are positive; listed pairs, or all others, negative.

        Args:
            shape: ``(n, m)``.
            positive: ``[p, 2]`` rows and columns.
            negative: ``[q, 2]``, what is in neither list is ignored; None: all that is not positive.
            itself: the anchors are compared with themselves, so the diagonal is ignored.
        """
        positives = torch.zeros(shape, dtype=torch.bool, device=positive.device)
        positives[positive[:, 0], positive[:, 1]] = True
        if negative is None:
            negatives = ~positives
        else:
            negatives = torch.zeros_like(positives)
            negatives[negative[:, 0], negative[:, 1]] = True
        relation = cls(positives, negatives)
        return relation.ignore(torch.eye(*shape, dtype=torch.bool, device=positive.device)) if itself else relation

    @classmethod
    def graded(cls, grades: Tensor, *, low: float | None = None, high: float | None = None) -> Relation:
        """Pairs with a grade. Losses for grades take them as they are; to others a pair counts partly as each.

        Args:
            grades: ``[n]``, of the i-th anchor with the i-th other; or ``[n, m]`` with NaN where unknown.
            low, high: grades that count as wholly negative and wholly positive; by default the ends of these grades.
        """
        matrix = grades[:, None] if grades.ndim == 1 else grades
        matrix = matrix if matrix.is_floating_point() else matrix.float()
        known = ~matrix.isnan()
        if not known.any():
            raise InputError("No grade is given: all are NaN.")
        low = float(matrix[known].min()) if low is None else low
        high = float(matrix[known].max()) if high is None else high
        share = ((matrix - low) / (high - low if high > low else 1.0)).clamp(0, 1)
        positive = torch.where(known, share, torch.zeros_like(share))
        negative = torch.where(known, 1 - share, torch.zeros_like(share))
        return cls(positive, negative, grades=matrix, paired=grades.ndim == 1)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, m)``."""
        return self.positive.shape[0], self.positive.shape[1]

    @property
    def is_positive(self) -> Tensor:
        """``[n, m]`` bool."""
        return self.positive > 0

    @property
    def is_negative(self) -> Tensor:
        """``[n, m]`` bool."""
        return self.negative > 0

    @property
    def transposed(self) -> Relation:
        """The same pairs seen from the other side; chosen triplets are dropped, for they have one anchor each."""
        grades = None if self.grades is None else self.grades.T
        return Relation(self.positive.T, self.negative.T, grades)

    def ignore(self, pairs: Tensor) -> Relation:
        """Without the pairs that are true in ``pairs [n, m]``: neither positive, negative nor graded."""
        grades = None if self.grades is None else self.grades.masked_fill(pairs, float("nan"))
        found = Relation(self.positive * ~pairs, self.negative * ~pairs, grades, paired=self.paired)
        return replace(found, triplets=self._left(found))

    def only(self, positive: Tensor | None = None, negative: Tensor | None = None) -> Relation:
        """Keep the positives and negatives that are true in the matrices given; those not given are left alone."""
        found = Relation(
            self.positive if positive is None else self.positive * positive,
            self.negative if negative is None else self.negative * negative,
            self.grades,
            paired=self.paired,
        )
        return replace(found, triplets=self._left(found))

    def _left(self, fewer: Relation) -> Tensor | None:
        """The chosen triplets of which both pairs are left."""
        if self.triplets is None:
            return None
        a, p, n = self.triplets.T
        return self.triplets[fewer.is_positive[a, p] & fewer.is_negative[a, n]]

    def weigh(self, positive: Tensor | float = 1.0, negative: Tensor | float = 1.0) -> Relation:
        """Weights times those given (numbers, or ``[n, m]``, ``[n, 1]``, ``[1, m]``), at least 0."""
        return replace(self, positive=self.positive * positive, negative=self.negative * negative)

    def as_grades(self) -> Tensor:
        """Grades ``[n, m]``: those given, else 1 for positives, 0 for negatives and NaN for ignored pairs."""
        if self.grades is not None:
            return self.grades
        known = self.is_positive | self.is_negative
        share = self.positive / (self.positive.float() + self.negative.float()).clamp(min=1e-12)
        return share.masked_fill(~known, float("nan"))
