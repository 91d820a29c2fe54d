"""Output heads on inputs of a task that is not theirs; "heads" are task heads over one encoder, not attention heads.

A multi-task model has one encoder and a thin output head a task. Only the head of the input's own task is ever trained
on it; the study asks what the others say there (Geva et al. 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.evaluate.statistics import Interval, bootstrap_interval
from polyhead.heads.base import Progress
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = [
    "Intervention",
    "NonTarget",
    "PooledHead",
    "SharedEncoder",
    "Supervision",
    "TaggingHead",
    "intervene",
    "non_target",
]

Inputs = dict[str, torch.Tensor]
Where = torch.Tensor | Callable[[Inputs], torch.Tensor]
_BATCH = 64


class TaggingHead(nn.Module):
    """One number a token: is it part of the answer? States ``[batch, tokens, hidden]`` -> ``[batch, tokens]``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden, 1)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-odds of each token; padding gets the lowest there is."""
        logits: torch.Tensor = self.weight(states)[..., 0]
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


class PooledHead(nn.Module):
    """A class for the whole input, from the mean state: ``[batch, tokens, hidden]`` -> ``[batch, classes]``."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, 2 * hidden)
        self.outer = nn.Linear(2 * hidden, classes)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits; padding does not count."""
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        pooled = (states * share[..., None].to(states.dtype)).sum(1)
        logits: torch.Tensor = self.outer(torch.nn.functional.gelu(self.inner(pooled)))
        return logits


@dataclass(frozen=True)
class Supervision:
    """What one output head is trained with.

    Attributes:
        head: name of the head.
        draw: gives a batch: inputs of the encoder, and the answers.
        loss: of the head's output and the answers.
    """

    head: str
    draw: Callable[[np.random.Generator], tuple[Inputs, torch.Tensor]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@paper("non-target-heads")
class SharedEncoder(nn.Module):
    """One encoder with several task output heads; any of them, or all, can be asked about any input.

    Args:
        encoder: called with the inputs as keywords; gives states ``[batch, tokens, hidden]``, or an object with these
            as ``last_hidden_state``. A loaded model is taken by its module (and trained by :meth:`fit` in place).
        heads: name -> module called as ``head(states, mask)`` with a bool mask ``[batch, tokens]``, such as
            :class:`TaggingHead` and :class:`PooledHead`.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> shared = SharedEncoder(model, {"numbers": TaggingHead(384), "topic": PooledHead(384, 4)})
        >>> answers = shared(model.tokenize(["Ann has 3 apples and 2 pears"]))  # both heads, not trained yet
        >>> {name: tuple(answer.shape) for name, answer in answers.items()}
        {'numbers': (1, 10), 'topic': (1, 4)}
    """

    def __init__(self, encoder: nn.Module | HeadedModel, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise InputError("No output heads were given: name at least one, such as {'tags': TaggingHead(384)}.")
        self.encoder = encoder.module if isinstance(encoder, HeadedModel) else encoder
        self.heads = nn.ModuleDict(dict(heads))

    def states(self, inputs: Inputs) -> torch.Tensor:
        """What all heads read, ``[batch, tokens, hidden]``."""
        out = self.encoder(**inputs)
        found: torch.Tensor = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        return found

    def forward(self, inputs: Inputs, heads: Literal["all"] | str | Sequence[str] = "all") -> dict[str, torch.Tensor]:
        """Answers of the named heads about ``inputs``; the encoder runs once.

        Raises:
            InputError: a head that does not exist.
        """
        names = list(self.heads) if heads == "all" else [heads] if isinstance(heads, str) else list(heads)
        for name in names:
            self.head(name)
        states = self.states(inputs)
        return {name: self.heads[name](states, _mask(inputs, states)) for name in names}

    def head(self, name: str) -> nn.Module:
        """One head by its name.

        Raises:
            InputError: no head of that name.
        """
        if name not in self.heads:
            raise InputError(f"No output head {name!r}: this model has {', '.join(self.heads)}.")
        return self.heads[name]

    def fit(
        self,
        tasks: Sequence[Supervision],
        *,
        steps: int = 1000,
        rate: float = 1e-3,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> SharedEncoder:
        """Train encoder and heads: each step adds up the loss of one batch of every task, each on its own head only.

        Adam with a linear warm-up over a tenth of the steps and a linear decline to 0 after it.
        """
        random = np.random.default_rng(seed)
        optimiser = torch.optim.Adam(self.parameters(), lr=rate)
        warm = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        )
        self.train()
        for step in range(steps):
            optimiser.zero_grad()
            for task in tasks:
                inputs, answers = task.draw(random)
                task.loss(self(inputs, task.head)[task.head], answers).backward()
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
        return self.eval()


@dataclass(frozen=True)
class NonTarget:
    """How much of another task's gold a head puts among its ``k`` highest tokens.

    Attributes:
        head: whose output it is.
        k: tokens taken, of the candidates.
        recall: who -> recall at k with its 95% interval over examples: "head" (in the model), "random head" (fresh
            heads of the same shape on the same states), and whatever it was compared with.
        chance: recall of k candidates picked blindly.
        examples: who -> ``[examples]`` recalls.
    """

    head: str
    k: int
    recall: dict[str, Interval]
    chance: float
    examples: dict[str, np.ndarray] = field(repr=False)

    def gain(self, over: str = "random head", *, seed: int = 0) -> Interval:
        """Recall of the head less that of another, paired by example.

        Raises:
            InputError: a name that was not compared.
        """
        if over not in self.examples:
            raise InputError(f"{over!r} was not compared; there are {', '.join(self.examples)}.")
        return bootstrap_interval(self.examples["head"] - self.examples[over], seed=seed)

    def __str__(self) -> str:
        lines = [f"recall@{self.k} of the other task's gold by the output head '{self.head}':"]
        wide = max(map(len, self.recall))
        lines += [f"  {name:{wide}} {x.value:.2f} [{x.low:.2f}, {x.high:.2f}]" for name, x in self.recall.items()]
        return "\n".join([*lines, f"  {'chance':{wide}} {self.chance:.2f}"])


@paper("non-target-heads")
def non_target(
    model: SharedEncoder,
    inputs: Inputs,
    head: str,
    gold: Where,
    *,
    candidates: Where | None = None,
    k: int = 2,
    against: Mapping[str, SharedEncoder] | None = None,
    seed: int = 0,
) -> NonTarget:
    """What a token-level head finds in inputs of a task it was never trained on, against gold of that task.

    Args:
        model: trained on both tasks.
        inputs: of the other task, ``[examples, tokens]`` each.
        head: name of a head that gives ``[examples, tokens]``.
        gold: bool ``[examples, tokens]``, or a function of the inputs: the tokens the other task's answer rests on.
        candidates: bool ``[examples, tokens]`` or a function: tokens that may be picked; without it, all real tokens.
        k: how many the head picks.
        against: other models with a head of that name, such as one trained on that head's task alone.
        seed: of 20 random heads and of the intervals.

    Raises:
        InputError: a head that gives no number a token, an example without gold or with fewer than ``k`` candidates.

    Example:
        >>> class Identity(torch.nn.Module):  # a planted encoder: the state of a token is its own number
        ...     def forward(self, input_ids):
        ...         return input_ids[..., None].float()
        >>> shared = SharedEncoder(Identity(), {"tags": TaggingHead(1)})
        >>> shared.heads["tags"].weight.weight.data.fill_(1.0).item()
        1.0
        >>> inputs = {"input_ids": torch.tensor([[1, 9, 2, 8]])}
        >>> non_target(shared, inputs, "tags", inputs["input_ids"] > 7).recall["head"].value
        1.0
    """
    wanted, allowed = _places(inputs, gold, candidates, k)
    found = {"head": _recalls(_scores(model, inputs, head), wanted, allowed, k)}
    for name, other in (against or {}).items():
        found[name] = _recalls(_scores(other, inputs, head), wanted, allowed, k)
    drawn = [_recalls(scores, wanted, allowed, k) for scores in _random_scores(model, inputs, head, 20, seed)]
    found["random head"] = np.mean(drawn, axis=0)
    recall = {name: bootstrap_interval(values, seed=seed) for name, values in found.items()}
    return NonTarget(head, k, recall, float((k / allowed.sum(1)).mean()), found)


@dataclass(frozen=True)
class Intervention:
    """How often the target head's answer changes when tokens are hidden from the model.

    Attributes:
        picked: share of examples, with the tokens hidden that the non-target head picks.
        others: the same with as many other candidates.
        gain: the difference with its 95% interval over examples.
    """

    picked: float
    others: float
    gain: Interval


@paper("non-target-heads")
def intervene(
    model: SharedEncoder,
    inputs: Inputs,
    head: str,
    target: str,
    *,
    candidates: Where | None = None,
    k: int = 2,
    seed: int = 0,
) -> Intervention:
    """Does the target head's answer rest on the tokens that a non-target head points at?

    The ``k`` candidates that ``head`` ranks highest are hidden (their attention mask is set to 0), and it is counted
    how often the class that ``target`` answers changes; then the same with ``k`` other candidates. The encoder has to
    take an ``attention_mask``. (Geva et al. change shared states by gradient; hiding needs no training.)

    Raises:
        InputError: as in :func:`non_target`; an example with fewer than ``2 k`` candidates; a target without classes.
    """
    _, allowed = _places(inputs, None, candidates, 2 * k)
    scores = _scores(model, inputs, head).masked_fill(~allowed, -torch.inf)
    first = torch.zeros_like(allowed).scatter(1, scores.topk(k).indices, True)
    dice = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed)).to(allowed.device)
    second = torch.zeros_like(allowed).scatter(1, dice.masked_fill(~allowed | first, -1.0).topk(k).indices, True)
    real = _mask(inputs, scores[..., None])
    whole, without_picks, without_others = (
        _classes(model, {**inputs, "attention_mask": (real & ~hidden).long()}, target)
        for hidden in (torch.zeros_like(real), first, second)
    )
    picked, others = ((whole != other).double().cpu().numpy() for other in (without_picks, without_others))
    return Intervention(float(picked.mean()), float(others.mean()), bootstrap_interval(picked - others, seed=seed))


def _classes(model: SharedEncoder, inputs: Inputs, target: str) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for part in _parts(inputs):
            answer = model(part, target)[target]
            if answer.ndim != 2 or isinstance(model.head(target), TaggingHead):
                raise InputError(f"The target head {target!r} gives no classes: expected [examples, classes].")
            found.append(answer.argmax(-1))
    return torch.cat(found)


def _mask(inputs: Inputs, states: torch.Tensor) -> torch.Tensor:
    given = inputs.get("attention_mask")
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if given is None else given.bool()


def _parts(inputs: Inputs) -> Iterator[Inputs]:
    count = len(next(iter(inputs.values())))
    for first in range(0, count, _BATCH):
        yield {name: value[first : first + _BATCH] for name, value in inputs.items()}


def _places(
    inputs: Inputs, gold: Where | None, candidates: Where | None, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gold and candidates as bool ``[examples, tokens]``."""
    real = _mask(inputs, next(iter(inputs.values()))[..., None])
    if candidates is not None:
        real = real & (candidates(inputs) if callable(candidates) else candidates).bool()
    few = int(real.sum(1).min())
    if few < least:
        raise InputError(f"An example has {few} candidate tokens; at least {least} are needed. Lower k.")
    if gold is None:
        return real, real
    wanted = (gold(inputs) if callable(gold) else gold).bool()
    if wanted.shape != real.shape or not bool(wanted.any(1).all()):
        raise InputError(
            f"gold is {tuple(wanted.shape)} with gold tokens in {int(wanted.any(1).sum())} examples; expected "
            f"{tuple(real.shape)}, some in each."
        )
    return wanted, real


def _scores(model: SharedEncoder, inputs: Inputs, head: str, module: nn.Module | None = None) -> torch.Tensor:
    """The head's number for each token, ``[examples, tokens]``."""
    use = model.head(head) if module is None else module
    found = []
    with torch.no_grad():
        for part in _parts(inputs):
            states = model.states(part)
            found.append(use(states, _mask(part, states)))
            if found[-1].shape != states.shape[:2]:
                given = tuple(found[-1].shape)
                raise InputError(
                    f"The head {head!r} gives {given}; expected a number a token, {tuple(states.shape[:2])}."
                )
    return torch.cat(found).float()


def _random_scores(model: SharedEncoder, inputs: Inputs, head: str, draws: int, seed: int) -> Iterator[torch.Tensor]:
    fresh = copy.deepcopy(model.head(head))
    layers: list[Any] = [part for part in fresh.modules() if hasattr(part, "reset_parameters")]
    if not layers:
        raise InputError(f"No layer of the head {head!r} has reset_parameters: no random head can be drawn.")
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * draws + draw)
            for layer in layers:
                layer.reset_parameters()
        yield _scores(model, inputs, head, fresh)


def _recalls(scores: torch.Tensor, gold: torch.Tensor, candidates: torch.Tensor, k: int) -> np.ndarray:
    """Share of each example's gold among its ``k`` highest candidates."""
    picked = scores.masked_fill(~candidates, -torch.inf).topk(k).indices
    return (gold.gather(1, picked).sum(1) / gold.sum(1)).double().cpu().numpy()
