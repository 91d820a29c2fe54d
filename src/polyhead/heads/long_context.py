"""Long-context heads, query by query: is attending to the sinks and a recent window enough?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.data import load_texts
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.logits import query_rows, stream_query_rows
from polyhead.heads.streaming import check_texts
from polyhead.papers import paper
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["LocalityResult", "QueryAdaptiveLocality"]

Moments = Literal["local", "calibrated"]


@dataclass(frozen=True)
class LocalityResult:
    """Sampled queries of every head; all masses are logarithms of sums of ``exp(logit)``.

    Attributes:
        local: ``[queries, layers, heads]``: of the sinks and the window.
        far: the true mass of everything between them; -inf where a sliding window sees none of it.
        predicted: the same as the Gaussian of the moments has it.
        text: ``[queries]``, which text each is from.
        model: name.
    """

    local: np.ndarray
    far: np.ndarray
    predicted: np.ndarray
    text: np.ndarray
    model: str

    def share(self, of: Literal["predicted", "far"] = "predicted") -> np.ndarray:
        """Share of the attention that is local, ``A_loc / (A_loc + A_bulk)``, by the estimate or (far) in truth."""
        return 1.0 / (1.0 + np.exp(np.clip(getattr(self, of) - self.local, -700, 700)))


@paper("qada-long-context-heads")
@dataclass
class QueryAdaptiveLocality(Score):
    """Share of queries for which a head needs the far tokens (qada-long-context-heads, query-adaptive criterion).

    The mass of the ``N`` tokens between the first ``sinks`` and the last ``window`` is not read but estimated, taking
    their logits for Gaussian: ``A_bulk = N exp(m + s^2 / 2)`` with ``m = q.mu_K`` and ``s^2 = q' Sigma_K q`` (scaled).
    A query is local where ``A_loc / (A_loc + A_bulk) >= tau``.

    Args:
        window: last tokens, the query's own among them.
        sinks: first tokens.
        tau: bound on the local share.
        moments: "local": mean and covariance of the window's keys (then ``m`` and ``s^2`` are simply mean and variance
            of the window's logits); "calibrated": of all keys of texts given to :meth:`fit`.
        rows: queries a text, evenly spaced over those with far tokens.
        max_tokens: texts are cut there.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("gemma-3-270m")
        >>> text = " ".join(load_texts("ag-news", 8))
        >>> far = QueryAdaptiveLocality(window=64).score(model, [text])
    """

    name: ClassVar[str] = "long-context-heads"
    summary: ClassVar[str] = "share of queries for which sinks and a recent window are not enough for the head"
    needs: ClassVar[Any] = "texts"
    higher_means: ClassVar[str] = "needs far tokens for more of its queries"

    window: int = 128
    sinks: int = 16
    tau: float = 0.6
    moments: Moments = "local"
    rows: int = 32
    max_tokens: int = 1024
    mean_: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    covariance_: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def fit(self, model: HeadedModel, data: Sequence[str]) -> QueryAdaptiveLocality:
        """Mean ``[heads, head_dim]`` and covariance of each layer's keys, for ``moments="calibrated"``."""
        sums: dict[int, list[torch.Tensor]] = {}
        count = 0

        def visit(layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
            keys = keys.double()
            parts = [keys.sum(1), keys.transpose(1, 2) @ keys]
            sums[layer] = parts if layer not in sums else [a + b for a, b in zip(sums[layer], parts, strict=True)]

        for text in check_texts(data, "QueryAdaptiveLocality.fit"):
            ids = model.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            stream_query_rows(model, ids, torch.tensor([0]), visit)
            count += len(ids)
        self.mean_ = {layer: parts[0] / count for layer, parts in sums.items()}
        self.covariance_ = {
            layer: parts[1] / count - self.mean_[layer][:, :, None] * self.mean_[layer][:, None]
            for layer, parts in sums.items()
        }
        return self

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; without data, four texts of 16 news items each."""
        if data is None:
            items = load_texts("ag-news", 64)
            data = ["\n".join(items[first : first + 16]) for first in range(0, 64, 16)]
        result = self.measure(model, data, progress=progress)
        needs_far = (result.share() < self.tau).mean(0)
        return self._map(needs_far, model, f"{len(result.text)} queries, window {self.window}, {self.sinks} sinks")

    def measure(self, model: HeadedModel, data: Sequence[str], *, progress: Progress | None = None) -> LocalityResult:
        """Estimated and true masses of sampled queries.

        Raises:
            InputError: no text longer than sinks and window together, or calibrated moments without :meth:`fit`.
        """
        texts = check_texts(data, "QueryAdaptiveLocality")
        self._check(model)
        found: list[np.ndarray] = []
        of: list[int] = []
        for done, text in enumerate(texts, start=1):
            ids = model.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            first = self.sinks + self.window
            if len(ids) > first:
                rows = torch.linspace(first, len(ids) - 1, min(self.rows, len(ids) - first)).long()
                masses = np.full((3, len(rows), model.layers, model.heads), np.nan)

                def visit(
                    layer: int,
                    queries: torch.Tensor,
                    keys: torch.Tensor,
                    scaling: float,
                    rows: torch.Tensor = rows,
                    masses: np.ndarray = masses,
                ) -> None:
                    window = model.attention_layers[layer].sliding_window
                    heads = queries.shape[0]
                    for at, part in enumerate(self._masses(layer, queries, keys, scaling, rows, window)):
                        masses[at, :, layer, :heads] = part.T.double().cpu().numpy()

                stream_query_rows(model, ids, rows, visit)
                found.append(masses)
                of += [done - 1] * len(rows)
            if progress is not None:
                progress(done, len(texts))
        if not found:
            raise InputError(
                f"None of the {len(texts)} texts has more than {self.sinks} + {self.window} tokens: every token is a "
                "sink or in the window. Give longer texts or a smaller window."
            )
        local, far, predicted = np.concatenate(found, axis=1)
        return LocalityResult(local, far, predicted, np.array(of), model.name)

    def _check(self, model: HeadedModel) -> None:
        if self.moments == "calibrated" and not self.mean_:
            raise InputError("moments='calibrated' needs QueryAdaptiveLocality.fit(model, texts) first.")
        if self.moments not in ("local", "calibrated"):
            raise InputError(f"moments is {self.moments!r}, expected 'local' or 'calibrated'.")

    def _masses(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        scaling: float,
        rows: torch.Tensor,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log masses ``[heads, rows]``: local, far, far as predicted."""
        at, positions = rows.to(keys.device)[:, None], torch.arange(keys.shape[1], device=keys.device)[None]
        seen = positions <= at
        if window is not None:
            seen = seen & (positions > at - window)
        recent = seen & (positions > at - self.window)
        near = recent | (seen & (positions < self.sinks))
        logits = (queries @ keys.transpose(1, 2)).double() * scaling
        local = logits.masked_fill(~near, -torch.inf).logsumexp(-1)
        far = logits.masked_fill(~(seen & ~near), -torch.inf).logsumexp(-1)
        bulk = (seen & ~near).sum(-1).double().log()
        if self.moments == "local":
            count = recent.sum(-1)
            mean = torch.where(recent, logits, 0.0).sum(-1) / count
            variance = torch.where(recent, (logits - mean[..., None]) ** 2, 0.0).sum(-1) / count
        else:
            asked = queries.double() * scaling
            mean = (asked * self.mean_[layer][:, None]).sum(-1)
            variance = ((asked @ self.covariance_[layer]) * asked).sum(-1)
        return local, far, bulk + mean + variance / 2

    @contextmanager
    def on(self, model: HeadedModel, *, oracle: bool = False) -> Iterator[list[float]]:
        """Attend only locally wherever the criterion says that this is enough, while the block runs.

        For texts one at a time, without padding. The list it gives receives, a layer and pass, the share of queries
        (of those with far tokens) that were local.

        Args:
            model: a causal decoder.
            oracle: decide by the true masses instead of the estimate.
        """
        self._check(model)
        shares: list[float] = []

        def prepare(layer: int, call: AttentionCall) -> AttentionCall | None:
            tokens, keys = call.query.shape[2], call.key.shape[2]
            if call.query.shape[0] != 1 or tokens != keys:
                raise InputError("QueryAdaptiveLocality acts on one whole text at a time: no batches, no kept keys.")
            rows = torch.arange(tokens, device=call.query.device)
            window = model.attention_layers[layer].sliding_window
            local, far, predicted = self._masses(layer, *query_rows(call, rows), rows, window)
            enough = torch.sigmoid(local - (far if oracle else predicted)) >= self.tau
            distant = rows[:, None] - rows[None] >= self.window
            hidden = distant & (rows[None] >= self.sinks)
            counted = rows >= self.sinks + self.window
            if bool(counted.any()):
                shares.append(float(enough[:, counted].double().mean()))
            allowed = rows[None] <= rows[:, None]
            if window is not None:
                allowed = allowed & (rows[:, None] - rows[None] < window)
            mask = allowed & ~(enough[:, :, None] & hidden)
            if call.mask is not None and call.mask.dtype != torch.bool:
                lowest = torch.finfo(call.mask.dtype).min
                return replace(
                    call, mask=torch.zeros_like(mask, dtype=call.mask.dtype).masked_fill(~mask, lowest)[None]
                )
            return replace(call, mask=mask[None])

        with model.tap_attention(prepare=prepare):
            yield shares
