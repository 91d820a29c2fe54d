"""Time, memory and cache of mechanisms against tokens, beside plain attention through SDPA in the same run."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyhead.attention.base import Attention
from polyhead.attention.call import AttentionShape
from polyhead.errors import InputError

__all__ = ["BenchRow", "bench", "crossover", "growth"]

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class BenchRow:
    """One mechanism at one length.

    Attributes:
        name: of the mechanism.
        tokens: length of the text.
        milliseconds: median time of a forward pass without gradients.
        ratio: that time over SDPA's, from rounds in which they took turns.
        peak_mib: most memory that tensors of the pass held at once, MiB.
        cache_bytes: bytes kept after that many tokens of decoding, 2 bytes a number; None where it cannot decode.
    """

    name: str
    tokens: int
    milliseconds: float
    ratio: float
    peak_mib: float
    cache_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench(
    layers: dict[str, Attention],
    lengths: Sequence[int],
    *,
    rounds: int = 3,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> list[BenchRow]:
    """Run each layer on one text of each length, turn by turn with plain attention of the same width.

    Args:
        layers: by name, all of one width.
        lengths: tokens.
        rounds: timed passes each; the median counts.
        seconds: a layer that is expected to take longer than this in all at a length is left out there: it has no row;
            the same where it refuses the length.
        progress: called with steps done and steps in all.

    Raises:
        InputError: lengths below 1, or layers of several widths.
    """
    if not lengths or min(lengths) < 1:
        raise InputError(f"Lengths {list(lengths)} were given; expected whole numbers of tokens from 1.")
    if len({(layer.dim, layer.causal) for layer in layers.values()}) > 1:
        raise InputError("Layers of several widths or directions were given; expected one, so that times compare.")
    some = next(iter(layers.values()))
    assert some.shape is not None
    plain = Attention(AttentionShape(some.dim, some.shape.heads), causal=some.causal).eval()
    rows: list[BenchRow] = []
    last: dict[str, tuple[int, float]] = {}
    total = len(layers) * len(lengths)
    for done, (tokens, name) in enumerate((tokens, name) for tokens in sorted(lengths) for name in layers):
        if progress is not None:
            progress(done, total)
        layer = layers[name].eval()
        before = last.get(name)
        if before is not None and before[1] * (tokens / before[0]) ** 2 * (rounds + 2) > seconds:
            continue
        try:
            row = _row(name, layer, plain, tokens, rounds)
        except InputError:  # a layer of fixed length, which takes no longer text
            continue
        last[name] = (tokens, row.milliseconds / 1000)
        rows.append(row)
    if progress is not None:
        progress(total, total)
    return rows


def growth(rows: Sequence[BenchRow], name: str) -> float | None:
    """Power of tokens that a mechanism's time grows with, over the last lengths; None for too few."""
    own = sorted((row.tokens, row.milliseconds) for row in rows if row.name == name)
    if len(own) < 2:
        return None
    (short, fast), (long, slow) = own[max(0, len(own) - 3)], own[-1]
    return math.log(slow / fast) / math.log(long / short)


def crossover(rows: Sequence[BenchRow], name: str) -> int | None:
    """The least length measured from which on a mechanism is faster than SDPA; None where it is not."""
    own = sorted((row.tokens, row.ratio) for row in rows if row.name == name)
    found = None
    for tokens, ratio in reversed(own):
        if ratio >= 1:
            break
        found = tokens
    return found


def _row(name: str, layer: Attention, plain: Attention, tokens: int, rounds: int) -> BenchRow:
    hidden = torch.randn(1, tokens, layer.dim, generator=torch.Generator().manual_seed(0))
    own: list[float] = []
    theirs: list[float] = []
    with torch.inference_mode():
        peak = _peak_mib(lambda: layer(hidden))
        plain(hidden)
        for _ in range(rounds):
            theirs.append(_seconds(lambda: plain(hidden)))
            own.append(_seconds(lambda: layer(hidden)))
    taken, reference = statistics.median(own), statistics.median(theirs)
    cache = layer.cache_bytes(tokens) if layer.causal else None
    return BenchRow(name, tokens, 1000 * taken, taken / reference, peak, cache)


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _peak_mib(run: Callable[[], Any]) -> float:
    """Most bytes that the tensors of every operation in ``run`` held at once; what a kernel keeps inside is unseen."""
    with _Held() as held:
        run()
    return held.most / 2**20


class _Held(TorchDispatchMode):
    """Adds up the storages of live tensors, operation by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                self._add(each, given)
        return found

    def _add(self, tensor: torch.Tensor, given: set[int]) -> None:
        where = _storage(tensor)
        if where not in self.users:
            if where in given:
                return
            self.users[where] = 0
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)
        self.users[where] += 1
        weakref.finalize(tensor, self._drop, where, tensor.untyped_storage().nbytes())

    def _drop(self, where: int, size: int) -> None:
        self.users[where] -= 1
        if not self.users[where]:
            del self.users[where]
            self.now -= size


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
