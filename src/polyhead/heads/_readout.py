"""How a model's last token states become one vector, read from the numbers of a forward pass and made linear.

What is not linear in the states is held as it was (a norm's statistics, the attention of a pooling head) or set apart
as a rest (the feed-forward part of a pooling head).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.residual import TokenScale
from polyhead.recording import blocks_of

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Outside", "Readout", "outside_calls", "own_readout", "token_readout"]


@dataclass
class Outside:
    """Calls outside the layers: token-wise modules as ``(module, given, gave)``, and pooling attention's arguments."""

    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    attention: list[tuple[nn.MultiheadAttention, tuple[torch.Tensor, ...], torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Readout:
    """``vector = sum_p M_p sum_t pool_pt N(y_t) + constant + rest``, with the norm at its recorded scale.

    Attributes:
        norm: between the last layer and the pooling, or None.
        pools: ``[batch, tokens]`` each.
        matrices: ``[dim, hidden]`` each, one for each pool.
        constant: ``[dim]``, biases but for the norm's.
        rest: ``[batch, dim]``, what is not linear in the states.
    """

    norm: TokenScale | None
    pools: list[torch.Tensor]
    matrices: list[torch.Tensor]
    constant: torch.Tensor
    rest: torch.Tensor

    def projected(self, projection: nn.Linear | torch.Tensor) -> Readout:
        """The same with a linear layer, or a matrix ``[out, dim]``, after it."""
        weight = projection.weight if isinstance(projection, nn.Linear) else projection
        bias = projection.bias if isinstance(projection, nn.Linear) else None
        matrix = weight.detach().to(self.constant)
        if matrix.shape[1] != len(self.constant):
            raise InputError(
                f"A projection of shape {list(matrix.shape)} was given; expected [out, {len(self.constant)}]."
            )
        constant = matrix @ self.constant + (0 if bias is None else bias.detach().to(matrix))
        return Readout(self.norm, self.pools, [matrix @ m for m in self.matrices], constant, self.rest @ matrix.T)

    def scaled(self, factor: torch.Tensor) -> Readout:
        """The same times a number for each row, ``[batch]``; the constant becomes part of the rest."""
        pools = [pool * factor[:, None] for pool in self.pools]
        rest = (self.rest + self.constant) * factor[:, None]
        return Readout(self.norm, pools, self.matrices, torch.zeros_like(self.constant), rest)


@contextmanager
def outside_calls(model: HeadedModel) -> Iterator[Outside]:
    """Calls of the modules that are in no layer, in this thread while the block runs."""
    inside = {id(part) for block in blocks_of(model) for part in block.modules()}
    found, thread = Outside(), threading.get_ident()

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != thread or not args or not isinstance(args[0], torch.Tensor):
            return
        if isinstance(module, nn.MultiheadAttention):
            found.attention.append((module, args[:3], output[0]))
        elif isinstance(output, torch.Tensor):
            found.calls.append((module, args[0], output))

    handles = []
    for module in model.module.modules():
        leaf = not any(True for _ in module.children())
        if id(module) not in inside and (leaf or isinstance(module, nn.MultiheadAttention)):
            handles.append(module.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def token_readout(states: torch.Tensor, y: torch.Tensor, outside: Outside, pool: torch.Tensor, name: str) -> Readout:
    """The weighted sum of the model's last states ``[batch, tokens, hidden]``, with weights ``[batch, tokens]``."""
    norm = None
    if not _same(states, y):
        norm = next(
            (TokenScale.of(*call) for call in outside.calls if _takes(call, y) and _same(call[2], states)), None
        )
        if norm is None:
            raise _refused(name, "its last hidden state is neither the last layer's nor one norm of it")
    return _plain(norm, pool.to(y), y)


def own_readout(pooled: torch.Tensor, y: torch.Tensor, outside: Outside, name: str) -> Readout:
    """How ``pooled [batch, hidden]``, the vector that the model itself gives, comes of the last layer's ``y``.

    Knows a token's state (CLIP's class or end token), a norm before or after it is taken, linear layers after that
    (SigLIP's text tower), and a pooling by attention with a feed-forward part after it (SigLIP's vision tower).
    """
    final = next((call for call in outside.calls if _takes(call, y) and call[2].shape == y.shape), None)
    normed = TokenScale.of(*final) if final is not None else None
    candidates = [(y, None)] if final is None else [(y, None), (final[2], normed)]
    for module, args, gave in outside.attention:
        for states, norm in candidates:
            if gave.shape[1] == 1 and _same(args[1], states):
                return _by_attention(module, args, (pooled - gave[:, 0]).to(y), norm)
    value = pooled
    after: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
    for _ in range(4):  # at most a few modules stand between a token's state and the vector
        for states, norm in candidates:
            pool = _token_of(value, states)
            if pool is not None:
                return _through(_plain(norm, pool.to(y), y), after, name)
        call = next((call for call in outside.calls if _same(call[2], value) and not _same(call[1], value)), None)
        if call is None:
            break
        value = call[1]
        after.insert(0, call)
    raise _refused(name, "its own vector is not a token's state with a norm or linear layers around it")


def _plain(norm: TokenScale | None, pool: torch.Tensor, y: torch.Tensor) -> Readout:
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    return Readout(norm, [pool], [eye], torch.zeros_like(eye[0]), torch.zeros_like(y[:, 0]))


def _through(found: Readout, after: list[tuple[nn.Module, torch.Tensor, torch.Tensor]], name: str) -> Readout:
    for call in after:
        if isinstance(call[0], nn.Linear):
            found = found.projected(call[0])
            continue
        scale = TokenScale.of(*call)
        if scale is None or found.norm is not None or call is not after[0]:
            raise _refused(name, f"{type(call[0]).__name__} stands between a token's state and its vector")
        each = TokenScale(scale.token[:, None], scale.weight, scale.bias, scale.centers)  # one factor a row
        found = Readout(each, found.pools, found.matrices, found.constant, found.rest)
    return found


def _by_attention(
    module: nn.MultiheadAttention, args: tuple[torch.Tensor, ...], rest: torch.Tensor, norm: TokenScale | None
) -> Readout:
    with torch.no_grad():
        _, weights = module(*args, need_weights=True, average_attn_weights=False)
    assert isinstance(module.in_proj_weight, torch.Tensor)
    value = module.in_proj_weight.detach()[-module.embed_dim :].to(rest).unflatten(0, (module.num_heads, -1))
    write = module.out_proj.weight.detach().to(rest).unflatten(1, (module.num_heads, -1))
    matrices = [write[:, p] @ value[p] for p in range(module.num_heads)]
    constant = torch.zeros_like(rest[0])
    if module.in_proj_bias is not None:
        constant = constant + write.flatten(1) @ module.in_proj_bias.detach()[-module.embed_dim :].to(rest)
    if module.out_proj.bias is not None:
        constant = constant + module.out_proj.bias.detach().to(rest)
    return Readout(norm, [weights[:, p, 0].to(rest) for p in range(module.num_heads)], matrices, constant, rest)


def _token_of(value: torch.Tensor, states: torch.Tensor) -> torch.Tensor | None:
    """One-hot ``[batch, tokens]`` of the token whose state each row of ``value`` is, or None."""
    if value.shape != states[:, 0].shape:
        return None
    same = (states.to(value.dtype) == value[:, None]).all(-1)
    return nn.functional.one_hot(same.int().argmax(1), states.shape[1]) if bool(same.any(1).all()) else None


def _takes(call: tuple[nn.Module, torch.Tensor, torch.Tensor], y: torch.Tensor) -> bool:
    return _same(call[1], y) and not _same(call[2], y)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit in the dtype of the model (``y`` may be a wider copy); padding may be NaN in both."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _refused(name: str, why: str) -> InputError:
    return InputError(
        f"The vector of '{name}' cannot be taken apart: {why}. Expected a weighted sum of token states "
        "(pooling='mean', 'cls', ...), or a tower whose own vector is a token's state, projected, or pooled by "
        "attention (CLIP, SigLIP)."
    )
