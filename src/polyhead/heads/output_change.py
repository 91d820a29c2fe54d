"""How the answer changes when a head is off, by several measures (vit-attention-visual-analytics)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.suffix import sweep
from polyhead.heads.tasks import Batch
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["Metric", "OutputChange", "answer_batches"]

Metric = Literal["prob", "loss", "jsd"]


@paper("vit-attention-visual-analytics")
@dataclass
class OutputChange(Score):
    """Change of a classifier's answer when one head at a time is switched off, mean over examples.

    With ``p`` the class probabilities of the whole model, ``q`` those without the head and ``y`` the true class:

    * ``prob``: ``p[y] - q[y]``, the fall of the true class's probability;
    * ``loss``: ``log p[y] - log q[y]``, the rise of the cross-entropy;
    * ``jsd``: Jensen-Shannon divergence of p and q in nats, 0 to log 2, whether right or wrong.

    Data: batches of ``targets={"label": [examples]}`` for a model with ``logits``; ``[examples, classes]`` of an image
    classifier, or ``[examples, tokens, vocabulary]``, whose last real token answers. For a language model without
    data: the last token of some news items, from what is before it.

    Args:
        metric: of the map.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from polyhead import load
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
        >>> model = load(ViTForImageClassification(config).eval())
        >>> batch = Batch({"pixel_values": torch.randn(2, 3, 32, 32)}, {"label": torch.tensor([0, 1])}, 2)
        >>> OutputChange("jsd").score(model, [batch]).shape
        (2, 4)
    """

    metric: Metric = "jsd"

    name: ClassVar[str] = "output-change"
    summary: ClassVar[str] = "change of the answer's probabilities when the head is off: prob, loss or jsd"
    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "the answer changes more without the head"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a list of batches, see the class."""
        if self.metric not in get_args(Metric):
            raise InputError(f"metric is {self.metric!r}, expected one of {', '.join(get_args(Metric))}.")
        batches = answer_batches(model) if data is None else data
        changes = self.changes(model, batches, progress=progress)
        count = sum(batch.examples for batch in batches)
        return self._map(changes[self.metric].mean(-1), model, f"{count} examples, {self.metric}")

    def changes(
        self, model: HeadedModel, batches: Sequence[Batch], *, progress: Progress | None = None
    ) -> dict[Metric, np.ndarray]:
        """All metrics from one sweep, each ``[layers, heads, examples]``."""
        _check(batches)
        count = sum(batch.examples for batch in batches)
        found: dict[Metric, np.ndarray] = {
            metric: np.full((model.layers, model.heads, count), np.nan) for metric in get_args(Metric)
        }
        first = 0
        for done, batch in enumerate(batches, start=1):
            rows = slice(first, first + batch.examples)
            with torch.inference_mode():
                whole = _log_probabilities(model(**batch.inputs), batch)
                label = batch.targets["label"].to(whole.device)
                for part in sweep(model, batch, lambda layer, heads, z: torch.zeros_like(z)):
                    logp = _log_probabilities(part.outputs, part.batch).unflatten(0, (len(part.heads), -1))
                    for metric, values in _changes(whole, logp, label).items():
                        found[metric][part.layer, part.heads, rows] = values.cpu().numpy()
            first += batch.examples
            if progress is not None:
                progress(done, len(batches))
        return found


def _changes(whole: torch.Tensor, without: torch.Tensor, label: torch.Tensor) -> dict[Metric, torch.Tensor]:
    """Each metric ``[copies, examples]`` from log-probabilities ``[examples, n]`` and ``[copies, examples, n]``."""
    own = whole.gather(-1, label[:, None])[:, 0]
    other = without.gather(-1, label[None, :, None].expand(len(without), -1, 1))[..., 0]
    middle = torch.logaddexp(whole, without) - np.log(2)
    jsd = 0.5 * ((whole.exp() * (whole - middle)).sum(-1) + (without.exp() * (without - middle)).sum(-1))
    return {"prob": own.exp() - other.exp(), "loss": own - other, "jsd": jsd.clamp(min=0)}


def _log_probabilities(outputs: Any, batch: Batch) -> torch.Tensor:
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise InputError(
            "Changes of an answer need logits: give a classifier (ViTForImageClassification), or load a language model "
            "with its head, load(name, lm_head=True)."
        )
    if logits.dim() == 3:
        mask = batch.inputs.get("attention_mask")
        last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        if mask is not None:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        logits = logits[torch.arange(len(logits), device=logits.device), last]
    return torch.log_softmax(logits.double(), -1)


def _check(batches: Any) -> None:
    good = isinstance(batches, (list, tuple)) and all(isinstance(batch, Batch) for batch in batches) and batches
    if not good or any("label" not in batch.targets for batch in batches):
        raise InputError(
            "'output-change' needs a list of Batch(inputs, {'label': classes}, examples); one of them is missing."
        )


def answer_batches(model: HeadedModel, texts: Sequence[str] | None = None, max_tokens: int = 32) -> list[Batch]:
    """Batches of one text each for a language model: the label is the last token, the input what is before it.

    Raises:
        InputError: a model without a language-model head.
    """
    from polyhead.data import load_texts

    if getattr(model.module, "lm_head", None) is None:
        raise InputError(
            f"'{model.name}' has no language-model head, so there is no default data: give labelled batches, or load "
            "a language model with load(name, lm_head=True)."
        )
    found = []
    for text in load_texts("ag-news", 16) if texts is None else texts:
        ids = model.tokenize([text])["input_ids"][:, :max_tokens]
        inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
        found.append(Batch(inputs, {"label": ids[:, -1]}, 1))
    return found
