"""How much a text needs certain heads: the rise of its loss when they look everywhere alike (attentioninfluence)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.importance import task_losses
from polyhead.heads.suffix import sweep
from polyhead.heads.tasks import NextToken
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["AttentionInfluence", "uniform_attention"]

Ablation = Literal["uniform", "zero"]


@contextmanager
def uniform_attention(model: HeadedModel, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Some heads attend to all the tokens they may see alike: their queries are zero, so every score is the same."""

    def without_question(layer: int, call: AttentionCall) -> AttentionCall | None:
        own = [head for at, head in heads if at == layer]
        if not own:
            return None
        query = call.query.clone()
        query[:, own] = 0
        return replace(call, query=query)

    with model.tap_attention(prepare=without_question):
        yield


@paper("attentioninfluence")
@dataclass
class AttentionInfluence(Score):
    """``AI(x) = (loss without heads - loss) / loss`` of a text, mean loss a token; a high value needs the heads.

    :meth:`of_texts` scores texts by a set of heads, the paper's use: the retrieval heads of a small language model
    point out texts that need what is in the context. :meth:`score` scores the heads one by one over given texts.

    Args:
        ablation: "uniform" makes the heads attend to all tokens alike, "zero" switches them off.
        max_tokens: texts are cut there.

    Example:
        >>> from polyhead import load
        >>> from polyhead.heads.retrieval_heads import RetrievalHeads
        >>> model = load("gemma-3-270m", lm_head=True)
        >>> heads = RetrievalHeads().score(model).top(0.05)
        >>> values = AttentionInfluence().of_texts(model, ["one text", "another"], heads)
    """

    ablation: Ablation = "uniform"
    max_tokens: int = 128

    name: ClassVar[str] = "attention-influence"
    summary: ClassVar[str] = "relative rise of the texts' loss when the head attends to all tokens alike"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "the texts need what the head looks for"

    def of_texts(
        self,
        model: HeadedModel,
        texts: Sequence[str],
        heads: Sequence[tuple[int, int]],
        *,
        whole: np.ndarray | None = None,
    ) -> np.ndarray:
        """AI of each text, ``[texts]``, with the given ``(layer, head)`` disabled together.

        Args:
            model: a decoder with its language-model head.
            texts: to score.
            heads: what is disabled.
            whole: losses of the whole model as :meth:`losses` gives them, where several sets of heads are compared.
        """
        task = self._task(texts)
        whole = task_losses(model, task) if whole is None else whole
        off = uniform_attention(model, heads) if self.ablation == "uniform" else Gate.off(heads, model).on(model)
        with off:
            return (task_losses(model, task) - whole) / whole

    def losses(self, model: HeadedModel, texts: Sequence[str]) -> np.ndarray:
        """Mean loss a token of each text, ``[texts]``, with all heads."""
        return task_losses(model, self._task(texts))

    @staticmethod
    def select(values: np.ndarray, fraction: float, domains: Sequence[str] | None = None) -> np.ndarray:
        """The texts that need the heads most: rows of the top ``fraction`` of ``values``, highest first.

        Args:
            values: of :meth:`of_texts`, ``[texts]``.
            fraction: above 0 to 1; at least one text is kept.
            domains: of each text; the fraction is then taken within each domain, one after the other by name, as losses
                of different kinds of text do not compare.

        Example:
            >>> AttentionInfluence.select(np.array([0.1, 0.5, 0.2, 0.9]), 0.5, ["web", "web", "code", "code"])
            array([3, 1])
        """
        if not 0 < fraction <= 1 or (domains is not None and len(domains) != len(values)):
            named = "no" if domains is None else len(domains)
            raise InputError(
                f"fraction={fraction}, {named} domains of {len(values)} texts; expected 0 to 1, one a text."
            )
        of = np.zeros(len(values), dtype=np.int64) if domains is None else np.asarray(domains)
        kept = []
        for name in np.unique(of):
            rows = np.flatnonzero(of == name)
            order = rows[np.argsort(-values[rows], kind="stable")]
            kept.append(order[: max(1, round(fraction * len(rows)))])
        return np.concatenate(kept)

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a list of texts, by default 16 news items."""
        from polyhead.data import load_texts

        task = self._task(load_texts("ag-news", 16) if data is None else data)
        whole, batches, first = task_losses(model, task), task.batches(model), 0
        rises = np.full((model.layers, model.heads, len(whole)), np.nan)
        for done, batch in enumerate(batches, start=1):
            rows = slice(first, first + batch.examples)
            with torch.inference_mode():
                instead = _uniform_outputs(model, batch.inputs) if self.ablation == "uniform" else None

                def change(layer: int, heads: Sequence[int], z: torch.Tensor, to: Any = instead) -> torch.Tensor:
                    return torch.zeros_like(z) if to is None else torch.stack([to[layer][:, :, head] for head in heads])

                for found in sweep(model, batch, change):
                    loss = task.loss(task.predict(found.outputs, found.batch), found.batch).double()
                    rises[found.layer, found.heads, rows] = (
                        loss.unflatten(0, (len(found.heads), -1)).cpu().numpy() - whole[rows]
                    )
            first += batch.examples
            if progress is not None:
                progress(done, len(batches))
        return self._map((rises / whole).mean(-1), model, task.name)

    def _task(self, texts: Any) -> NextToken:
        if self.ablation not in ("uniform", "zero"):
            raise InputError(f"ablation is {self.ablation!r}, expected 'uniform' or 'zero'.")
        if isinstance(texts, str) or not isinstance(texts, (list, tuple)):
            raise InputError(f"'{self.name}' was given {type(texts).__name__}; expected a list of texts.")
        return NextToken(texts, max_tokens=self.max_tokens)


def _uniform_outputs(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """What heads would give if they attended alike and nothing below changed, ``[batch, tokens, heads, dim]`` each."""
    found: dict[int, torch.Tensor] = {}

    def watch(layer: int, call: AttentionCall) -> None:
        weights = attention_weights(replace(call, query=torch.zeros_like(call.query)))
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)
        found[layer] = (weights @ value).transpose(1, 2)

    with model.tap_attention(watch):
        model(**inputs)
    return found
