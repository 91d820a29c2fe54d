"""Act on one channel of one head: weaken, silence or drive a single direction that the head writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.base import Action
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ChannelSteer", "LaundryList", "laundry_list"]


@paper("talking-heads-channels")
@dataclass
class ChannelSteer(Action):
    """Scale what a head writes along one singular direction ``v`` of its ``W_V W_O``, and add to it.

    With ``scale`` alone it does what editing the weights does, ``W_O <- W_O (I + (scale - 1) v v^T)``, without
    editing them; ``add`` writes ``add * v`` into the residual stream at every token (Talking Heads, section on editing
    a channel). It acts on the head output ``z``: ``z <- z + ((scale - 1) z W_O v + add) c`` with ``c W_O = v``.

    Args:
        layer, head, channel: as ``Composition.top(by_channel=True)`` names them.
        scale: 0 silences the channel, 1 leaves it.
        add: how far to drive it, in units of the residual stream.

    Example:
        >>> link = compose(model, "K").top(1, by_channel=True)[0]
        >>> with ChannelSteer(*link.writer, link.channel, scale=0).on(model):
        ...     outputs = model(**inputs)
    """

    name: ClassVar[str] = "channel"
    summary: ClassVar[str] = "scale or drive one singular direction that a head writes to"
    layer: int
    head: int
    channel: int
    scale: float = 1.0
    add: float = 0.0

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """See :class:`Action`.

        Raises:
            InputError: the model has no such layer, head or channel.
        """
        from polyhead.heads.composition import channels
        from polyhead.heads.weights import read_weights

        layers = read_weights(model).layers
        known = 0 <= self.layer < len(layers) and 0 <= self.head < len(layers[self.layer].query)
        pieces = channels(layers[self.layer], self.head) if known else None
        if pieces is None or not 0 <= self.channel < len(pieces.sizes):
            raise InputError(
                f"Channel {self.channel} of head {self.head} of layer {self.layer} was named; '{model.name}' has "
                f"{model.layers} layers x {model.heads} heads with {model.head_dim} channels each."
            )
        output = layers[self.layer].output[self.head].double()
        direction = pieces.writes[self.channel].double()
        reads = output @ direction
        writes = direction @ torch.linalg.pinv(output)

        def change(_: int, z: torch.Tensor) -> torch.Tensor:
            reader, writer = reads.to(z.device, torch.float32), writes.to(z.device, torch.float32)
            mine = z[:, :, self.head].float()
            amount = (self.scale - 1) * (mine @ reader) + self.add
            changed = z.clone()
            changed[:, :, self.head] = (mine + amount[..., None] * writer).to(z.dtype)
            return changed

        with model.tap_heads(change, layers=[self.layer]):
            yield


@dataclass(frozen=True)
class LaundryList:
    """A text that names things and asks for the one left out.

    Attributes:
        prompt: the text up to the answer.
        items: named in the question, in order.
        answer: the one that is not named again.
    """

    prompt: str
    items: tuple[str, ...]
    answer: str


_THINGS = ("apple", "book", "candle", "drum", "fork", "glove", "hammer", "jacket", "lamp", "mirror", "pencil", "ring")


def laundry_list(items: int, n: int, seed: int = 0) -> list[LaundryList]:
    """``n`` prompts of the Laundry List task: a list of ``items`` things, all bought but one; which is missing?

    Args:
        items: on each list, 2 to 12.
        n: prompts; the missing item stands at each place equally often.
        seed: of the choice of things.

    Raises:
        InputError: more or fewer items.
    """
    if not 2 <= items <= len(_THINGS):
        raise InputError(f"Lists of {items} things were asked for, expected 2 to {len(_THINGS)}.")
    generator = np.random.default_rng(seed)
    found = []
    for row in range(n):
        listed = [_THINGS[i] for i in generator.permutation(len(_THINGS))[:items]]
        answer = listed[row % items]
        bought = [listed[i] for i in generator.permutation(items) if listed[i] != answer]
        prompt = f"The list says: {', '.join(listed)}. Already bought: {', '.join(bought)}. Still missing: the"
        found.append(LaundryList(prompt, tuple(listed), answer))
    return found
