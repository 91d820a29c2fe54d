"""A tensor in two parts, relevant and irrelevant, that a model's own code carries through its forward pass.

The rules are those of contextual decomposition for Transformers (cd-t): the parts always sum to the whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.errors import UnreadableModelError

__all__ = ["SplitTensor", "activations_split", "cancelled"]


class _Rules(threading.local):
    """Rules that can be switched off, in this thread."""

    cancel = True


_rules = _Rules()
Parts = tuple[torch.Tensor, torch.Tensor]
_T = torch.Tensor


class SplitTensor(torch.Tensor):
    """``relevant + irrelevant``, any shape. Torch functions that have no rule raise UnreadableModelError."""

    relevant: torch.Tensor
    irrelevant: torch.Tensor

    @staticmethod
    def of(relevant: torch.Tensor, irrelevant: torch.Tensor) -> SplitTensor:
        """Join two parts of one shape."""
        whole = (relevant + irrelevant).as_subclass(SplitTensor)
        whole.relevant, whole.irrelevant = relevant, irrelevant
        return whole

    @property
    def whole(self) -> torch.Tensor:
        """The sum as a plain tensor."""
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None and getattr(func, "__name__", "") == "__get__":  # shape, dtype, device, ...
            rule = _on_whole
        with torch._C.DisableTorchFunctionSubclass():
            if rule is None:
                raise UnreadableModelError(
                    f"The model applies {getattr(func, '__name__', func)} to its token states, which contextual "
                    "decomposition has no rule for: expected linear layers, norms, activations, attention and sums."
                )
            return rule(func, args, kwargs)


def cancelled(relevant: torch.Tensor, irrelevant: torch.Tensor) -> SplitTensor:
    """Where the parts have opposite signs the larger takes the sum and the other becomes 0: they can't grow apart."""
    if not _rules.cancel:
        return SplitTensor.of(relevant, irrelevant)
    opposite = relevant * irrelevant < 0
    larger = relevant.abs() >= irrelevant.abs()
    whole = relevant + irrelevant
    zero = torch.zeros_like(whole)
    one = torch.where(opposite, torch.where(larger, whole, zero), relevant)
    other = torch.where(opposite, torch.where(larger, zero, whole), irrelevant)
    return SplitTensor.of(one, other)


def _parts(value: Any, like: torch.Tensor | None = None) -> Parts:
    """Relevant and irrelevant part; a plain tensor or number is irrelevant."""
    if isinstance(value, SplitTensor):
        return value.relevant, value.irrelevant
    plain = (
        value
        if isinstance(value, torch.Tensor)
        else torch.as_tensor(value, dtype=like.dtype if like is not None else None)
    )
    return torch.zeros_like(plain), plain


def _plain(value: Any) -> Any:
    if isinstance(value, SplitTensor):
        return value.whole
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Statistics, scores, softmax, sizes: of the whole, as a plain value."""
    result = func(*_plain(args), **{key: _plain(value) for key, value in kwargs.items()})
    return result.as_subclass(torch.Tensor) if isinstance(result, SplitTensor) else result


def _on_each(func: Any, args: Any, kwargs: Any) -> Any:
    """Shapes, casts, sums, multiples by a number: linear without a constant, of each part."""
    relevant, irrelevant = args[0].relevant, args[0].irrelevant
    rest = tuple(_plain(value) for value in args[1:])
    one, other = func(relevant, *rest, **kwargs), func(irrelevant, *rest, **kwargs)
    if isinstance(one, torch.Tensor):
        return SplitTensor.of(one, other)
    return tuple(SplitTensor.of(a, b) for a, b in zip(one, other, strict=True))


def _shared(relevant: torch.Tensor, irrelevant: torch.Tensor, bias: torch.Tensor | None) -> SplitTensor:
    """Add a bias, shared in proportion to the sizes of the parts; to the irrelevant where both are 0."""
    if bias is not None:
        total = relevant.abs() + irrelevant.abs()
        share = torch.where(total > 0, relevant.abs() / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
        relevant, irrelevant = relevant + share * bias, irrelevant + (1 - share) * bias
    return cancelled(relevant, irrelevant)


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    x, weight, bias = named["input"], named["weight"], named.get("bias")
    if not isinstance(x, SplitTensor):
        return F.linear(x, _plain(weight), bias)
    return _shared(F.linear(x.relevant, weight), F.linear(x.irrelevant, weight), bias)


def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    bias, x, weight = args
    relevant, irrelevant = _parts(x)
    return _shared(relevant @ weight, irrelevant @ weight, bias)


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Both parts centred, divided by the deviation of the whole and scaled; the bias shared."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, over = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    spread = (x.whole.var(over, unbiased=False, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
    weight = 1 if given.get("weight") is None else given["weight"]
    one, other = ((part - part.mean(over, keepdim=True)) * spread * weight for part in (x.relevant, x.irrelevant))
    return _shared(one, other, given.get("bias"))


def _rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)), **kwargs}
    x, over = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    eps = given.get("eps") or torch.finfo(x.whole.dtype).eps
    scale = (x.whole.square().mean(over, keepdim=True) + eps).rsqrt()
    scale = scale if given.get("weight") is None else scale * given["weight"]
    return SplitTensor.of(x.relevant * scale, x.irrelevant * scale)


def _activation(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Irrelevant: what the irrelevant part alone gives; relevant: what the whole gives beyond that."""
    x, rest = args[0], args[1:]
    irrelevant = func(x.irrelevant, *rest, **kwargs)
    return SplitTensor.of(func(x.whole, *rest, **kwargs) - irrelevant, irrelevant)


def _sum(func: Any, args: Any, kwargs: Any) -> Any:
    left, right = args[:2]
    like = left if isinstance(left, torch.Tensor) else right
    a, b = _parts(left, like), _parts(right, like)
    sign = -1 if func in _SUBTRACTIONS else 1
    if func in (_T.__rsub__,):
        a, b = b, a
    factor = sign * kwargs.get("alpha", 1)
    return cancelled(a[0] + factor * b[0], a[1] + factor * b[1])


def _product(func: Any, args: Any, kwargs: Any) -> Any:
    """With a plain factor, of each part; of two split ones (a gate and what it gates) by the activation's rule."""
    left, right = args[:2]
    if isinstance(left, SplitTensor) and isinstance(right, SplitTensor):
        irrelevant = left.irrelevant * right.irrelevant
        return SplitTensor.of(left.whole * right.whole - irrelevant, irrelevant)
    split, factor = (left, right) if isinstance(left, SplitTensor) else (right, left)
    return SplitTensor.of(split.relevant * factor, split.irrelevant * factor)


def _quotient(func: Any, args: Any, kwargs: Any) -> Any:
    left, right = args[0], _plain(args[1])
    if not isinstance(left, SplitTensor):
        return left / right
    return SplitTensor.of(left.relevant / right, left.irrelevant / right)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """Scores of two split sides are taken as they are; weights (plain) times split values are decomposed."""
    left, right = args[:2]
    if isinstance(left, SplitTensor) and isinstance(right, SplitTensor):
        return left.whole @ right.whole
    if isinstance(left, SplitTensor):
        return SplitTensor.of(left.relevant @ right, left.irrelevant @ right)
    return SplitTensor.of(left @ right.relevant, left @ right.irrelevant)


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """The kernel's probabilities from the whole queries and keys, once for each part of the values."""
    named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
    query, key, value = (_plain(named.get(name, kwargs.get(name))) for name in ("query", "key", "value"))
    split = named.get("value", kwargs.get("value"))
    rest = {key: _plain(item) for key, item in kwargs.items() if key not in ("query", "key", "value")}
    if "attn_mask" in named:
        rest["attn_mask"] = _plain(named["attn_mask"])
    rest |= dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))
    if not isinstance(split, SplitTensor):
        return func(query, key, value, **rest)
    return SplitTensor.of(func(query, key, split.relevant, **rest), func(query, key, split.irrelevant, **rest))


def _concatenation(func: Any, args: Any, kwargs: Any) -> Any:
    parts = [_parts(item) for item in args[0]]
    return SplitTensor.of(*(func([part[i] for part in parts], *args[1:], **kwargs) for i in (0, 1)))


_SUBTRACTIONS = {torch.sub, _T.sub, _T.__sub__, _T.__rsub__}
_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.dropout: lambda func, args, kwargs: args[0] if not kwargs.get("training") else _on_each(func, args, kwargs),
    F.scaled_dot_product_attention: _attention,
    torch.cat: _concatenation,
    torch.stack: _concatenation,
}
_ALIKE: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...] = (
    (_activation, (F.gelu, F.silu, F.relu, torch.relu, torch.tanh, _T.tanh, torch.sigmoid, _T.sigmoid, F.softplus)),
    (_sum, (torch.add, _T.add, _T.__add__, _T.__radd__, _T.__iadd__, _T.add_, *_SUBTRACTIONS)),
    (_product, (torch.mul, _T.mul, _T.__mul__, _T.__rmul__, _T.__imul__)),
    (_quotient, (torch.div, _T.div, _T.__truediv__)),
    (_matmul, (torch.matmul, _T.matmul, _T.__matmul__, torch.bmm, _T.bmm, _T.__rmatmul__)),
)
for _rule, _functions in _ALIKE:
    _RULES.update(dict.fromkeys(_functions, _rule))
_EACH = [
    "view",
    "reshape",
    "transpose",
    "permute",
    "contiguous",
    "split",
    "chunk",
    "unflatten",
    "flatten",
    "__getitem__",
    "to",
    "float",
    "double",
    "type_as",
    "clone",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "repeat",
    "repeat_interleave",
    "movedim",
    "sum",
    "mean",
    "neg",
    "__neg__",
    "detach",
    "view_as",
    "unbind",
]
_WHOLE = [
    "baddbmm",
    "pow",
    "square",
    "var",
    "rsqrt",
    "sqrt",
    "softmax",
    "norm",
    "abs",
    "argmax",
    "size",
    "dim",
    "numel",
    "stride",
    "is_floating_point",
    "is_contiguous",
    "isnan",
    "isinf",
    "isfinite",
    "any",
    "all",
    "__len__",
    "__gt__",
    "__lt__",
    "__eq__",
    "__ne__",
    "__repr__",
]
for _names, _rule in ((_EACH, _on_each), (_WHOLE, _on_whole)):
    for _name in _names:
        for _holder in (torch, _T):
            if callable(getattr(_holder, _name, None)):
                _RULES[getattr(_holder, _name)] = _rule
_RULES[F.softmax] = _on_whole


@contextmanager
def activations_split(root: nn.Module, cancel: bool = True) -> Iterator[None]:
    """Have every elementwise module without weights treated by the activation rule, whatever it is written in.

    ``cancel=False`` lets parts of opposite sign stand, in this thread, while the block runs.
    """
    handles, before = [], _rules.cancel

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SplitTensor) and isinstance(output, SplitTensor):
            return _activation(module, args, {})
        return None

    for module in root.modules():
        if _is_activation(module):
            handles.append(module.register_forward_hook(hook))
    _rules.cancel = cancel
    try:
        yield
    finally:
        _rules.cancel = before
        for handle in handles:
            handle.remove()


def _is_activation(module: nn.Module) -> bool:
    plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    if not plain or isinstance(module, (nn.Dropout, nn.Identity)):
        return False
    given = torch.linspace(-1, 1, 8)[None].repeat(2, 1)
    changed = given.clone()
    changed[0, 0] += 1
    try:
        with torch.no_grad():
            before, after = module(given), module(changed)
        return before.shape == given.shape and bool((before == after).sum() >= given.numel() - 1)
    except Exception:  # it takes something else
        return False
