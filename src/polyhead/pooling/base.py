"""What every pooler is: states and a mask in, one vector (or a few) per text out; trained, saved and folded alike."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError

__all__ = ["ConcatenatedPooler", "Pooler", "Reads", "load_pooler", "pooler_from"]

Reads = Literal["tokens", "layers", "heads", "blocks"]
"""What a pooler's ``states`` are; the axes after the tokens differ, batch and tokens are always the first two.

- "tokens": the last layer's states ``[batch, tokens, dim]``;
- "layers": the states before the first layer and after each, ``[batch, tokens, layers + 1, dim]``;
- "heads": outputs of all heads before the output projection, ``[batch, tokens, layers, heads, head_dim]``;
- "blocks": states of the pooler's ``layers``, then all heads of its ``head_layers``, ``[batch, tokens, columns]``.
"""


class Pooler(nn.Module):
    """Pools states ``[batch, tokens, ...]`` into ``[batch, dim]`` or ``[batch, k, dim]``, padded on either side.

    A pooler has no weights unless its paper gives it some, keeps the batch order, and computes in float32 where the
    states are in half precision, because sums over hundreds of tokens lose digits there. What padding holds changes
    nothing.

    To write one: say what it ``reads``, name the constructor's arguments in ``knobs`` (each kept as an attribute, plain
    JSON values), and override :meth:`pool`. Saving, loading, the use in :class:`polyhead.embed.Encoder` and in
    sentence-transformers (:class:`polyhead.pooling.sentence.PoolerModule`) follow.

    Attributes:
        reads: what ``states`` are, see :data:`Reads`.
        knobs: names of the constructor's arguments.
        stock: the mode of sentence-transformers' ``Pooling`` that is the same, "" where there is none.
    """

    reads: ClassVar[Reads] = "tokens"
    knobs: ClassVar[tuple[str, ...]] = ()
    stock: ClassVar[str] = ""

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        """Pool a batch.

        Args:
            states: ``[batch, tokens, ...]``, see :data:`Reads`.
            mask: ``[batch, tokens]``, 1 for tokens and 0 for padding, which may stand left or right.
            skip: how many real tokens at the start of each text to leave out (a prompt that must not be pooled).
            ids: ``[batch, tokens]`` token ids, for poolers that choose tokens by what they are.

        Returns:
            ``[batch, dim]`` or ``[batch, k, dim]``, float32 or wider. A text without a token that counts gives zeros.
        """
        if states.dtype in (torch.float16, torch.bfloat16):
            states = states.float()
        positions = token_positions(mask)
        counted = (mask != 0) & (positions > skip)
        return self.pool(states, self.among(counted, ids), positions)

    def among(self, counted: Tensor, ids: Tensor | None) -> Tensor:
        """Which of the tokens that could count do, ``[batch, tokens]`` bool; all of them unless overridden."""
        return counted

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """The pooling itself.

        Args:
            states: ``[batch, tokens, ...]``.
            counted: ``[batch, tokens]`` bool, the tokens to pool.
            positions: ``[batch, tokens]``, 1 for the first real token of each text; 0 or less on left padding.
        """
        raise NotImplementedError

    def output_dim(self, dim: int) -> int:
        """Numbers a text where the model's states have ``dim``, all ``k`` vectors together."""
        return dim

    def stock_modules(self, dim: int, include_prompt: bool = True) -> list[nn.Module] | None:
        """sentence-transformers' own modules that do the same on states of ``dim``; None where there are none."""
        if not self.stock:
            return None
        from sentence_transformers.sentence_transformer.modules import Pooling

        return [Pooling(dim, self.stock, include_prompt)]

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        return {name: getattr(self, name) for name in self.knobs}

    def describe(self) -> dict[str, Any]:
        """Class and arguments, from which :func:`pooler_from` makes the like, weights aside."""
        return {"pooler": f"{type(self).__module__}.{type(self).__qualname__}", "settings": self.settings()}

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and, where there are weights, ``model.safetensors``; :func:`load_pooler` reads them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.describe(), indent=2), encoding="utf-8")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if weights:
            save_file(weights, folder / "model.safetensors")


class ConcatenatedPooler(Pooler):
    """Several poolings of tokens side by side, in the order given: ``[batch, dim * poolers]``.

    Args:
        poolers: poolers, or their descriptions (:meth:`Pooler.describe`).

    Raises:
        InputError: poolers that read different states.
    """

    def __init__(self, poolers: Sequence[Pooler | dict[str, Any]]) -> None:
        super().__init__()
        made = [each if isinstance(each, Pooler) else pooler_from(each) for each in poolers]
        if {each.reads for each in made} != {"tokens"}:
            raise InputError("Poolers side by side must all read the last layer's tokens; use the others alone.")
        self.poolers = nn.ModuleList(made)

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        """See :class:`Pooler`."""
        return torch.cat([pooler(states, mask, skip, ids).flatten(1) for pooler in self.poolers], dim=-1)

    def output_dim(self, dim: int) -> int:
        """See :class:`Pooler`."""
        return sum(pooler.output_dim(dim) for pooler in self.poolers)  # type: ignore[operator]

    def stock_modules(self, dim: int, include_prompt: bool = True) -> list[nn.Module] | None:
        """See :class:`Pooler`."""
        modes = [str(pooler.stock) for pooler in self.poolers]
        if not all(modes):
            return None
        from sentence_transformers.sentence_transformer.modules import Pooling

        return [Pooling(dim, modes, include_prompt)]

    def settings(self) -> dict[str, Any]:
        """See :class:`Pooler`."""
        return {"poolers": [pooler.describe() for pooler in self.poolers]}  # type: ignore[operator]


def pooler_from(description: dict[str, Any], *, trust: bool = False) -> Pooler:
    """The pooler of a description, with fresh weights.

    Args:
        description: from :meth:`Pooler.describe`.
        trust: whether a class outside Polyhead may be imported, which runs its code.

    Raises:
        InputError: no pooler of Polyhead (or of anyone, under ``trust``), or settings that it does not take.
    """
    name, settings = str(description.get("pooler", "")), description.get("settings", {})
    package, _, kind = name.rpartition(".")
    found: Any = None
    if package.startswith("polyhead.pooling.") or (trust and package):
        try:
            found = getattr(importlib.import_module(package), kind, None)
        except ImportError as error:
            raise InputError(
                f"The pooler {name!r} cannot be imported ({error}); install the package it is in."
            ) from error
    if not (isinstance(found, type) and issubclass(found, Pooler)):
        hint = "" if trust else "; for a class of your own say trust=True, which runs its code"
        raise InputError(f"The pooler asked for is {name!r}, expected a Pooler class of polyhead.pooling{hint}.")
    try:
        return found(**settings)
    except TypeError as error:
        raise InputError(f"The pooler {name!r} does not take the settings {settings}: {error}.") from error


def load_pooler(folder: str | Path, *, trust: bool = False) -> Pooler:
    """A pooler saved by :meth:`Pooler.save`, weights included.

    Args:
        folder: where it was saved.
        trust: as in :func:`pooler_from`.

    Raises:
        InputError: no such files, or weights of another shape.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        pooler = pooler_from(json.loads((folder / "config.json").read_text(encoding="utf-8")), trust=trust)
        weights = load_file(folder / "model.safetensors") if pooler.state_dict() else {}
        pooler.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"'{folder}' holds no saved pooler that can be read ({error}); save it again.") from error
    return pooler


def token_positions(mask: Tensor) -> Tensor:
    """Positions ``[batch, tokens]`` counted from 1 at each text's first real token."""
    index = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    padding_before = (mask != 0).to(torch.int32).argmax(dim=1)
    return index.unsqueeze(0) - padding_before.unsqueeze(1)


def weighted_sum(states: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of ``states [batch, tokens, dim]`` times ``weights [batch, tokens]``: ``[batch, dim]``.

    Tokens of weight 0 do not enter, whatever they hold.
    """
    wide = weights.unsqueeze(-1)
    return (states.masked_fill(wide == 0, 0.0) * wide).sum(dim=1)


def state_at(states: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """States ``[batch, dim]`` at one token index a text (``index [batch]``); zeros where no token counts."""
    picked = states.gather(1, index.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
    return picked * counted.any(dim=1, keepdim=True).to(states.dtype)


def softmax_over_tokens(scores: Tensor, counted: Tensor) -> Tensor:
    """Softmax of ``scores [batch, tokens, ...]`` over the tokens that count; zeros elsewhere, and in texts of none."""
    kept = counted.reshape(*counted.shape, *[1] * (scores.dim() - 2))
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~kept, lowest).softmax(dim=1)
    return weights.masked_fill(~kept, 0.0)
