"""Group generalised mean: one learned exponent for each group of channels (GGeM)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler

__all__ = ["GGeMPooler"]

_SIGNED = ("clamp", "shift", "power")
_LEAST = 1e-2  # of an exponent; at 0 the formula has no value


@paper("ggem")
class GGeMPooler(Pooler):
    """``y_c = (mean_t x_tc^p_g)^(1/p_g)``, one exponent ``p_g`` a group of channels (arXiv 2212.04114).

    With ``p = 1`` it is the mean, with a large ``p`` the maximum; one group is GeM, ``dim`` groups give each channel
    its own exponent, and as many groups as the model has heads are the paper's choice. The formula wants positive
    states, which images after ReLU have and texts have not; ``signed`` says what happens to the others:

    - "clamp": they count as ``eps``, as in the paper;
    - "shift": each text's channels are moved by their least value and the result moved back;
    - "power": ``sign(x) |x|^p`` inside, the signed root outside.

    Args:
        dim: of the states.
        groups: how many; divides ``dim``.
        p: the exponents at first.
        eps: least value that is raised to a power.
        signed: see above.

    Raises:
        InputError: ``groups`` does not divide ``dim``, an exponent or ``eps`` of 0 and less, an unknown ``signed``.

    Attributes:
        exponents: ``[groups]``, learned; a vector over heads where groups are heads.

    Example:
        >>> import torch
        >>> from polyhead.pooling import GGeMPooler
        >>> states = torch.tensor([[[3.0, 1.0], [4.0, 7.0]]])
        >>> [round(value, 2) for value in GGeMPooler(2, groups=1, p=2.0)(states, torch.ones(1, 2))[0].tolist()]
        [3.54, 5.0]
    """

    knobs = ("dim", "groups", "p", "eps", "signed")

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        p: float = 3.0,
        eps: float = 1e-6,
        signed: Literal["clamp", "shift", "power"] = "clamp",
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise InputError(f"{groups} groups do not divide a state of {dim} numbers; give a divisor of it.")
        if p < _LEAST or eps <= 0:
            raise InputError(f"p = {p} and eps = {eps}, expected p of at least {_LEAST} and eps above 0.")
        if signed not in _SIGNED:
            raise InputError(f"signed = {signed!r}, expected one of {', '.join(_SIGNED)}.")
        self.dim, self.groups, self.p, self.eps, self.signed = dim, groups, p, eps, signed
        self.exponents = nn.Parameter(torch.full((groups,), float(p)))

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        kept = counted.unsqueeze(-1)
        states = states.masked_fill(~kept, 0.0)
        exponents = self.exponents.clamp(min=_LEAST).repeat_interleave(self.dim // self.groups).to(states.dtype)
        if self.signed == "power":
            pooled = self._signed_power(states, kept, exponents)
        elif self.signed == "shift":
            least = states.masked_fill(~kept, torch.finfo(states.dtype).max).amin(1, keepdim=True)
            pooled = self._power(states - least + self.eps, kept, exponents) + least.squeeze(1) - self.eps
        else:
            pooled = self._power(states, kept, exponents)
        return pooled.masked_fill(~counted.any(dim=1, keepdim=True), 0.0)

    def _power(self, states: Tensor, kept: Tensor, exponents: Tensor) -> Tensor:
        """Generalised mean of what is at least ``eps``, in logarithms, so that large exponents do not overflow."""
        terms = states.clamp(min=self.eps).log() * exponents
        lowest = torch.finfo(states.dtype).min
        count = kept.sum(1).clamp(min=1).to(states.dtype)
        return ((terms.masked_fill(~kept, lowest).logsumexp(1) - count.log()) / exponents).exp()

    def _signed_power(self, states: Tensor, kept: Tensor, exponents: Tensor) -> Tensor:
        # In parts of the largest magnitude, which cancels out and keeps powers within 1.
        scale = states.abs().amax(1, keepdim=True).clamp(min=self.eps)
        powers = states.sign() * (states.abs() / scale).clamp(min=self.eps) ** exponents
        mean = powers.masked_fill(~kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)
        return scale.squeeze(1) * mean.sign() * mean.abs().clamp(min=self.eps) ** (1 / exponents)
