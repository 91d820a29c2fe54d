"""Embeddings by several hashes: small tables for an unlimited vocabulary, and words by their spelling (spaCy's)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["ATTRIBUTES", "HashEmbedding", "MultiHashEmbedding", "collisions", "hash_text", "word_shape"]

_WORD = (1 << 64) - 1
_FIRST, _SECOND = 0x87C37B91114253D5, 0x4CF5AD432745937F
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


@lru_cache(maxsize=1 << 18)
def hash_text(text: str) -> int:
    """64-bit MurmurHash2 of a text in UTF-8, seed 1, as spaCy's string store numbers its strings; signed.

    Example:
        >>> hash_text("apple")
        8566208034543834098
    """
    data, factor = text.encode(), 0xC6A4A7935BD1E995
    found = 1 ^ (len(data) * factor & _WORD)
    whole = len(data) // 8 * 8
    for start in range(0, whole, 8):
        block = int.from_bytes(data[start : start + 8], "little") * factor & _WORD
        found = (found ^ ((block ^ block >> 47) * factor & _WORD)) * factor & _WORD
    if whole < len(data):
        found = (found ^ int.from_bytes(data[whole:], "little")) * factor & _WORD
    found = (found ^ found >> 47) * factor & _WORD
    return _signed(found ^ found >> 47)


def word_shape(word: str) -> str:
    """Letters as ``X`` or ``x``, digits as ``d``, a run of one kind cut at four.

    Example:
        >>> word_shape("GPT-2"), word_shape("Wednesday")
        ('XXX-d', 'Xxxxx')
    """
    if len(word) >= 100:
        return "LONG"
    shape: list[str] = []
    run = 0
    for letter in word:
        kind = ("X" if letter.isupper() else "x") if letter.isalpha() else "d" if letter.isdigit() else letter
        run = run + 1 if shape and kind == shape[-1] else 1
        if run <= 4:
            shape.append(kind)
    return "".join(shape)


ATTRIBUTES: Mapping[str, Callable[[str], str]] = {
    "norm": str.lower,
    "prefix": lambda word: word[:1],
    "suffix": lambda word: word[-3:],
    "shape": word_shape,
}
"""What a word is looked up by: lower case, first letter, last three, shape."""


class HashEmbedding(nn.Module):
    """A vector for any 64-bit key: the sum of the rows that several hashes of the key pick from one small table.

    Two keys share a vector only if all their rows are the same. Rows are those of thinc's ``HashEmbed``: the four
    32-bit parts of a 128-bit MurmurHash3, modulo the rows.

    Args:
        rows: of the table.
        dim: features.
        hashes: rows a key, 1 to 4.
        seed: of the hash.

    Source:
        multi-hash-embed (Miranda et al. 2022, section 2.1).

    Example:
        >>> table = HashEmbedding(rows=1000, dim=32)
        >>> table(torch.tensor([hash_text("apple"), hash_text("pear")])).shape
        torch.Size([2, 32])
    """

    def __init__(self, rows: int, dim: int, hashes: int = 4, seed: int = 0) -> None:
        super().__init__()
        if rows < 1 or dim < 1 or not 1 <= hashes <= 4:
            raise InputError(
                f"rows={rows}, dim={dim}, hashes={hashes} were given; expected at least 1, and 1 to 4 hashes."
            )
        self.hashes, self.seed = hashes, seed
        self.weight = nn.Parameter(torch.empty(rows, dim).uniform_(-0.1, 0.1))

    def rows_of(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows ``[..., hashes]`` of keys ``[...]`` int64."""
        return _hash_keys(keys, self.seed)[..., : self.hashes] % len(self.weight)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``[...]`` int64 -> ``[..., dim]``."""
        rows = self.rows_of(keys)
        flat = nn.functional.embedding_bag(rows.reshape(-1, self.hashes), self.weight, mode="sum")
        return flat.view(*keys.shape, -1)


@paper("multi-hash-embed")
class MultiHashEmbedding(nn.Module):
    """Words by their spelling: a hash embedding for each of several attributes, side by side, mixed by a maxout layer.

    ``maxout`` takes the greatest of ``pieces`` linear maps, feature by feature; a layer norm follows. Any word has a
    vector, seen or not.

    Args:
        dim: features of a word, and of each table.
        rows: of each attribute's table; the keys say which attributes (see ``ATTRIBUTES``).
        hashes: rows a key.
        pieces: of maxout.

    Raises:
        InputError: an attribute that is not known.

    Source:
        multi-hash-embed (Miranda et al. 2022, section 2).

    Example:
        >>> words = MultiHashEmbedding(48)
        >>> vectors, real = words([["Polyhead", "shrinks", "GPT-2"], ["Hello"]])
        >>> vectors.shape, real.tolist()
        (torch.Size([2, 3, 48]), [[True, True, True], [True, False, False]])
    """

    def __init__(
        self, dim: int = 96, rows: Mapping[str, int] | None = None, *, hashes: int = 4, pieces: int = 3
    ) -> None:
        super().__init__()
        rows = {"norm": 5000, "prefix": 1000, "suffix": 2500, "shape": 2500} if rows is None else rows
        unknown = [name for name in rows if name not in ATTRIBUTES]
        if unknown or not rows or pieces < 1:
            raise InputError(
                f"Attributes {list(rows)} and pieces={pieces} were given; expected some of {', '.join(ATTRIBUTES)}, "
                "and at least 1 piece."
            )
        self.tables = nn.ModuleDict(
            {name: HashEmbedding(count, dim, hashes, seed=at) for at, (name, count) in enumerate(rows.items())}
        )
        self.pieces = pieces
        self.mixer = nn.Linear(len(rows) * dim, pieces * dim)
        self.norm = nn.LayerNorm(dim)

    def keys(self, texts: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[texts, words, attributes]`` int64 of texts cut into words, and ``[texts, words]`` True at words."""
        longest = max((len(text) for text in texts), default=0)
        keys = np.zeros((len(texts), longest, len(self.tables)), np.int64)
        for row, text in enumerate(texts):
            for at, word in enumerate(text):
                keys[row, at] = [hash_text(ATTRIBUTES[name](word)) for name in self.tables]
        lengths = torch.tensor([len(text) for text in texts])
        return torch.from_numpy(keys), torch.arange(longest) < lengths[:, None]

    def forward(self, texts: Sequence[Sequence[str]] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Words of texts, or their :meth:`keys`, -> vectors ``[texts, words, dim]`` and where there are words."""
        if isinstance(texts, torch.Tensor):
            keys, real = texts, torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
        else:
            keys, real = (each.to(self.mixer.weight.device) for each in self.keys(texts))
        each = [table(keys[..., at]) for at, table in enumerate(self.tables.values())]
        mixed = self.mixer(torch.cat(each, -1)).unflatten(-1, (-1, self.pieces)).amax(-1)
        return self.norm(mixed), real


def collisions(keys: torch.Tensor, table: HashEmbedding) -> dict[str, float]:
    """What keys of a vocabulary share.

    Args:
        keys: ``[n]`` int64, different.
        table: they are looked up in.

    Returns:
        ``same_vector``: share of keys that cannot be told from another, and ``own_row``: share with a row of their own.
    """
    rows = table.rows_of(keys).sort(1).values
    _, group, sizes = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    used = torch.bincount(rows.flatten(), minlength=len(table.weight))
    own = (used[rows] == (rows[:, :, None] == rows[:, None]).sum(2)).any(1)
    return {"same_vector": float((sizes[group] > 1).double().mean()), "own_row": float(own.double().mean())}


def _hash_keys(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """MurmurHash3 of 64-bit keys: four numbers of 32 bits each, ``[..., 4]``."""
    first = keys.long() * _signed(_FIRST)
    first = ((first << 31) | _right(first, 33)) * _signed(_SECOND) ^ seed ^ 8
    second = torch.full_like(first, seed ^ 8)
    first = first + second
    second = second + first
    first, second = _mixed(first), _mixed(second)
    first = first + second
    second = second + first
    low = (1 << 32) - 1
    return torch.stack([first & low, _right(first, 32), second & low, _right(second, 32)], -1)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    for factor in _MIX:
        words = (words ^ _right(words, 33)) * _signed(factor)
    return words ^ _right(words, 33)


def _right(words: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right with zeros coming in, which torch has for no signed kind."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
