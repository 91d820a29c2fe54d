"""Mixture of attentive experts: every expert is all heads but one, and a gate says whom to trust with this text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape, Call, check_input, positions_of
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["BlockCoordinates", "MixtureOfAttentiveExperts", "text_responsibilities"]

_KEPT = "gated"


@paper("mae-heads")
class MixtureOfAttentiveExperts(Attention):
    """``sum_i g_i f_i`` with ``f_i = h / (h - 1) sum_{j != i} H_j W_j`` and ``g = softmax(MLP(mean of the tokens))``.

    A large ``g_i`` takes head ``i`` away: head ``j`` counts ``h / (h - 1) (1 - g_j)`` times. The gate starts uniform,
    which is plain attention, so ``from_mha`` starts as the trained layer. Where tokens see only what stands before
    them, each has a gate of its own, from the mean so far (ours); a step carries the sum.

    Args:
        shape: widths, of two heads or more.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        hidden: units of the gate; None for as many as features.
        use: "mixture", or "best": the expert with the largest ``g`` alone.

    Attributes:
        sampling: whether one expert, drawn from ``g``, stands for the mixture while training (see
            :class:`BlockCoordinates`).

    Raises:
        InputError: one head, no unit, or another ``use``.

    Source:
        mae-heads (Peng et al. 2020, section 3).

    Example:
        >>> import torch
        >>> layer, states = MixtureOfAttentiveExperts(AttentionShape(32, 4)), torch.randn(2, 5, 32)
        >>> layer(states).shape, layer.responsibilities(states)[0, 0].tolist()
        (torch.Size([2, 5, 32]), [0.25, 0.25, 0.25, 0.25])
    """

    name: ClassVar[str] = "mae-heads"
    summary: ClassVar[str] = "Experts of all heads but one, mixed by a gate on the text"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        hidden: int | None = None,
        use: Literal["mixture", "best"] = "mixture",
    ) -> None:
        units = shape.dim if hidden is None else hidden
        if shape.heads < 2 or units < 1 or use not in ("mixture", "best"):
            raise InputError(
                f"{shape.heads} heads, {units} units and use={use!r} were given; expected two heads or more, one unit "
                "or more, and 'mixture' or 'best'."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.use = use
        self.sampling = False
        last = nn.Linear(units, shape.heads)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.gate = nn.Sequential(nn.Linear(shape.dim, units), nn.Tanh(), last)

    def responsibilities(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, tokens, heads]`` of ``[batch, tokens, dim]``, rows that sum to 1; one row a text if not causal.

        Raises:
            InputError: other shapes.
        """
        check_input(hidden, padding, self.dim)
        if padding is not None:
            hidden = hidden.masked_fill(~padding[..., None], 0.0)
        places = positions_of(hidden, padding)
        return self._gates(Call(hidden, places, places, padding, self.causal))

    def output(self, heads: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads by how much the experts with them are trusted, projected."""
        gates = self._gates(call)
        if self.sampling and self.training:
            drawn = torch.multinomial(gates.detach().float().flatten(0, 1), 1).view(*gates.shape[:2])
            gates = nn.functional.one_hot(drawn, gates.shape[2]).to(gates.dtype)
        elif self.use == "best":
            gates = nn.functional.one_hot(gates.argmax(-1), gates.shape[2]).to(gates.dtype)
        count = gates.shape[2]
        share = (1 - gates) * (count / (count - 1))
        return super().output(heads * share.transpose(1, 2)[..., None].to(heads.dtype), call)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Keys, values, and the sum of tokens, in float32 at least."""
        return super().cache_bytes(tokens, itemsize) + self.dim * max(4, itemsize)

    def _gates(self, call: Call) -> torch.Tensor:
        hidden = call.hidden.to(torch.promote_types(call.hidden.dtype, torch.float32))
        if call.causal:
            total = hidden.cumsum(1)
            if call.before:
                total = total + call.before[_KEPT]
            call.after[_KEPT] = total[:, -1:].clone()
            mean = total / (call.q_positions[..., None] + 1)
        elif call.padding is not None:
            mean = hidden.sum(1, keepdim=True) / call.padding.sum(1).clamp_min(1)[:, None, None]
        else:
            mean = hidden.mean(1, keepdim=True)
        gates: torch.Tensor = self.gate(mean.to(call.hidden.dtype)).softmax(-1)
        return gates


@paper("mae-heads")
class BlockCoordinates:
    """Block coordinate descent for models with such layers: rounds that train gates, and rounds that train the rest.

    In a gate round only gates have gradients, under the full mixture. In an expert round gates are frozen and each
    layer runs one expert drawn from its gate, so that no gate can settle on a few heads before the others have learned.

    Args:
        model: with one layer of :class:`MixtureOfAttentiveExperts` or more, in training mode.
        gate_every: of so many rounds (the paper's are epochs) the last trains gates.

    Raises:
        InputError: a model without such layers, or fewer than two rounds.

    Source:
        mae-heads (Peng et al. 2020, algorithm 1).

    Example:
        >>> model = nn.Sequential(MixtureOfAttentiveExperts(AttentionShape(32, 4)))
        >>> blocks = BlockCoordinates(model, gate_every=3)
        >>> for number in range(4):
        ...     with blocks.round(number) as block:
        ...         print(block, sum(each.requires_grad for each in model.parameters()))
        experts 4
        experts 4
        gates 4
        experts 4
    """

    def __init__(self, model: nn.Module, gate_every: int = 5) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfAttentiveExperts)]
        if not self.layers or gate_every < 2:
            raise InputError(
                f"A model with {len(self.layers)} layers of attentive experts and gate_every={gate_every} was given; "
                "expected one layer or more, and 2 rounds or more."
            )
        self.model = model
        self.gate_every = gate_every

    @contextmanager
    def round(self, number: int) -> Iterator[Literal["gates", "experts"]]:
        """Train one block while the block of code runs: "gates" or "experts", which round ``number`` (from 0) is of."""
        block: Literal["gates", "experts"] = "experts" if (number + 1) % self.gate_every else "gates"
        of_gates = {id(weight) for layer in self.layers for weight in layer.gate.parameters()}
        before = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        try:
            for weight, learns in before:
                weight.requires_grad_(learns and (id(weight) in of_gates) == (block == "gates"))
            for layer in self.layers:
                layer.sampling = block == "experts"
            yield block
        finally:
            for weight, learns in before:
                weight.requires_grad_(learns)
            for layer in self.layers:
                layer.sampling = False


@torch.no_grad()
def text_responsibilities(model: nn.Module, *inputs: Any) -> torch.Tensor:
    """``[batch, layers, heads]`` of a run of ``model(*inputs)``: each text's mean over its tokens.

    ``HeadMap(found.mean(0), ...)`` says how much each head is missed least.

    Raises:
        InputError: a model without such layers.
    """
    seen: list[torch.Tensor] = []

    def note(layer: MixtureOfAttentiveExperts, given: tuple[Any, ...]) -> None:
        gates = layer.responsibilities(*given)
        padding = given[1] if len(given) > 1 else None
        real = torch.ones_like(gates[..., :1]) if padding is None or not layer.causal else padding[..., None]
        seen.append((gates * real).sum(1) / real.sum(1).clamp_min(1))

    layers = [layer for layer in model.modules() if isinstance(layer, MixtureOfAttentiveExperts)]
    if not layers:
        raise InputError("A model without layers of attentive experts was given; expected MixtureOfAttentiveExperts.")
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen, 1)
