"""FlexAttention for heads with spans of their own: key blocks that nobody in a query block can see are skipped.

On a CPU it runs without gradients only and has to be compiled by a C++ compiler, once in a process for each dtype,
number of heads and head width, whatever the length. Where it does not apply, or a probe shows other values than SDPA
with a mask, SDPA runs.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from polyhead.attention.base import repeat_groups

__all__ = ["UNIT", "flex_refusal", "span_attention"]

UNIT = 2**20
"""One token, in the units that spans are given in."""
_BLOCK = 128
_NEAR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def span_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor, sinks: int = 0
) -> torch.Tensor:
    """Causal softmax attention in which each head sees the latest tokens of a span of its own, and the first ones.

    FlexAttention runs where :func:`flex_refusal` has nothing against it, SDPA with a mask elsewhere.

    Args:
        q: ``[batch, heads, tokens, head_dim]``, scaled.
        k, v: ``[batch, kv_heads, tokens, head_dim]``.
        spans: ``[heads, 2]`` whole numbers ``start, grow`` in ``UNIT``: the query at place ``i`` (from 0) sees
            ``(start + grow (i + 1)) // UNIT`` tokens, at least itself; ``grow`` from 0 to ``UNIT``.
        sinks: first tokens that are seen always.

    Returns:
        ``[batch, heads, tokens, head_dim]``.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
        >>> span_attention(q, k, v, torch.tensor([[2 * UNIT, 0], [0, UNIT]]), sinks=1).shape
        torch.Size([1, 2, 9, 8])
    """
    if not flex_refusal(q, k, v):
        try:
            return _flexed(q, k, v, spans, sinks)
        except Exception as error:  # the compiler's, of any kind
            warnings.warn(f"FlexAttention failed, SDPA with a mask runs in its place: {error}", stacklevel=2)
    return _masked(q, k, v, spans, sinks)


def flex_refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Why FlexAttention does not apply to queries, keys and values; empty where it does.

    The first call for a dtype, a number of heads times texts and a head width compiles, and compares a small case with
    SDPA; where torch has compiled for as many of these as it allows, that is a refusal, too.
    """
    if torch.compiler.is_compiling():
        return "the layer itself is being compiled"
    if torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        return "gradients are wanted, and it has none on a CPU"
    if q.device.type != "cpu" or q.dtype not in _NEAR:
        return f"{q.dtype} on {q.device.type}: probed for float32, bfloat16 and float16 on a CPU only"
    if q.shape[2] != k.shape[2] or q.shape[2] < 2 * _BLOCK:
        return f"{q.shape[2]} queries on {k.shape[2]} keys: for whole texts of {2 * _BLOCK} tokens or more"
    return _probe(q.dtype, q.shape[0] * q.shape[1], q.shape[3])


@lru_cache(maxsize=64)
def _probe(dtype: torch.dtype, heads: int, size: int) -> str:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"this CPU offers {torch.backends.cpu.get_cpu_capability()}; it needs AVX2"
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler to compile it with"
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * _BLOCK + 44
    q, k, v = (torch.randn(1, heads, tokens, size, generator=generator).to(dtype) for _ in range(3))
    q = q * size**-0.5
    spans = torch.tensor([[61 * UNIT * (head % 5), UNIT // 4 * (head % 2)] for head in range(heads)])
    try:
        with torch.inference_mode():
            gap = (_flexed(q, k, v, spans, 3) - _masked(q, k, v, spans, 3)).abs().max().item()
    except Exception as error:  # the compiler's, of any kind
        return f"it could not be compiled: {error}"
    return "" if gap <= _NEAR[dtype] else f"a probe differs from SDPA by {gap:.1e}"


def _lowest(spans: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[heads, places]`` the first key of a query's span."""
    return places + 1 - ((spans[:, :1] + spans[:, 1:] * (places + 1)) // UNIT).clamp_min(1)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor, sinks: int) -> torch.Tensor:
    places = torch.arange(q.shape[2], device=q.device)
    met = ((places >= _lowest(spans, places)[..., None]) | (places < sinks)) & (places <= places[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=met[None], scale=1.0, enable_gqa=q.shape[1] != k.shape[1])


def _flexed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor, sinks: int) -> torch.Tensor:
    """Texts side by side as heads, each with keys of its own: for batches and groups torch 2.13 writes broken C++."""
    batch, heads, tokens, _ = q.shape
    q, k, v = (repeat_groups(each, heads).flatten(0, 1)[None].contiguous() for each in (q, k, v))
    mask = _block_mask(spans.repeat(batch, 1), sinks, tokens)
    out: torch.Tensor = _compiled()(q, k, v, block_mask=mask, scale=1.0)
    return out.unflatten(1, (batch, heads))[0]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """One for all lengths; whole graphs only, so that too many recompilations raise in place of running unfused."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_mask(spans: torch.Tensor, sinks: int, tokens: int) -> Any:
    """Which key blocks each query block of a head sees in part or in full.

    Written down from the spans: ``create_block_mask`` would ask for every pair of tokens. What the mask reads has one
    size for all lengths, since torch 2.13 mistakes the names of other sizes for those of its blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask

    begin = torch.arange(0, tokens, _BLOCK, device=spans.device)
    end = (begin + _BLOCK).clamp_max(tokens) - 1
    first, last = (_lowest(spans, each)[..., None] for each in (begin, end))  # as it never falls from query to query
    seen = (begin <= end[:, None]) & ((end >= first) | (begin < sinks))
    whole = (end <= begin[:, None]) & ((begin >= last) | (end < sinks))
    start, grow = spans.T.contiguous()
    bound = torch.tensor(sinks, device=spans.device)
    torch._dynamo.mark_static(start)
    torch._dynamo.mark_static(grow)

    def sees(batch: torch.Tensor, head: torch.Tensor, asked: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        near = (asked - key + 1) * UNIT <= start[head] + grow[head] * (asked + 1)
        return (key <= asked) & (near | (key == asked) | (key < bound))

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of ``[heads, query blocks, key blocks]`` are True, and which, True ones first."""
    order = (~blocks).int().argsort(dim=-1, stable=True)
    return blocks.sum(-1).int()[None], order.int()[None]
