"""How a Transformer block puts its residual stream together, read from the numbers of a forward pass.

No model class is named: what enters and leaves the block, the output projection and every token-wise module in it is
caught, and a block is taken for what its numbers show it to be:

* sequential: ``mid = x + a``, ``y = mid + f`` (GPT-2, Llama), where ``a`` and ``f`` may have gone through a norm or a
  learned scale of their own (Gemma 3, DINOv2);
* post-norm: ``mid = N(x + a)``, ``y = N(mid + f)`` (BERT);
* parallel: ``y = x + a + f`` (GPT-NeoX).

A norm is linear once its per-token statistics are held fixed, and :class:`TokenScale` is that linear map, exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.recording import blocks_of
from polyhead.structure import is_linear

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Block", "TokenScale", "blocks"]

Kind = Literal["sequential", "post-norm", "parallel"]
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # some norms compute in float32 whatever they are given


@dataclass(frozen=True)
class TokenScale:
    """A norm or learned scale with its statistics held fixed: ``N(u) = token * weight * center(u) + bias``.

    Attributes:
        token: ``[batch, tokens, 1]``, one factor a token.
        weight, bias: ``[hidden]``.
        centers: whether the mean over features is taken off first, as LayerNorm does and RMSNorm does not.
    """

    token: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    centers: bool

    def fixed(self, vectors: torch.Tensor) -> torch.Tensor:
        """The part that is the same for all tokens, ``weight * center(u)``; vectors ``[..., hidden]``."""
        return self.weight * (vectors - vectors.mean(-1, keepdim=True) if self.centers else vectors)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """The linear map without the bias, of vectors ``[batch, tokens, hidden]``."""
        return self.token * self.fixed(vectors)

    @classmethod
    def of(cls, module: nn.Module, given: torch.Tensor, gave: torch.Tensor) -> TokenScale | None:
        """Read the map of ``module`` from a probe and from what one call was given and gave; None where it is no scale.

        The probe needs no attribute names: a vector of alternating sign and its negative give weight and bias up to a
        factor, a shifted one tells whether the mean is taken off, and the factor of each token is fitted to the call.
        """
        hidden = given.shape[-1]
        probe = torch.ones(hidden, dtype=given.dtype, device=given.device)
        probe[1::2] = -1
        with torch.no_grad():
            up, down, shifted = (module((sign * probe + shift) * 64)[None] for sign, shift in ((1, 0), (-1, 0), (1, 1)))
        if up.shape[-1] != hidden:
            return None
        wide = torch.promote_types(given.dtype, torch.float32)
        up, down, shifted, u, v = (tensor.to(wide).detach() for tensor in (up[0], down[0], shifted[0], given, gave))
        centers = _same(shifted, up)
        plain = probe.to(wide) - (probe.to(wide).mean() if centers else 0)
        bias = (up + down) / 2
        scale = cls(torch.ones_like(u[..., :1]), (up - down) / 2 / plain, bias, centers)
        base = scale.fixed(u)
        token = ((v - bias) * base).sum(-1, keepdim=True) / base.square().sum(-1, keepdim=True).clamp(min=1e-30)
        found = cls(token, scale.weight, bias, centers)
        tolerance = 20 * _TOLERANCE.get(given.dtype, 5e-3)
        return found if _same(found(u) + bias, v, tolerance) else None


@dataclass(frozen=True)
class Block:
    """One layer of one forward pass; every tensor is ``[batch, tokens, hidden]``, in float32 or wider.

    Attributes:
        layer: index.
        kind: see the module.
        x: what enters. attention: what the output projection gives. feedforward: what the rest of the block adds.
        mid: the state after attention (before the feed-forward part). y: what leaves.
        branch: norms and scales that ``attention`` goes through before it is added.
        mid_norm, out_norm: of a post-norm block, else None.

    With ``B`` the product of ``branch``: ``mid = mid_norm(x + B(attention))`` and ``y = out_norm(mid + feedforward)``;
    in a parallel block ``mid`` is only the sum ``x + B(attention)``.
    """

    layer: int
    kind: Kind
    x: torch.Tensor
    attention: torch.Tensor
    feedforward: torch.Tensor
    mid: torch.Tensor
    y: torch.Tensor
    branch: tuple[TokenScale, ...]
    mid_norm: TokenScale | None
    out_norm: TokenScale | None


@dataclass
class _Caught:
    x: torch.Tensor
    attention: torch.Tensor | None = None
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)


@contextmanager
def blocks(model: HeadedModel, use: Callable[[Block], None]) -> Iterator[None]:
    """Have ``use(block)`` called as each layer ends, in every forward pass of this thread while the block runs.

    Raises:
        UnreadableModelError: (in the forward pass) a block that is none of the three kinds.
    """
    thread = threading.get_ident()
    state: dict[str, Any] = {"next": 0, "now": None}

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            state.update(next=0, now=None)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            state["now"] = _Caught(args[0] if args else kwargs["hidden_states"])

    def inside(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        now = state["now"]
        if threading.get_ident() != thread or now is None or not args or not isinstance(output, torch.Tensor):
            return
        if module is model.attention_layers[state["next"]].output_projection:
            now.attention = output
        elif output.shape[-1:] == now.x.shape[-1:] and output.numel() == now.x.numel() == args[0].numel():
            now.calls.append((module, args[0].reshape(now.x.shape), output.reshape(now.x.shape)))
        elif output.shape[-1:] == now.x.shape[-1:] and output.numel() == now.x.numel():
            now.calls.append((module, output[:0], output.reshape(now.x.shape)))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and state["now"] is not None:
            now, layer = state["now"], state["next"]
            state.update(next=layer + 1, now=None)
            use(_assemble(now, output if isinstance(output, torch.Tensor) else output[0], layer, model.name))

    handles = [model.module.register_forward_pre_hook(restart)]
    try:
        around = {id(block): block for block in blocks_of(model)}.values()
        for block in around:
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
            for module in block.modules():
                if not any(True for _ in module.children()):
                    handles.append(module.register_forward_hook(inside))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> bool:
    if a.shape != b.shape:
        return False
    allowed = _TOLERANCE.get(a.dtype, 3e-2) if tolerance is None else tolerance
    size = b.abs().nan_to_num(0).max().clamp(min=1e-20)
    return bool((a - b).abs().nan_to_num(0).max() <= allowed * size)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit; a padded token that sees nothing may be NaN in both."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _assemble(caught: _Caught, y: torch.Tensor, layer: int, name: str) -> Block:
    x, a, scales = caught.x, caught.attention, [call for call in caught.calls if not is_linear(call[0])]
    refused = UnreadableModelError(
        f"Layer {layer} of '{name}' adds attention to its residual stream in a way that is not known here: expected "
        "x + attention, a norm after that sum (BERT), or x + attention + feed-forward at once (GPT-NeoX), with at most "
        "norms or learned scales in between."
    )
    if a is None:
        raise refused
    # The same sum in the same dtype gives the same bits, so what a module was given is compared exactly: with the
    # outlier features of real models, any tolerance relative to the largest would take small additions for none.
    branch, value = [], a
    for module, given, gave in scales:
        if _equal(given, value) and not _equal(gave, value):
            step = TokenScale.of(module, given, gave)
            if step is None:
                raise refused
            branch.append(step)
            value = gave
    total = x + value
    takers = [call for call in scales if _equal(call[1], total) and not _equal(call[2], total)]
    final = next((call for call in scales if _equal(call[2], y) and not _equal(call[1], y)), None)
    closing = TokenScale.of(*final) if final is not None else None
    wide = torch.promote_types(x.dtype, torch.float32)
    x, a, y, total = x.to(wide), a.to(wide), y.to(wide), total.to(wide)
    if closing is not None and final is not None and takers:
        opening = TokenScale.of(*takers[0])
        if opening is None:
            raise refused
        mid = takers[0][2].to(wide)
        return Block(layer, "post-norm", x, a, final[1].to(wide) - mid, mid, y, tuple(branch), opening, closing)
    rest = y - total
    kind: Kind = "sequential"
    if not takers:
        if not any(
            _same(total + call[2].to(wide), y, 3e-2 if caught.x.dtype != wide else 1e-5) for call in caught.calls
        ):
            raise refused
        kind = "parallel"
    return Block(layer, kind, x, a, rest, total, y, tuple(branch), None, None)
