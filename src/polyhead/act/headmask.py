"""HeadMask: train with some heads off, so that a model does not come to lean on a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from polyhead.act.base import Action
from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["HeadMask", "gini"]


@paper("headmask")
class HeadMask(Action):
    """A training-time regulariser: in each batch, ``n`` heads of every layer give zero. Nothing changes at inference.

    "random" draws heads uniformly. "importance" masks the heads that the loss depends on most, ``|dL/dg_h|`` of a gate
    on each head, so that the others must learn; it costs one more forward and backward pass a batch.

    Args:
        n: heads a layer.
        policy: "random" or "importance".
        seed: of the draws.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> mask = HeadMask(2, seed=1)
        >>> for texts in (["one batch"], ["another"]):
        ...     with mask.on(model):  # other heads each time
        ...         loss = model(**model.tokenize(texts)).last_hidden_state.pow(2).mean()
        ...     loss.backward()
    """

    name: ClassVar[str] = "headmask"
    summary: ClassVar[str] = "switch a few heads of each layer off for a training batch"

    def __init__(self, n: int, policy: Literal["random", "importance"] = "random", seed: int = 0) -> None:
        if policy not in ("random", "importance"):
            raise InputError(f"policy is {policy!r}, expected 'random' or 'importance'.")
        if n < 0:
            raise InputError(f"n is {n}, expected the number of heads to mask in each layer.")
        self.n, self.policy = n, policy
        self._generator = torch.Generator().manual_seed(seed)
        self._ready: torch.Tensor | None = None
        self.masked: list[tuple[int, int]] = []

    def look(self, model: HeadedModel, loss: Callable[[], torch.Tensor]) -> HeadMap:
        """For "importance": run a batch's loss with gates and choose the heads of the next :meth:`on`.

        Args:
            model: that is trained.
            loss: runs the model and gives the batch's loss; parameters get no gradients from it.

        Returns:
            ``|dL/dg|`` of each head.
        """
        gates = torch.ones(model.layers, model.heads, device=model.device, requires_grad=True)
        with Gate(gates).on(model), torch.enable_grad():
            value = loss()
        (gradient,) = torch.autograd.grad(value, [gates])
        self._ready = gradient.abs().cpu()
        return HeadMap(self._ready.double().numpy(), "headmask-importance", model.name, "", "the loss depends on it")

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """Mask for one batch; :attr:`masked` tells which.

        Raises:
            InputError: a layer has no more than ``n`` heads, or "importance" without a :meth:`look` before it.
        """
        if self.policy == "importance":
            if self._ready is None:
                raise InputError("HeadMask by importance looks at the batch first: call look(model, loss) before on().")
            rank, self._ready = self._ready, None
        else:
            rank = torch.rand(model.layers, model.heads, generator=self._generator)
        self.masked = []
        for layer in model.attention_layers:
            if self.n >= layer.heads:
                raise InputError(
                    f"{self.n} heads of each layer are to be masked; layer {layer.index} has {layer.heads}."
                )
            chosen = rank[layer.index, : layer.heads].topk(self.n).indices.tolist()
            self.masked += [(layer.index, head) for head in sorted(chosen)]
        with Gate.off(self.masked, model).on(model):
            yield


@paper("headmask")
def gini(importance: HeadMap | np.ndarray) -> float:
    """How unequal heads are: 0 where all matter the same, near 1 where a few matter alone; NaN left out.

    Raises:
        InputError: no values, or a negative one.
    """
    values = np.asarray(importance.values if isinstance(importance, HeadMap) else importance, dtype=np.float64)
    values = np.sort(values[np.isfinite(values)])
    if values.size == 0 or values[0] < 0:
        raise InputError("The Gini coefficient needs importances of at least 0; take absolute values first.")
    if values.sum() == 0:
        return 0.0
    n = values.size
    return float((2 * np.arange(1, n + 1) - n - 1) @ values / (n * values.sum()))
