"""Batches far larger than memory: InfoNCE by blocks of rows, and the two-pass step with cached gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import InputError

__all__ = ["LargeBatchInfoNCE", "cached_step"]


class LargeBatchInfoNCE(nn.Module):
    """InfoNCE with cosine similarity of pairs, without ever holding the ``[n, m]`` matrix.

    Log-sums are gathered block by block, and so is the gradient, in the same call: memory is ``chunk * m`` numbers and
    the gradient of the vectors. Same value and gradient as ``Objective(InfoNCE(...))``, with or without ``Symmetric``
    and ``FalseNegativeMask(margin=...)``.

    Args:
        temperature: of the softmax.
        symmetric: the mean of both directions; columns without a positive are no anchors.
        mask_margin: ignore negatives more similar to the anchor than its positive plus this; None: off.
        chunk: rows compared at once.

    Example:
        >>> import torch
        >>> from polyhead.objectives import LargeBatchInfoNCE
        >>> x = torch.eye(3, requires_grad=True)
        >>> loss = LargeBatchInfoNCE(temperature=1.0, chunk=2)(x, torch.eye(3))
        >>> loss.backward()
        >>> round(loss.item(), 4), x.grad.shape
        (0.5514, torch.Size([3, 3]))
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        symmetric: bool = False,
        mask_margin: float | None = None,
        chunk: int = 1024,
    ) -> None:
        super().__init__()
        if temperature <= 0 or chunk < 1:
            raise InputError(f"temperature {temperature} and chunk {chunk}: expected both above 0.")
        self.temperature = temperature
        self.symmetric = symmetric
        self.mask_margin = mask_margin
        self.chunk = chunk

    def forward(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            x: ``[n, d]`` anchors.
            y: ``[m, d]``: the positive of each anchor first, then further negatives, ``m >= n``.
            ids: ``[m]`` integers: columns of the same id as an anchor's positive are not its negatives (doubles in the
                batch); None: all differ.
        """
        if x.ndim != 2 or y.ndim != 2 or len(y) < len(x) or x.shape[1] != y.shape[1]:
            raise InputError(f"Expected x [n, d] and y [m, d] with m >= n, got {tuple(x.shape)}, {tuple(y.shape)}.")
        half = (torch.float16, torch.bfloat16)
        x, y = (part.float() if part.dtype in half else part for part in (x, y))
        x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
        loss: Tensor = _Chunked.apply(x, y, ids, self)
        return loss


class _Chunked(torch.autograd.Function):
    """Loss of unit vectors; the gradient is computed with the value, for the loss is one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ids: Tensor | None, knobs: LargeBatchInfoNCE) -> Tensor:
        n = len(x)
        rows, columns = x.new_empty(n), x.new_full((n,), -torch.inf)
        gold = (x * y[:n]).sum(1) / knobs.temperature
        for start, logits in _blocks(x, y, ids, gold, knobs):
            rows[start : start + len(logits)] = logits.logsumexp(1)
            if knobs.symmetric:
                block = logits[:, :n]
                if knobs.mask_margin is not None:
                    block = _unmasked(x, y, ids, gold, knobs, start, len(logits))
                columns = torch.logaddexp(columns, block.logsumexp(0))
        value = (rows - gold).mean()
        if knobs.symmetric:
            value = (value + (columns - gold).mean()) / 2
        ctx.needs = ctx.needs_input_grad[:2]
        if any(ctx.needs):
            ctx.save_for_backward(*_gradients(x, y, ids, (gold, rows, columns), knobs))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_y = ctx.saved_tensors
        return (to_x * grads[0] if ctx.needs[0] else None, to_y * grads[0] if ctx.needs[1] else None, None, None)


def _blocks(
    x: Tensor, y: Tensor, ids: Tensor | None, gold: Tensor, knobs: LargeBatchInfoNCE
) -> Iterator[tuple[int, Tensor]]:
    """Logits ``[rows, m]`` of one block of anchors after the other, ``-inf`` where a pair is ignored."""
    for start in range(0, len(x), knobs.chunk):
        logits = _logits(x, y, ids, knobs, start, min(knobs.chunk, len(x) - start))
        if knobs.mask_margin is not None:
            limit = gold[start : start + len(logits), None] + knobs.mask_margin / knobs.temperature
            _ignore(logits, logits > limit, start)
        yield start, logits


def _logits(x: Tensor, y: Tensor, ids: Tensor | None, knobs: LargeBatchInfoNCE, start: int, count: int) -> Tensor:
    logits = x[start : start + count] @ y.T
    logits /= knobs.temperature
    if ids is not None:
        _ignore(logits, ids[start : start + count, None] == ids[None, :], start)
    return logits


def _ignore(logits: Tensor, ignored: Tensor, start: int) -> None:
    own = torch.arange(len(logits), device=logits.device)
    ignored[own, own + start] = False
    logits.masked_fill_(ignored, -torch.inf)


def _unmasked(
    x: Tensor, y: Tensor, ids: Tensor | None, gold: Tensor, knobs: LargeBatchInfoNCE, start: int, count: int
) -> Tensor:
    """Logits ``[count, n]`` of a block as the columns see them: masked by the columns' own positives."""
    n = len(x)
    logits = _logits(x, y[:n], None if ids is None else ids[:n], knobs, start, count)
    assert knobs.mask_margin is not None
    _ignore(logits, logits > gold[None, :] + knobs.mask_margin / knobs.temperature, start)
    return logits


def _gradients(
    x: Tensor, y: Tensor, ids: Tensor | None, sums: tuple[Tensor, Tensor, Tensor], knobs: LargeBatchInfoNCE
) -> tuple[Tensor, Tensor]:
    gold, rows, columns = sums
    n = len(x)
    to_x, to_y = torch.zeros_like(x), torch.zeros_like(y)
    for start, logits in _blocks(x, y, ids, gold, knobs):
        here = slice(start, start + len(logits))
        share = (logits[:, :n].clone() if knobs.mask_margin is None else None) if knobs.symmetric else None
        weight = logits.sub_(rows[here, None]).exp_()
        if knobs.symmetric:
            if share is None:
                share = _unmasked(x, y, ids, gold, knobs, start, len(weight))
            weight[:, :n] += share.sub_(columns[None]).exp_()
            weight /= 2
        own = torch.arange(len(weight), device=x.device)
        weight[own, own + start] -= 1
        weight /= n * knobs.temperature
        to_x[here] = weight @ y
        to_y += weight.T @ x[here]
    return to_x, to_y


def cached_step(
    encode: Callable[[Any], Tensor],
    sides: Sequence[Sequence[Any]],
    objective: Callable[..., Tensor],
) -> Tensor:
    """A training step on a batch of any size in the memory of one small batch (GradCache, arXiv 2101.06983).

    First every small batch is encoded without a graph; then the objective gives the gradient of the vectors; then
    every small batch is encoded again, with a graph and the same random numbers, and its share of the gradient is
    passed on. Gradients are added to ``.grad`` as by ``loss.backward()`` of the whole batch.

    Args:
        encode: one small batch -> ``[rows, d]``. Called twice for each; layers that keep statistics of batches
            (batch norm) count each batch twice and see it alone.
        sides: for each argument of the objective, its small batches: ``[anchors, others]``.
        objective: ``objective(vectors of side 0, vectors of side 1, ...) -> scalar``.

    Returns:
        The loss of the whole batch, detached.

    Example:
        >>> import torch
        >>> from polyhead.objectives import LargeBatchInfoNCE, cached_step
        >>> model = torch.nn.Linear(4, 2)
        >>> queries, documents = torch.randn(6, 4), torch.randn(6, 4)
        >>> loss = cached_step(model, [queries.split(2), documents.split(3)], LargeBatchInfoNCE())
        >>> model.weight.grad is not None
        True
    """
    states: list[list[tuple[Tensor, list[Tensor]]]] = []
    vectors: list[list[Tensor]] = []
    with torch.no_grad():
        for batches in sides:
            states.append([])
            vectors.append([])
            for batch in batches:
                states[-1].append(_random_state())
                vectors[-1].append(encode(batch))
    whole = [torch.cat(parts).requires_grad_() for parts in vectors]
    with torch.enable_grad():
        loss = objective(*whole)
    loss.backward()  # to the vectors, and to parameters of the objective itself
    for batches, parts, kept, side in zip(sides, vectors, states, whole, strict=True):
        if side.grad is None:
            continue
        gradients = side.grad.split([len(part) for part in parts])
        for batch, state, gradient in zip(batches, kept, gradients, strict=True):
            with _restored(state), torch.enable_grad():
                again = encode(batch)
            if again.requires_grad:
                again.backward(gradient.to(again.dtype))
    return loss.detach()


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


@contextmanager
def _restored(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """The random numbers of the first pass, for the second; afterwards those that would have come next."""
    now = _random_state()
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    try:
        yield
    finally:
        torch.set_rng_state(now[0])
        if now[1]:
            torch.cuda.set_rng_state_all(now[1])
