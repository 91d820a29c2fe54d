"""ReAGent: importance of tokens for what a model says next, from its output probabilities alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.explain.base import Attributor, Readout
from polyhead.explain.replacers import Replacer
from polyhead.papers import paper

__all__ = ["ReAGent"]


@paper("reagent")
@dataclass
class ReAGent(Attributor):
    """Recursive attribution: replace random tokens by plausible ones again and again, and note what that costs.

    Each token has a logit, at random to begin with. A step replaces a share of the tokens; the fall ``d`` of the
    target's probability is added to the logits of replaced tokens and taken off those of the others. A run ends when
    the target stays among the likeliest after the least important tokens are replaced. Scores are the softmax of the
    logits, averaged over runs, and sum to 1 (reagent, section 3).

    All runs of a text go through the model together. Nothing but ``readout.probabilities`` is asked of the model.

    Args:
        replacer: gives tokens in place of others, see :mod:`polyhead.explain.replacers`.
        ratio: share of the judged tokens replaced in a step.
        keep: share of the least important ones replaced to see whether a run may end.
        top_k: among how many likeliest the target has to stay.
        max_steps: of a run.
        runs: averaged.
        seed: of everything random.
        log_odds: add ``log((1 + d) / (1 - d))`` in place of ``d``, as the authors' code does: one step that takes the
            whole probability away then weighs more than all others.

    Example:
        >>> from polyhead.explain.replacers import UnigramReplacer
        >>> model = load("gemma-3-270m", lm_head=True)
        >>> replacer = UnigramReplacer.from_texts(model, load_texts("ag-news", 500))
        >>> found = ReAGent(replacer).text(NextTokenReadout(model), "The capital of France is")
        >>> found.scores[1:].sum().round(6)
        1.0
    """

    replacer: Replacer
    ratio: float = 0.3
    keep: float = 0.7
    top_k: int = 3
    max_steps: int = 30
    runs: int = 5
    seed: int = 0
    log_odds: bool = False
    name = "reagent"

    def __post_init__(self) -> None:
        if not (0 < self.ratio < 1 and 0 < self.keep <= 1):
            raise InputError(f"ratio={self.ratio} and keep={self.keep} were given; both are shares between 0 and 1.")
        if min(self.top_k, self.max_steps, self.runs) < 1:
            raise InputError(
                f"top_k={self.top_k}, max_steps={self.max_steps} and runs={self.runs} were given; each is at least 1."
            )

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`; between 0 and 1, with the sum 1.

        Raises:
            InputError: fewer than two tokens to judge.
        """
        places = torch.arange(len(ids)) if judged is None else torch.as_tensor(judged).nonzero()[:, 0]
        if len(places) < 2:
            raise InputError(f"ReAGent compares tokens; {len(places)} was given to judge, expected at least 2.")
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.rand(self.runs, len(places), generator=generator, dtype=torch.float64)
        whole = readout.probabilities(ids[None])[0, target].double().cpu()
        running = torch.arange(self.runs)
        for _ in range(self.max_steps):
            chance = torch.rand(len(running), len(places), generator=generator)
            chosen = _lowest(chance, self.ratio)
            changed = self._replaced(ids, places, chosen, generator)
            fall = whole - readout.probabilities(changed)[:, target].double().cpu()
            if self.log_odds:
                fall = 2 * torch.atanh(fall.clamp(-1 + 1e-6, 1 - 1e-6))
            logits[running] += torch.where(chosen, fall[:, None], -fall[:, None])
            unimportant = self._replaced(ids, places, _lowest(logits[running], self.keep), generator)
            answers = readout.probabilities(unimportant)
            better = (answers > answers[:, target, None]).sum(-1).cpu()
            running = running[better >= self.top_k]
            if len(running) == 0:
                break
        scores = np.full(len(ids), np.nan)
        scores[places.numpy()] = torch.softmax(logits, -1).mean(0).numpy()
        return scores

    def _replaced(
        self, ids: torch.Tensor, places: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Copies ``[rows, tokens]`` of the text with the ``chosen`` of ``places`` replaced."""
        mask = torch.zeros(len(chosen), len(ids), dtype=torch.bool)
        mask[:, places] = chosen
        return self.replacer(ids, mask.to(ids.device), generator)


def _lowest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Boolean of the shape of ``values`` ``[rows, n]``: the lowest share of each row, at least one and not all."""
    count = min(max(1, round(share * values.shape[1])), values.shape[1] - 1)
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, values.argsort(1)[:, :count], True)
