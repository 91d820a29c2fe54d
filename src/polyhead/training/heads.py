"""Head-local training: only some heads' weights, only an offset a head, or some heads off in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from polyhead.act.grad_mask import HeadGradMask
from polyhead.act.headmask import HeadMask
from polyhead.act.lofit import fold
from polyhead.act.steer import Steer
from polyhead.act.vectors import Heads
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["HeadDropout", "HeadOffsets", "HeadWeights", "Tuning"]


class Tuning(Protocol):
    """What of a model is trained: given as ``Trainer(tune=...)``."""

    def on(self, model: HeadedModel, loss: nn.Module) -> AbstractContextManager[None]:
        """In force during the whole training; parameters of its own become parts of ``loss``."""


@contextmanager
def _frozen(model: HeadedModel) -> Iterator[None]:
    """Nothing of the model is trained, unless it is set free again inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
    model.module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _some(heads: Heads) -> Heads:
    """Heads as something that can be read twice; none at all is a mistake."""
    if heads is None or hasattr(heads, "shape"):
        return heads
    found = [(int(layer), int(head)) for layer, head in heads]
    if not found:
        raise InputError("No heads were named to train; HeadMap.top(n) gives the first n, None means all.")
    return found


@paper("alps")
class HeadWeights:
    """Train only the query, key, value and output weights of some heads; every other number stays as it is, exactly.

    Heads come from any HeadMap: ``WeightShift().score(base, tuned).top(0.1)`` is ALPS's choice. Weight decay must be 0.

    Args:
        heads: ``HeadMap.top(n)``, a boolean mask ``[layers, heads]``, or None for all heads (and no other weights).

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import HeadWeights, Options, Trainer
        >>> rows = [{"anchor": f"what is {n}", "positive": f"{n} is a number"} for n in range(4)]
        >>> trainer = Trainer(InfoNCE(), options=Options(batch_size=4), tune=HeadWeights([(5, 3)]))
        >>> model = trainer.fit("all-MiniLM-L6-v2", rows).model_
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = _some(heads)

    @contextmanager
    def on(self, model: HeadedModel, loss: nn.Module) -> Iterator[None]:
        """See :class:`Tuning`."""
        masks = HeadGradMask(self.heads)
        with _frozen(model):
            for parameter, mask in masks.masks(model):
                parameter.requires_grad_(bool(mask.any()))
            with masks.on(model):
                yield


@paper("lofit")
class HeadOffsets:
    """Train one offset for each of some heads, added to its output at every token; the weights stay as they are.

    After training the offsets go into the bias of the output projections (``b + sum_h v_h W_O[h]``), so that the saved
    folder is a stock model. :class:`~polyhead.act.LoFiT` finds heads for it, and learns offsets on other tasks.

    Args:
        heads: ``HeadMap.top(n)``, a boolean mask ``[layers, heads]``, or None for all.

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import HeadOffsets, Options, Trainer
        >>> rows = [{"anchor": f"what is {n}", "positive": f"{n} is a number"} for n in range(4)]
        >>> options = Options(batch_size=4, learning_rate=1e-2)
        >>> model = Trainer(InfoNCE(), options=options, tune=HeadOffsets([(5, 3)])).fit("all-MiniLM-L6-v2", rows).model_
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = _some(heads)

    @contextmanager
    def on(self, model: HeadedModel, loss: nn.Module) -> Iterator[None]:
        """See :class:`Tuning`."""
        offsets = nn.Parameter(torch.zeros(model.layers, model.heads, model.head_dim, device=model.device))
        loss.register_parameter("head_offsets", offsets)
        with _frozen(model), Steer(offsets, heads=self.heads).on(model):
            yield
        folded = fold(model, Steer(offsets.detach(), heads=self.heads))
        for own, new in zip(model.attention_layers, folded.attention_layers, strict=True):
            own.output_projection.bias = new.output_projection.bias
        del loss.head_offsets


@paper("headmask")
class HeadDropout:
    """In every training step ``n`` heads of each layer give zero, so that the model does not come to lean on a few.

    :class:`~polyhead.act.HeadMask` for the trainer: which heads are off follows from seed and step alone, so that a
    resumed run goes the same way.

    Args:
        n: heads a layer.
        policy: "random", or "importance": those that the batch's loss depends on most, at the price of one more forward
            and backward pass a step.
        seed: of the draws.

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import HeadDropout, Options, Trainer
        >>> rows = [{"anchor": f"what is {n}", "positive": f"{n} is a number"} for n in range(4)]
        >>> trainer = Trainer(InfoNCE(), options=Options(batch_size=4), during=[HeadDropout(3)])
        >>> model = trainer.fit("all-MiniLM-L6-v2", rows).model_
    """

    def __init__(self, n: int, policy: Literal["random", "importance"] = "random", seed: int = 0) -> None:
        HeadMask(n, policy)  # says what is wrong with the arguments now, not in the first step
        self.n, self.policy, self.seed = n, policy, seed

    def attach(self, model: HeadedModel) -> None:
        """Name the model whose heads are switched off."""
        self._model = model

    @contextmanager
    def during(self, step: int, loss: Callable[[], Tensor]) -> Iterator[None]:
        """See :class:`~polyhead.training.engine.StepAction`."""
        # Large and odd, so that runs of neighbouring seeds do not share their draws.
        mask = HeadMask(self.n, self.policy, self.seed * 1_000_003 + step)
        if self.policy == "importance":
            mask.look(self._model, loss)
        with mask.on(self._model):
            yield
