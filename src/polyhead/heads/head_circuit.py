"""Circuits of heads, traced back from the output by contextual decomposition, and how faithful they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.cd_t import ContextualDecomposer
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["CircuitSearch", "HeadCircuit", "faithfulness", "mean_heads"]

Inputs = dict[str, torch.Tensor]
Head = tuple[int, int]


@dataclass(frozen=True)
class HeadCircuit:
    """Heads, in the order they were found, and what joins them.

    Attributes:
        heads: ``(layer, head)``; those that reach the output on their own come first.
        edges: ``(source, target, strength)``; the target None is the output.
    """

    heads: tuple[Head, ...]
    edges: tuple[tuple[Head, Head | None, float], ...]


@paper("cd-t")
class CircuitSearch:
    """Build a circuit backwards from the output (cd-t, section 3.3): its heads, then the heads behind those, and so on.

    The strength of a head for the output is ``|<rel, y>| / <y, y>``, for a later head the share of its output that is
    due to it, each over the inputs given. One pass finds a head's reach, so ``layers * heads`` passes find the circuit.

    Args:
        decomposer: with the readout ``[batch, ...]`` the circuit is for.
        keep: how many heads.
        width: how many sources of the output, and of each head, are followed.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> decomposer = ContextualDecomposer(model, lambda outputs: outputs.last_hidden_state[:, 0])
        >>> circuit = CircuitSearch(decomposer, keep=6).find(model.tokenize(["A man walks."]))
        >>> len(circuit.heads)
        6
    """

    def __init__(self, decomposer: ContextualDecomposer, keep: int, width: int = 3) -> None:
        heads = sum(layer.heads for layer in decomposer.model.attention_layers)
        if not (1 <= keep <= heads and width >= 1):
            raise InputError(f"keep={keep}, width={width} were given; expected 1 to {heads} heads and a width above 0.")
        self.decomposer, self.keep, self.width = decomposer, keep, width

    def find(self, inputs: Inputs) -> HeadCircuit:
        """The circuit; where the followed sources run out, the next strongest for the output are taken."""
        to_output, reach = self._strengths(inputs)
        ranked = sorted(to_output, key=lambda head: -to_output[head])
        heads: list[Head] = []
        edges: list[tuple[Head, Head | None, float]] = []
        while len(heads) < self.keep:
            fresh = [head for head in ranked if head not in heads][: self.width]
            for head in fresh:
                edges.append((head, None, to_output[head]))
            waiting = list(fresh)
            while waiting and len(heads) < self.keep:
                target = waiting.pop(0)
                if target in heads:
                    continue
                heads.append(target)
                lower = [head for head in ranked if head[0] < target[0]]
                for source in sorted(lower, key=lambda head: -reach[head][target])[: self.width]:
                    edges.append((source, target, float(reach[source][target])))
                    waiting.append(source)
        kept = set(heads)
        return HeadCircuit(tuple(heads), tuple(edge for edge in edges if edge[0] in kept and edge[1] in {None, *kept}))

    def _strengths(self, inputs: Inputs) -> tuple[dict[Head, float], dict[Head, np.ndarray]]:
        to_output, reach = {}, {}
        for layer in self.decomposer.model.attention_layers:
            for head in range(layer.heads):
                source = (layer.index, head)
                found = self.decomposer.from_heads(inputs, [source])
                y = found.total.flatten(1).float()
                share = (found.relevant.flatten(1).float() * y).sum(-1).abs() / y.square().sum(-1).clamp(min=1e-30)
                to_output[source] = float(share.mean())
                reach[source] = self.decomposer.to_heads(inputs, source)
        return to_output, reach


def mean_heads(model: HeadedModel, inputs: Inputs) -> torch.Tensor:
    """Mean head outputs over the real tokens of a batch, ``[layers, heads, head_dim]``."""
    with model.record("heads") as recording, torch.no_grad():
        model(**inputs)
    heads = recording.heads.movedim(3, 1)  # [batch, tokens, layers, heads, head_dim]
    mask = inputs.get("attention_mask")
    return (heads.flatten(0, 1) if mask is None else heads[mask.bool()]).mean(0)


@paper("cd-t")
def faithfulness(
    model: HeadedModel,
    heads: Iterable[Head],
    inputs: Inputs,
    measure: Callable[[Any], torch.Tensor],
    means: torch.Tensor | None = None,
) -> float:
    """How much of what all heads do for a measure these heads do alone, the others giving their mean.

    ``(m(circuit) - m(none)) / (m(all) - m(none))``: 1 where nothing is lost, 0 where no more is left than without any.

    Args:
        model: any.
        heads: the circuit's.
        inputs: to measure on.
        measure: of the model's outputs, ``[batch]``; its mean counts.
        means: ``[layers, heads, head_dim]``; of these inputs where None.
    """
    average = mean_heads(model, inputs) if means is None else means

    def measured(kept: set[Head]) -> float:
        def ablate(layer: int, z: torch.Tensor) -> torch.Tensor:
            on = torch.tensor([(layer, head) in kept for head in range(z.shape[-2])], device=z.device)[:, None]
            return torch.where(on, z, average[layer, : z.shape[-2]].to(z))

        with model.tap_heads(ablate), torch.no_grad():
            return float(measure(model(**inputs)).double().mean())

    everything = {(layer.index, head) for layer in model.attention_layers for head in range(layer.heads)}
    none = measured(set())
    return (measured(set(heads)) - none) / (measured(everything) - none)
