"""Which heads carry the difference between two inputs: activation patching, and its first-order estimate.

Pairs of a clean and a corrupt input are given. A head is patched by running one of them with that head's output taken
from the other (chinchilla-mcq-circuits, sections on activation patching).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.suffix import Change, sweep
from polyhead.heads.tasks import Batch
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["ActivationPatching", "AttributionPatching", "PatchingData", "answer_difference"]

Into = Literal["corrupt", "clean"]
Metric = Callable[[Any, Batch], torch.Tensor]


@dataclass(frozen=True)
class PatchingData:
    """Clean and corrupt inputs of the same shapes, and what is measured of the outputs.

    Attributes:
        clean, corrupt: batches in pairs; tokens are compared position by position, so pairs are of one length.
        metric: ``metric(outputs, batch) -> [examples]``, differentiable, high on clean inputs.
    """

    clean: Sequence[Batch]
    corrupt: Sequence[Batch]
    metric: Metric

    def __post_init__(self) -> None:
        def shapes(batches: Sequence[Batch]) -> list[dict[str, torch.Size]]:
            return [{key: value.shape for key, value in batch.inputs.items()} for batch in batches]

        if not self.clean or shapes(self.clean) != shapes(self.corrupt):
            raise InputError(
                f"Patching needs clean and corrupt batches in pairs of one shape; got {shapes(self.clean)} and "
                f"{shapes(self.corrupt)}. Word the prompts so that both have as many tokens."
            )


def answer_difference(outputs: Any, batch: Batch) -> torch.Tensor:
    """Logit of ``targets["answer"]`` less that of ``targets["other"]`` after the last token, ``[examples]``.

    Prompts are all of one length, or padded on the left.
    """
    last = outputs.logits[:, -1].float()
    answer, other = (batch.targets[key].to(last.device)[:, None] for key in ("answer", "other"))
    return (last.gather(1, answer) - last.gather(1, other))[:, 0]


class _Patching(Score):
    """What both share: the refusal of other data, and the mean over examples."""

    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "the head carries more of what tells clean from corrupt"
    into: Into

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a :class:`PatchingData`."""
        if not isinstance(data, PatchingData):
            raise InputError(
                f"'{self.name}' was given {type(data).__name__}; expected PatchingData: clean and corrupt batches, and "
                "a metric."
            )
        if self.into not in ("corrupt", "clean"):
            raise InputError(f"into is {self.into!r}, expected 'corrupt' or 'clean'.")
        effects = self.effects(model, data, progress=progress)
        count = sum(batch.examples for batch in data.clean)
        return self._map(effects.mean(-1), model, f"{count} pairs, into {self.into}")

    def effects(self, model: HeadedModel, data: PatchingData, *, progress: Progress | None = None) -> np.ndarray:
        """Effect of each head on each example, ``[layers, heads, examples]``."""
        found = []
        for done, (clean, corrupt) in enumerate(zip(data.clean, data.corrupt, strict=True), start=1):
            run, source = (corrupt, clean) if self.into == "corrupt" else (clean, corrupt)
            effects = self._effects(model, run, source, data.metric)
            found.append(effects if self.into == "corrupt" else -effects)
            if progress is not None:
                progress(done, len(data.clean))
        return np.concatenate(found, axis=-1)

    @abstractmethod
    def _effects(self, model: HeadedModel, run: Batch, source: Batch, metric: Metric) -> np.ndarray:
        """Metric of ``run`` with each head from ``source``, less without: ``[layers, heads, examples]``."""


@paper("chinchilla-mcq-circuits")
@dataclass
class ActivationPatching(_Patching):
    """Exact patching: the metric with a head's output taken from the other input, less the metric without.

    Cost as :func:`~polyhead.heads.suffix.sweep`: only what lies above the patched layer is run.

    Args:
        into: "corrupt" runs corrupt inputs with clean heads (how much a head restores), "clean" runs clean inputs with
            corrupt heads (how much is lost, counted as positive).
        heads_at_once: in one run; None chooses.

    Example:
        >>> data = PatchingData([clean], [corrupt], answer_difference)
        >>> ActivationPatching().score(load("gemma-3-270m", lm_head=True), data).top(3)
    """

    into: Into = "corrupt"
    heads_at_once: int | None = None

    name: ClassVar[str] = "activation-patching"
    summary: ClassVar[str] = "how much of the answer comes back when one head's output is taken from the clean input"

    def _effects(self, model: HeadedModel, run: Batch, source: Batch, metric: Metric) -> np.ndarray:
        effects = np.full((model.layers, model.heads, run.examples), np.nan)
        with torch.inference_mode():
            before = metric(model(**run.inputs), run).double()
            change = _from_source(_head_outputs(model, source))
            for found in sweep(model, run, change, heads_at_once=self.heads_at_once):
                after = metric(found.outputs, found.batch).double().unflatten(0, (len(found.heads), -1))
                effects[found.layer, found.heads] = (after - before).cpu().numpy()
        return effects


@paper("chinchilla-mcq-circuits")
@dataclass
class AttributionPatching(_Patching):
    """First-order patching of all heads at once: two forward passes and one backward.

    ``effect_h = (z_h of the other input - z_h of the one that is run) . d metric / d z_h``, summed over tokens: exact
    where the metric is linear in the head, an estimate elsewhere.

    Args:
        into: as for :class:`ActivationPatching`.
    """

    into: Into = "corrupt"

    name: ClassVar[str] = "attribution-patching"
    summary: ClassVar[str] = "first-order estimate of activation patching: two forward passes, one backward"

    def _effects(self, model: HeadedModel, run: Batch, source: Batch, metric: Metric) -> np.ndarray:
        with torch.no_grad():
            wanted = _head_outputs(model, source)
        leaves: dict[int, torch.Tensor] = {}
        found = np.full((model.layers, model.heads, run.examples), np.nan)

        def keep(layer: int, z: torch.Tensor) -> torch.Tensor:
            leaves[layer] = z if z.requires_grad else z.detach().requires_grad_()
            return leaves[layer]

        with torch.enable_grad(), model.tap_heads(keep):
            total = metric(model(**run.inputs), run).sum()
        gradients = torch.autograd.grad(total, [leaves[layer] for layer in range(model.layers)])
        for layer, gradient in enumerate(gradients):
            moved = (wanted[layer] - leaves[layer].detach()).double() * gradient.double()
            by_head = moved.unflatten(0, (run.examples, -1)).movedim(-2, 0).flatten(2).sum(-1)
            found[layer, : len(by_head)] = by_head.cpu().numpy()
        return found


def _head_outputs(model: HeadedModel, batch: Batch) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, z: torch.Tensor) -> None:
        found[layer] = z

    with model.tap_heads(keep):
        model(**batch.inputs)
    return [found[layer] for layer in range(model.layers)]


def _from_source(source: list[torch.Tensor]) -> Change:
    def change(layer: int, heads: Sequence[int], z: torch.Tensor) -> torch.Tensor:
        return torch.stack([source[layer][..., head, :] for head in heads])

    return change
