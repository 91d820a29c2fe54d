"""Head pursuit: a head over many texts as a sparse sum of vocabulary directions, and how much a concept's tokens hold.

The logit lens asks which token one output of a head points to. Over many texts at once that is a problem of sparse
coding: find the few rows of the unembedding that the outputs of all texts are sums of. One step on one text is the
logit lens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.act.vectors import last_tokens
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.direct import pooled_writes
from polyhead.heads.logit_lens import LogitLens
from polyhead.heads.vocabulary import single_token
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["CONCEPTS", "HeadPursuit", "Pursuit", "concept_tokens", "heads_like", "somp"]

_COLOURS = "red green blue yellow black white brown orange pink purple grey gray golden silver"
_COUNTRIES = (
    "France Germany Italy Spain England Japan China Russia India Egypt Greece Austria Poland Ireland Norway Sweden "
    "Portugal Turkey Cuba Kenya Thailand Hungary Peru Iran Iraq Canada Finland Denmark Brazil Mexico"
)
_NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen twenty thirty "
    "forty fifty hundred thousand"
)
CONCEPTS: dict[str, tuple[str, ...]] = {
    "colours": tuple(_COLOURS.split()),
    "countries": tuple(_COUNTRIES.split()),
    "numbers": tuple(_NUMBERS.split()),
}
"""Words of a few concepts."""


@dataclass(frozen=True)
class Pursuit:
    """A matrix ``[samples, dim]`` as a sum of a few rows of a dictionary, ``coefficients @ dictionary[atoms]``.

    Attributes:
        atoms: ``[k]``, rows of the dictionary in the order they were picked.
        coefficients: ``[samples, k]``, by least squares on all atoms.
        explained: ``[k]``, share of the matrix's squared norm explained by the atoms up to each.
    """

    atoms: torch.Tensor
    coefficients: torch.Tensor
    explained: torch.Tensor


@paper("head-pursuit")
def somp(samples: torch.Tensor, dictionary: torch.Tensor, k: int) -> Pursuit:
    """Simultaneous orthogonal matching pursuit (Basile et al., head-pursuit, algorithm 1).

    Each step picks the row with the largest ``sum_samples |<residual, row>|`` and refits all picked rows by least
    squares. With one sample it is orthogonal matching pursuit. Rows are taken as they are, so a longer one is picked
    sooner; normalise them where that is not meant.

    The refit is done by one orthogonal direction a step, and products with the dictionary are kept and corrected
    rather than made again: ``2 * rows * (samples + dim)`` operations a step, and ``rows * samples`` numbers held.

    Args:
        samples: ``[samples, dim]``.
        dictionary: ``[rows, dim]``.
        k: atoms to pick; fewer are given where fewer explain all, or the dictionary spans no more.

    Raises:
        InputError: shapes that do not fit together, or no atoms asked for.

    Example:
        >>> import torch
        >>> found = somp(torch.tensor([[0.0, 3.0, 1.0], [0.0, -2.0, 1.0]]), torch.eye(3), 2)
        >>> found.atoms.tolist(), [round(share, 3) for share in found.explained.tolist()]
        ([1, 2], [0.867, 1.0])
    """
    if samples.dim() != 2 or dictionary.dim() != 2 or samples.shape[1] != dictionary.shape[1] or k < 1:
        raise InputError(
            f"somp was given samples {list(samples.shape)}, a dictionary {list(dictionary.shape)} and k={k}; expected "
            "[samples, dim], [rows, dim] and k of 1 or more."
        )
    wide = torch.promote_types(samples.dtype, torch.float32)
    rows, whole = dictionary.detach().to(samples.device, wide), samples.detach().to(wide)
    residual, products = whole.clone(), rows @ whole.T
    basis = torch.zeros(0, rows.shape[1], dtype=wide, device=rows.device)
    size, negligible = whole.square().sum(), torch.finfo(wide).eps * 100
    open_rows = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    atoms: list[int] = []
    explained: list[torch.Tensor] = []
    while len(atoms) < k and bool(open_rows.any()) and bool(residual.square().sum() > negligible**2 * size):
        atom = int(products.abs().sum(1).masked_fill(~open_rows, -1).argmax())
        open_rows[atom] = False
        direction = rows[atom]
        for _ in range(2):  # the second pass takes off what rounding left in the first
            direction = direction - (direction @ basis.T) @ basis
        length = direction.norm()
        if not bool(length > negligible * rows[atom].norm()):
            continue  # the picked rows span it already
        direction = direction / length
        basis = torch.cat([basis, direction[None]])
        along = residual @ direction
        residual -= along[:, None] * direction
        products -= (rows @ direction)[:, None] * along
        atoms.append(atom)
        explained.append(1 - residual.square().sum() / size)
    chosen = torch.tensor(atoms, dtype=torch.long, device=rows.device)
    fit = torch.linalg.lstsq(rows[chosen].double().T, whole.double().T).solution.T if atoms else whole[:, :0]
    return Pursuit(chosen, fit.to(wide), torch.stack(explained) if explained else whole.new_zeros(0))


def concept_tokens(model: HeadedModel, words: Sequence[str]) -> dict[str, int]:
    """Words, and the same with a capital, that are one token of the model (a space before them), with that token.

    Raises:
        InputError: none of them is one token.
    """
    found = single_token(model, list(dict.fromkeys(form for word in words for form in (word, word.capitalize()))))
    if not found:
        raise InputError(f"None of {', '.join(words)} is one token of '{model.name}'; expected some words that are.")
    return found


def heads_like(heads: Iterable[tuple[int, int]], model: HeadedModel, seed: int = 0) -> list[tuple[int, int]]:
    """As many random heads of the same layers, none of them among the given: the control of a choice of heads.

    Where a layer has too few others, the other given layers make up for it.

    Raises:
        InputError: the given layers have too few others together.
    """
    given = list(heads)
    generator = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    spare: list[tuple[int, int]] = []
    for layer in dict.fromkeys(layer for layer, _ in given):
        mine = {head for at, head in given if at == layer}
        others = [head for head in range(model.attention_layers[layer].heads) if head not in mine]
        drawn = [(layer, int(head)) for head in generator.permutation(others)]
        found += drawn[: len(mine)]
        spare += drawn[len(mine) :]
    missing = len(set(given)) - len(found)
    if missing > len(spare):
        raise InputError(
            f"{len(set(given))} heads were given, and their layers have only {len(found) + len(spare)} others."
        )
    return found + [spare[place] for place in generator.permutation(len(spare))[:missing]]


@paper("head-pursuit")
@dataclass
class HeadPursuit(Score):
    """Share of a head's output over texts that a few tokens of a concept explain (Basile et al., head-pursuit).

    ``H [texts, hidden]`` is what the head adds to the state that the unembedding reads, one row a text, with every
    norm on its way at its recorded scale; its product with the unembedding is the head's logit lens. The unembedding's
    rows of the concept's tokens are the dictionary of :func:`somp`, and the score is the share of ``||H||^2`` that is
    explained. To act on the best heads, scale them: ``Gate(numpy.where(found.mask(4), -1.0, 1.0))`` suppresses the
    concept, 5 instead of -1 stresses it.

    ``data``: texts; None takes 64 news items. Texts that end where the concept could come next show most.

    Args:
        concept: a name of :data:`CONCEPTS`, or words; those that are one token count, capitalised as well.
        atoms: tokens picked for each head.
        positions: a text's "last" token, or the "mean" over its tokens.
        max_tokens, batch_size: of texts; longer ones are cut.

    Example:
        >>> prompts = ["Tokyo is a city in", "Rome lies in", "The embassy in Berlin belongs to"]
        >>> prompts.append("He moved from Madrid, in")
        >>> HeadPursuit("countries").score(polyhead.load("gemma-3-270m", lm_head=True), prompts).top(1)
        [(12, 2)]
    """

    name: ClassVar[str] = "head-pursuit"
    summary: ClassVar[str] = "how much of a head's output over texts a few tokens of a concept explain"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "writes the concept's tokens"

    concept: str | Sequence[str] = "colours"
    atoms: int = 10
    positions: Literal["last", "mean"] = "last"
    max_tokens: int = 128
    batch_size: int = 16

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`. Raises InputError where the model gives no logits or no word is one token."""
        return self.shares(model, self.writes(model, data, progress=progress), "ag-news" if data is None else "texts")

    def shares(self, model: HeadedModel, writes: Sequence[torch.Tensor], data: str = "texts") -> HeadMap:
        """The score of what :meth:`writes` gave, so that several concepts can share one run of the model."""
        tokens = concept_tokens(model, self._words())
        dictionary = LogitLens(model).unembedding[list(tokens.values())]
        values = torch.full((model.layers, model.heads), torch.nan, dtype=torch.float64)
        for layer, written in enumerate(writes):
            for head in range(model.attention_layers[layer].heads):
                found = somp(written[:, head], dictionary, self.atoms)
                values[layer, head] = float(found.explained[-1]) if len(found.atoms) else 0.0
        named = self.concept if isinstance(self.concept, str) else "words"
        return self._map(values, model, f"{named}, {data}")

    def read(
        self, model: HeadedModel, heads: Iterable[tuple[int, int]], data: Any = None, k: int = 5
    ) -> dict[tuple[int, int], list[tuple[str, float]]]:
        """The ``k`` tokens of the whole vocabulary that explain each head best, with the share explained up to each.

        ``concept`` plays no part. Holds ``vocabulary * texts`` numbers for one head at a time.
        """
        lens = LogitLens(model)
        written = self.writes(model, data)
        found = {}
        for layer, head in heads:
            pursuit = somp(written[layer][:, head], lens.unembedding, k)
            words = [model.tokenizer.decode([int(token)]) for token in pursuit.atoms]
            found[layer, head] = list(zip(words, pursuit.explained.tolist(), strict=True))
        return found

    def writes(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> list[torch.Tensor]:
        """What each head adds to the state that the unembedding reads: per layer ``[texts, heads, hidden]``."""
        self._words()
        texts = self._texts(data)
        lens = LogitLens(model)
        found: list[list[torch.Tensor]] = [[] for _ in range(model.layers)]
        done = 0
        for first in range(0, len(texts), self.batch_size):
            some = texts[first : first + self.batch_size]
            inputs = model.tokenize(some, truncation=True, max_length=self.max_tokens)
            seen = lens.run(inputs)
            pool = self._pool(inputs["attention_mask"]).to(seen.embedding.dtype)
            for layer, z in enumerate(seen.heads):
                scales = (*seen.branches[layer], seen.norm)
                found[layer].append(pooled_writes(z, model.output_weight(layer).detach(), scales, pool))
            done += len(pool)
            if progress is not None:
                progress(done, len(texts))
        return [torch.cat(parts) for parts in found]

    def _pool(self, mask: torch.Tensor) -> torch.Tensor:
        if self.positions == "last":
            return torch.nn.functional.one_hot(last_tokens(mask), mask.shape[1])
        return mask / mask.sum(1, keepdim=True).clamp(min=1)

    def _words(self) -> Sequence[str]:
        if not isinstance(self.concept, str):
            return self.concept
        if self.concept not in CONCEPTS:
            raise InputError(
                f"No concept '{self.concept}': expected one of {', '.join(CONCEPTS)}, or a list of words of your own."
            )
        return CONCEPTS[self.concept]

    def _texts(self, data: Any) -> list[str]:
        if self.positions not in ("last", "mean"):
            raise InputError(f"positions is {self.positions!r}, expected 'last' or 'mean'.")
        if data is None:
            from polyhead.data import load_texts

            return load_texts("ag-news", 64)
        if isinstance(data, str) or not all(isinstance(text, str) for text in data) or not len(data):
            raise InputError(f"head-pursuit was given {type(data).__name__}, expected a list of texts.")
        return list(data)
