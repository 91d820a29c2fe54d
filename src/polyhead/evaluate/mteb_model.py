"""Polyhead's encoders for mteb: any of its tasks, its leaderboard's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyhead.errors import MissingExtraError
from polyhead.evaluate.vectors import Encodes, name_of, vectors

if TYPE_CHECKING:
    import torch

__all__ = ["MtebModel", "as_mteb_model"]


def as_mteb_model(encoder: Encodes, *, name: str | None = None) -> MtebModel:
    """An encoder as a model that ``mteb.evaluate`` takes.

    Args:
        encoder: Polyhead's, or anything that encodes texts (:data:`polyhead.evaluate.vectors.Encodes`). Questions and
            documents of retrieval are encoded by its ``encode_query`` and ``encode_document``, where it has them.
        name: in mteb's results, after "polyhead/"; by default the encoder's.

    Raises:
        MissingExtraError: mteb is not installed.

    Example:
        >>> import mteb
        >>> from polyhead import Encoder
        >>> from polyhead.evaluate import as_mteb_model
        >>> task = mteb.get_task("STS15")
        >>> mteb.evaluate(as_mteb_model(Encoder()), task)  # doctest: +SKIP
    """
    try:
        import mteb  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("mteb is not installed: pip install 'mteb>=2.20'") from error
    return MtebModel(encoder, name or name_of(encoder))


class MtebModel:
    """mteb's ``EncoderProtocol`` around an encoder; see :func:`as_mteb_model`. Similarity is the cosine."""

    def __init__(self, encoder: Encodes, name: str) -> None:
        self.encoder = encoder
        self.name = name

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Vectors ``[texts, dim]`` of the "text" of mteb's batches, in their order.

        Args:
            inputs: batches, each with a list of texts under "text".
            task_metadata, hf_split, hf_subset: mteb's, not needed here.
            prompt_type: mteb's "query" or "document", or None.
            kwargs: mteb's encode options, such as a batch size; Polyhead chooses its own batches.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        kind = getattr(prompt_type, "value", prompt_type)
        side: Literal["", "query", "document"] = kind if kind in ("query", "document") else ""
        return vectors(self.encoder, texts, side=side)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine ``[n, m]`` of every row of the first with every row of the second."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine ``[n]`` of each row of the first with that row of the second."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside the results: name, fingerprint as revision, size of the vectors."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        # What mteb asks of a model and an encoder does not know stays unsaid, rather than guessed.
        known: dict[str, Any] = dict.fromkeys(ModelMeta.model_fields)
        for field, info in ModelMeta.model_fields.items():
            if not info.is_required():
                known.pop(field)
        known.update(
            name=f"polyhead/{self.name.replace('/', '-')}",
            revision=getattr(self.encoder, "fingerprint", None) or "unknown",
            embed_dim=getattr(self.encoder, "dim", None),
            max_tokens=getattr(self.encoder, "max_tokens", None),
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
        )
        return ModelMeta(**known)


def _unit(x: Any) -> torch.Tensor:
    import torch

    rows = torch.as_tensor(x, dtype=torch.float32)
    return torch.nn.functional.normalize(rows.unsqueeze(0) if rows.dim() == 1 else rows, dim=-1)
