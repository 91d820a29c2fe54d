"""Where tokens to put in place of others come from: word frequencies, a causal model, a masked language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["CausalReplacer", "MaskedReplacer", "Replacer", "UnigramReplacer"]


class Replacer(Protocol):
    """Anything that can be called like this; a plain function will do."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Changed copies of a text.

        Args:
            ids: ``[tokens]``, the text.
            mask: boolean ``[rows, tokens]``, True where a copy's token is to be replaced.
            generator: of everything random, on the CPU.

        Returns:
            ``[rows, tokens]`` token ids, those of the text where ``mask`` is False.
        """
        ...


class UnigramReplacer:
    """Tokens drawn by how often they occur, whatever stands around them.

    Args:
        counts: ``[vocabulary]``, not negative.

    Example:
        >>> replace = UnigramReplacer(torch.tensor([0.0, 3.0, 1.0]))
        >>> everything = torch.ones(1, 4, dtype=torch.bool)
        >>> int(replace(torch.zeros(4, dtype=torch.long), everything, torch.Generator()).min()) > 0
        True
    """

    def __init__(self, counts: torch.Tensor) -> None:
        if counts.dim() != 1 or bool((counts < 0).any()) or float(counts.sum()) <= 0:
            raise InputError("UnigramReplacer needs counts [vocabulary], none negative and not all 0.")
        self.counts = counts.double().cpu()
        self._tokens = self.counts.nonzero()[:, 0]

    @classmethod
    def from_texts(cls, model: HeadedModel, texts: Sequence[str]) -> UnigramReplacer:
        """Counts of the texts' tokens by the model's tokenizer; tokens that stand for no text do not count.

        Raises:
            InputError: texts without a token.
        """
        special = set(model.tokenizer.all_special_ids)
        found = [i for ids in model.tokenizer(list(texts))["input_ids"] for i in ids if i not in special]
        if not found:
            raise InputError(f"UnigramReplacer was given {len(texts)} texts without a token; expected some text.")
        return cls(torch.bincount(torch.tensor(found)))

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See :class:`Replacer`."""
        chosen = torch.multinomial(self.counts[self._tokens], mask.numel(), replacement=True, generator=generator)
        return torch.where(mask, self._tokens[chosen].view(mask.shape).to(ids), ids)


class CausalReplacer:
    """Tokens drawn from what a causal model expects after the tokens before; the first one from all tokens alike.

    All places are filled from the unchanged text's own left context, so one pass serves every copy.

    Args:
        model: with its language-model head; the explained model itself will do.
        temperature: of the draw.
    """

    def __init__(self, model: HeadedModel, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}, expected more than 0.")
        self.model, self.temperature = model, temperature
        self._text: torch.Tensor | None = None
        self._chances = torch.empty(0)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See :class:`Replacer`."""
        if self._text is None or not torch.equal(self._text, ids):
            with torch.inference_mode():
                logits = getattr(self.model(input_ids=ids[None].to(self.model.device)), "logits", None)
            if logits is None:
                raise InputError(f"'{self.model.name}' gives no logits: load it with load(name, lm_head=True).")
            after = torch.softmax(logits[0, :-1].float() / self.temperature, -1)
            first = torch.full_like(logits[:1, 0], 1 / logits.shape[-1], dtype=torch.float32)
            self._text, self._chances = ids.clone(), torch.cat([first, after]).cpu()
        return _draw(self._chances, ids, mask, generator)


class MaskedReplacer:
    """Tokens drawn from what a masked language model expects between the tokens around: the paper's own replacer.

    Args:
        module: such as a ``RobertaForMaskedLM``, called as ``module(input_ids=...).logits``.
        mask_id: its mask token.
        to_masked: ``[vocabulary]``, the masked model's token for each of the explained model's, -1 where it has none
            (such a token is masked, and never drawn); None where both have the same vocabulary.
    """

    def __init__(self, module: nn.Module, mask_id: int, to_masked: torch.Tensor | None = None) -> None:
        self.module, self.mask_id, self.to_masked = module, mask_id, to_masked

    @classmethod
    def between(cls, model: HeadedModel, module: nn.Module, tokenizer: Any) -> MaskedReplacer:
        """For two vocabularies: tokens that are written the same, with their leading space, answer each other."""

        def written(one: Any) -> dict[str, int]:
            special = set(one.all_special_ids)
            marks = str.maketrans({"▁": " ", "Ġ": " "})
            return {token.translate(marks): i for token, i in one.get_vocab().items() if i not in special}

        own, other = written(model.tokenizer), written(tokenizer)
        table = torch.full((max(own.values()) + 1,), -1)
        for token, i in own.items():
            table[i] = other.get(token, -1)
        return cls(module, int(tokenizer.mask_token_id), table)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """See :class:`Replacer`."""
        rows = ids.expand(mask.shape) if self.to_masked is None else self.to_masked[ids.cpu()].expand(mask.shape)
        asked = torch.where(mask.cpu() | (rows.cpu() < 0), self.mask_id, rows.cpu())
        device = next(self.module.parameters()).device
        with torch.inference_mode():
            logits = self.module(input_ids=asked.to(device)).logits.float().cpu()
        if self.to_masked is None:
            logits = logits.index_fill(-1, torch.tensor([self.mask_id]), -torch.inf)
        else:
            known = (self.to_masked >= 0).nonzero()[:, 0]
            only = torch.full((*logits.shape[:2], len(self.to_masked)), -torch.inf)
            only[..., known] = logits[..., self.to_masked[known]]
            logits = only
        return _draw(torch.softmax(logits, -1), ids, mask, generator)


def _draw(chances: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace by draws from ``chances``, ``[tokens, vocabulary]`` for all rows or ``[rows, tokens, vocabulary]``."""
    changed = ids.repeat(len(mask), 1)
    row, token = mask.cpu().nonzero(as_tuple=True)
    if len(row):
        one_each = chances[token] if chances.dim() == 2 else chances[row, token]
        drawn = torch.multinomial(one_each, 1, generator=generator)[:, 0]
        changed[row.to(ids.device), token.to(ids.device)] = drawn.to(ids)
    return changed
