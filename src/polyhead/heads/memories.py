"""Feed-forward layers as key-value memories: what wakes each memory, what it promotes, and whether the two agree.

A layer gives ``sum_i m_i v_i``: key ``k_i`` is a detector of patterns in the text before, its coefficient ``m_i =
f(x . k_i)`` (in a gated layer ``f(x . k_i) (x . u_i)``) the weight of value ``v_i``, which is read as a vote over the
next token through the unembedding. The coefficients are what enters the layer's last projection, in any model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads._feedforward import tap_memories
from polyhead.heads.base import Progress
from polyhead.heads.embedding_space import EmbeddingSpace
from polyhead.heads.streaming import check_texts, text_batches
from polyhead.heads.vocabulary import places
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["Agreement", "Composition", "Memories", "Trigger"]


class Trigger(NamedTuple):
    """A prefix that wakes a memory.

    Attributes:
        layer, memory: which.
        coefficient: ``m`` at the prefix's last token.
        ids: tokens of the prefix, special ones included.
        next_token: the one that follows it in its text.
        text: index of the text.
    """

    layer: int
    memory: int
    coefficient: float
    ids: tuple[int, ...]
    next_token: int
    text: int


@dataclass(frozen=True)
class Agreement:
    """How often a value's top token is the token that follows its key's top trigger.

    Attributes:
        hits: per layer ``[memories looked at]``.
        shuffled: per layer ``[memories looked at]``, the chance of a hit with the value of another memory of the layer,
            exact over all of those looked at.
        ranks, shuffled_ranks: per layer ``[memories looked at]``, the share of the vocabulary that the value puts above
            the token that follows (ties count half), and above that of another memory's trigger, one at random.
        triggers: per layer the top trigger of each memory looked at.
    """

    hits: list[np.ndarray]
    shuffled: list[np.ndarray]
    ranks: list[np.ndarray]
    shuffled_ranks: list[np.ndarray]
    triggers: list[list[Trigger]]

    @property
    def rates(self) -> np.ndarray:
        """Share of hits, ``[layers]``."""
        return np.array([layer.mean() for layer in self.hits])

    @property
    def shuffled_rates(self) -> np.ndarray:
        """Share of hits with values shuffled across keys, ``[layers]``."""
        return np.array([layer.mean() for layer in self.shuffled])


@dataclass(frozen=True)
class Composition:
    """How often a layer's top token is that of none of its active memories.

    Attributes:
        layers: which.
        rates: ``[layers]`` share of positions where no active memory alone votes for what the layer votes for.
        active: ``[layers]`` mean share of memories that were active.
    """

    layers: list[int]
    rates: np.ndarray
    active: np.ndarray


@paper("ffn-key-value")
class Memories:
    """The feed-forward memories of a model (Transformer Feed-Forward Layers Are Key-Value Memories).

    Special tokens and padding are left out; so is the last token of a text, which none follows. In a model that sees
    both ways (BERT) a coefficient belongs to a token in its whole text, and only :meth:`top_prefixes` and
    :meth:`value_tokens` are defined.

    Args:
        model: any text model; for what asks for the next token, a decoder.
        max_tokens: of each text.
        batch_size: texts at once.

    Example:
        >>> memories = Memories(load("gemma-3-270m"))
        >>> texts = load_texts("ag-news", 32)
        >>> best = memories.top_prefixes(texts, layer=10, memories=[7], k=3)[0][0]
        >>> memories.text(best), memories.value_tokens(layer=10, memory=7, k=5)  # doctest: +SKIP
    """

    def __init__(self, model: HeadedModel, *, max_tokens: int = 64, batch_size: int = 16) -> None:
        self.model = model
        self.space = EmbeddingSpace(model)
        self.layers = self.space.feedforward
        self.max_tokens, self.batch_size = max_tokens, batch_size

    def text(self, trigger: Trigger) -> str:
        """A trigger's prefix as text."""
        return str(self.model.tokenizer.decode(list(trigger.ids)))

    def value_tokens(self, layer: int, memory: int, k: int = 10) -> list[tuple[int, float]]:
        """The ``k`` tokens a memory's value promotes most, with their logits up to a factor: ``v E^T``."""
        return self.space.ffn(layer, memory, k).value

    def top_prefixes(
        self, texts: Sequence[str], layer: int, *, memories: Sequence[int] | None = None, k: int = 25
    ) -> list[list[Trigger]]:
        """The ``k`` prefixes of the texts with the largest coefficients of each memory, largest first.

        Args:
            texts: each gives as many prefixes as it has tokens that another follows.
            layer: which.
            memories: of the layer; None for all of them.
            k: fewer where there are fewer prefixes.

        Raises:
            InputError: no such layer or memory, or texts without two tokens.
        """
        chosen = self._chosen(layer, memories)
        return self._triggers(texts, {layer: chosen}, k)[layer]

    def agreement_rate(
        self, texts: Sequence[str], *, per_layer: int | None = None, seed: int = 0, progress: Progress | None = None
    ) -> Agreement:
        """How often the top token of a value is the one that follows its key's top trigger (section 4), layer by layer.

        Args:
            texts: where triggers are looked for.
            per_layer: memories drawn at random in each layer; None for all.
            seed: of the draw.
            progress: told of the texts.

        Raises:
            InputError: a model without an unembedding.
        """
        self.space.weights.require_unembedding()
        generator = np.random.default_rng(seed)
        chosen: dict[int, list[int]] = {}
        for at in self.layers:
            count = at.memories if per_layer is None else min(per_layer, at.memories)
            chosen[at.layer] = sorted(generator.choice(at.memories, count, replace=False).tolist())
        found = self._triggers(texts, chosen, 1, progress)
        tops = [[triggers[0] for triggers in found[layer]] for layer in chosen]
        result = Agreement([], [], [], [], tops)
        for (layer, memories), triggers in zip(chosen.items(), tops, strict=True):
            following = torch.tensor([trigger.next_token for trigger in triggers])
            turn = int(generator.integers(1, max(2, len(memories))))  # each value beside another memory's token
            best, ranks = self._against(layer, memories, torch.stack([following, following.roll(turn)]))
            same = best[None, :] == following[:, None]  # [keys, values]
            own = same.diagonal()
            result.hits.append(own.numpy())
            result.shuffled.append(((same.sum(1) - own.long()).double() / max(1, len(own) - 1)).numpy())
            result.ranks.append(ranks[0].numpy())
            result.shuffled_ranks.append(ranks[1].numpy())
        return result

    def _against(self, layer: int, memories: list[int], tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Top token of each value, and the share of the vocabulary it puts above each of ``tokens [n, memories]``."""
        best, ranks = [], []
        with torch.no_grad():
            rows = self.layers[layer].values()[memories]
            for some, few in zip(rows.split(64), tokens.split(64, dim=1), strict=True):
                logits = self.space.written(some)
                best.append(logits.argmax(1).cpu())
                above = [places(logits, of.to(logits.device))[0] for of in few]
                ranks.append((torch.stack(above).double() / (logits.shape[1] - 1)).cpu())
        return torch.cat(best), torch.cat(ranks, 1)

    def composition_rate(
        self, texts: Sequence[str], *, layers: Sequence[int] | None = None, positions: int = 100, seed: int = 0
    ) -> Composition:
        """How often a layer's vote is not that of any of its active memories alone (section 5.1).

        A memory is active where its coefficient is not zero; one with a negative coefficient votes for what its value
        lowers most. The layer's output bias, which belongs to no memory, is left out. Costs a product of all the
        layer's values with the unembedding.

        Args:
            texts: where positions are drawn from.
            layers: which; None for all.
            positions: how many, at random among those that another token follows.
            seed: of the draw.

        Raises:
            InputError: a model without an unembedding.
        """
        self.space.weights.require_unembedding()
        wanted = [at.layer for at in self.layers] if layers is None else list(layers)
        for layer in wanted:
            self._chosen(layer, None)
        kept = self._coefficients(texts, wanted, positions, seed)
        rates, active = [], []
        for layer in wanted:
            m = kept[layer]
            with torch.no_grad():
                values = self.layers[layer].values()
                highest, lowest = self._best(values)
                vote = self._best(m.to(values.device) @ values)[0]
            single = torch.where(m > 0, highest, lowest)
            rates.append(float(((single == vote[:, None]) & (m != 0)).any(1).logical_not().double().mean()))
            active.append(float((m != 0).double().mean()))
        return Composition(wanted, np.array(rates), np.array(active))

    def without(self, triggers: Sequence[Trigger], which: Literal["first", "last"]) -> np.ndarray:
        """Relative change of each trigger's coefficient once the first or last token of its prefix is left out.

        ``(m' - m) / m``, ``m'`` at the last token that is left (section 3.2): -1 where the memory falls silent. Special
        tokens stay where they are; NaN for prefixes of fewer than two tokens beside them.

        Raises:
            InputError: another ``which``, or a model that sees both ways.
        """
        if which not in ("first", "last"):
            raise InputError(f"which is {which!r}, expected 'first' or 'last'.")
        if not all(getattr(at.module, "is_causal", True) for at in self.model.attention_layers):
            raise InputError(
                f"'{self.model.name}' sees both ways, so that a text's prefix is not a text: use a decoder."
            )
        special = set(self._special())
        found = np.full(len(triggers), np.nan)
        shorter: list[tuple[int, list[int]]] = []
        for row, trigger in enumerate(triggers):
            plain = [at for at, token in enumerate(trigger.ids) if token not in special]
            if len(plain) >= 2:
                gone = plain[0] if which == "first" else plain[-1]
                shorter.append((row, [token for at, token in enumerate(trigger.ids) if at != gone]))
        shorter.sort(key=lambda one: len(one[1]))
        for start in range(0, len(shorter), self.batch_size):
            some = shorter[start : start + self.batch_size]
            width = len(some[-1][1])
            ids = torch.tensor([prefix + [prefix[-1]] * (width - len(prefix)) for _, prefix in some])
            mask = torch.tensor([[1] * len(prefix) + [0] * (width - len(prefix)) for _, prefix in some])
            left = self._last({row: len(prefix) - 1 for row, prefix in some}, triggers, ids, mask)
            for row, value in left.items():
                found[row] = (value - triggers[row].coefficient) / triggers[row].coefficient
        return found

    def _last(
        self, rows: dict[int, int], triggers: Sequence[Trigger], ids: torch.Tensor, mask: torch.Tensor
    ) -> dict[int, float]:
        """Coefficient of each trigger's memory at the given position of its row."""
        found: dict[int, float] = {}

        def keep(layer: int, m: torch.Tensor) -> None:
            m = m.reshape(*ids.shape, -1)
            for place, (row, last) in enumerate(rows.items()):
                if triggers[row].layer == layer:
                    found[row] = float(m[place, last, triggers[row].memory])

        layers = {triggers[row].layer for row in rows}
        with tap_memories(self.model, [at for at in self.layers if at.layer in layers], keep):
            self._run({"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)})
        return found

    def _triggers(
        self, texts: Sequence[str], chosen: dict[int, list[int]], k: int, progress: Progress | None = None
    ) -> dict[int, list[list[Trigger]]]:
        """Top prefixes of chosen memories of several layers in one pass over the texts."""
        texts = check_texts(texts, "Memories")
        if k < 1:
            raise InputError(f"The top {k} prefixes were asked for; expected one or more.")
        best: dict[int, torch.Tensor] = {}
        where: dict[int, torch.Tensor] = {}
        columns = {layer: torch.tensor(memories, device=self.model.device) for layer, memories in chosen.items()}
        tokens: list[list[int]] = []
        special = self._special()
        for inputs in text_batches(self.model, texts, self.batch_size, self.max_tokens, progress):
            ids, real, usable = _usable(inputs, special)
            places = (torch.arange(ids.numel(), device=ids.device).reshape(ids.shape))[usable]
            first = len(tokens)
            tokens += [row[on].tolist() for row, on in zip(ids, real, strict=True)]
            order = real.long().cumsum(1) - 1  # position among the text's own tokens, whichever side is padded
            text = first + places // ids.shape[1]
            here = torch.stack([text, order[usable]], -1)

            def add(layer: int, m: torch.Tensor, usable: torch.Tensor = usable, here: torch.Tensor = here) -> None:
                rows = m.reshape(*usable.shape, -1)[usable][:, columns[layer]].float()
                if layer in best:
                    rows = torch.cat([best[layer], rows])
                    at = torch.cat([where[layer], here[:, None].expand(-1, rows.shape[1], -1)])
                else:
                    at = here[:, None].expand(-1, rows.shape[1], -1)
                best[layer], kept = rows.topk(min(k, len(rows)), dim=0)
                where[layer] = at.gather(0, kept[..., None].expand(-1, -1, 2))

            with tap_memories(self.model, [at for at in self.layers if at.layer in chosen], add):
                self._run(inputs)
        _check_any(list(best.values()))
        return {
            layer: [
                [
                    _trigger(layer, memory, best[layer][i, j], where[layer][i, j], tokens)
                    for i in range(len(best[layer]))
                ]
                for j, memory in enumerate(memories)
            ]
            for layer, memories in chosen.items()
        }

    def _coefficients(
        self, texts: Sequence[str], layers: Sequence[int], positions: int, seed: int
    ) -> dict[int, torch.Tensor]:
        """Coefficients ``[positions, memories]`` of layers at positions drawn from the texts."""
        texts = check_texts(texts, "Memories")
        generator = torch.Generator().manual_seed(seed)
        each = -(-positions // len(texts))
        kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
        special = self._special()
        for inputs in text_batches(self.model, texts, self.batch_size, self.max_tokens):
            usable = _usable(inputs, special)[2]
            luck = torch.rand(usable.shape, generator=generator).to(usable.device) * usable
            drawn = (
                torch.zeros_like(usable).scatter(1, luck.topk(min(each, luck.shape[1]), dim=1).indices, True) & usable
            )

            def add(layer: int, m: torch.Tensor, drawn: torch.Tensor = drawn) -> None:
                kept[layer].append(m.reshape(*drawn.shape, -1)[drawn].float().cpu())

            with tap_memories(self.model, [self.layers[layer] for layer in layers], add):
                self._run(inputs)
        _check_any([torch.cat(rows) for rows in kept.values()])
        return {layer: torch.cat(rows)[:positions] for layer, rows in kept.items()}

    def _best(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Highest and lowest token of written vectors ``[n, hidden]``."""
        found = []
        for some in rows.split(64):  # [64, vocabulary] at once
            logits = self.space.written(some)
            found.append(torch.stack([logits.argmax(1), logits.argmin(1)]).cpu())
        highest, lowest = torch.cat(found, 1)
        return highest, lowest

    def _run(self, inputs: dict[str, torch.Tensor]) -> None:
        parameters = inspect.signature(self.model.module.forward).parameters
        few: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        with torch.inference_mode():
            self.model(**inputs, **few)

    def _special(self) -> list[int]:
        return list(getattr(self.model.tokenizer, "all_special_ids", []))

    def _chosen(self, layer: int, memories: Sequence[int] | None) -> list[int]:
        if not 0 <= layer < len(self.layers):
            raise InputError(
                f"Layer {layer} was asked for; '{self.model.name}' has layers 0 to {len(self.layers) - 1}."
            )
        count = self.layers[layer].memories
        chosen = list(range(count)) if memories is None else [int(memory) for memory in memories]
        if not chosen or any(not 0 <= memory < count for memory in chosen):
            raise InputError(f"Memories {chosen[:5]} were asked for; layer {layer} has memories 0 to {count - 1}.")
        return chosen


def _usable(inputs: dict[str, torch.Tensor], special: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, which of them are no padding, and which are text followed by text: ``[batch, tokens]`` each."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    text = real & ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
    usable = torch.zeros_like(text)
    usable[:, :-1] = text[:, :-1] & text[:, 1:]
    return ids, real, usable


def _check_any(found: list[torch.Tensor]) -> None:
    if not all(len(rows) for rows in found):
        raise InputError("The texts hold no token that another follows; expected texts of two tokens or more.")


def _trigger(
    layer: int, memory: int, coefficient: torch.Tensor, place: torch.Tensor, tokens: list[list[int]]
) -> Trigger:
    text, position = place.tolist()
    ids = tokens[text]
    return Trigger(layer, memory, float(coefficient), tuple(ids[: position + 1]), ids[position + 1], text)
