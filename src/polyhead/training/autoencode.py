"""Starbucks' pretraining: every size of a ladder learns to fill masks, and to hold a text in its first token."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["LadderAutoencoder"]


@paper("starbucks")
class LadderAutoencoder:
    """SMAE as an objective of the :class:`~polyhead.training.Trainer`: texts alone in, before :class:`Starbucks`.

    For each size (layer ``n``, width ``d``) a head ``t(h) = norm(gelu(W[:, :d] h[:d] + b))`` reads the states after
    layer ``n``. Masked tokens are told from ``t(h)`` of their place (MLM); and from a decoder of one layer that sees
    the text under heavier masks, with ``t(h)`` of the first token in its first place (MAE). The loss is the mean over
    sizes of ``(MLM + MAE) / 2``. Tokens are drawn one by one, where the authors draw words, and always become the mask
    token.

    Args:
        sizes: ``(layer, width)``, as of :class:`Starbucks`.
        mask: share of tokens the encoder does not see.
        decoder_mask: share the decoder does not see; those masked for the encoder are among them.

    Example:
        >>> from polyhead.training import LadderAutoencoder, Options, Trainer
        >>> objective = LadderAutoencoder([(1, 64), (2, 128), (4, 256), (6, 384)])
        >>> Trainer(objective, options=Options(batch_size=2)).fit("all-MiniLM-L6-v2", ["one text", "two texts"]).steps_
        1
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], *, mask: float = 0.2, decoder_mask: float = 0.4) -> None:
        if not sizes or not 0 < mask <= decoder_mask < 1:
            raise InputError(
                f"sizes {list(sizes)}, mask {mask}, decoder_mask {decoder_mask}: expected at least one size, and "
                "0 < mask <= decoder_mask < 1."
            )
        self.sizes = [(int(layer), int(width)) for layer, width in sizes]
        self.mask, self.decoder_mask = mask, decoder_mask

    def bind(self, model: SentenceTransformer) -> nn.Module:
        """The loss of a model.

        Raises:
            InputError: no mask token, a size the model does not have, or a body that is not built like BERT.
        """
        return _Autoencoding(model, self)


class _Autoencoding(nn.Module):
    """Under sentence-transformers' contract of a loss."""

    def __init__(self, model: SentenceTransformer, settings: LadderAutoencoder) -> None:
        super().__init__()
        body: Any = model[0].auto_model
        config, tokenizer = body.config, model.tokenizer
        if not hasattr(body, "embeddings") or not hasattr(getattr(body, "encoder", None), "layer"):
            raise InputError(f"{type(body).__name__} is not built like BERT: expected embeddings and encoder.layer.")
        if tokenizer.mask_token_id is None:
            raise InputError("The tokenizer has no mask token.")
        width, depth = int(config.hidden_size), int(config.num_hidden_layers)
        if any(not (1 <= layer <= depth and 1 <= size <= width) for layer, size in settings.sizes):
            raise InputError(f"Sizes {settings.sizes}; the model has {depth} layers of {width}.")
        self.model = model
        self.sizes, self.shares = settings.sizes, (settings.mask, settings.decoder_mask)
        self.mask_id, self.special = int(tokenizer.mask_token_id), sorted(tokenizer.all_special_ids)
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder = copy.deepcopy(body.encoder.layer[0])
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None) -> Tensor:
        """The loss of a batch: the mean over its columns of texts."""
        return torch.stack([self._column(features) for features in sentence_features]).mean()

    def _column(self, features: dict[str, Any]) -> Tensor:
        ids, mask = features["input_ids"], features["attention_mask"]
        places = torch.isin(ids, torch.tensor(self.special, device=ids.device)).logical_not() & mask.bool()
        # One draw for both, so that what the encoder does not see the decoder does not see either.
        drawn = torch.rand(ids.shape).to(ids.device)
        hidden, heavier = ((drawn < share) & places for share in self.shares)
        body: Any = self.model[0].auto_model
        found = body(ids.masked_fill(hidden, self.mask_id), attention_mask=mask, output_hidden_states=True)
        seen = body.embeddings(input_ids=ids.masked_fill(heavier, self.mask_id))
        additive = (1.0 - mask[:, None, None, :].to(seen.dtype)) * torch.finfo(seen.dtype).min
        losses = []
        for layer, width in self.sizes:
            read = self._read(found.hidden_states[layer][..., :width])
            told = self._told(read, ids, hidden)
            decoded = self.decoder(torch.cat((read[:, :1].to(seen.dtype), seen[:, 1:]), 1), attention_mask=additive)
            decoded = decoded[0] if isinstance(decoded, tuple) else decoded
            losses.append((told + self._told(self._read(decoded), ids, heavier)) / 2)
        return torch.stack(losses).mean()

    def _read(self, states: Tensor) -> Tensor:
        """``t(h) [..., hidden]`` of ``states [..., width]``."""
        narrow = nn.functional.linear(states, self.dense.weight[:, : states.shape[-1]], self.dense.bias)
        read: Tensor = self.norm(nn.functional.gelu(narrow))
        return read

    def _told(self, read: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
        """Mean cross-entropy of the hidden tokens; 0 where none is hidden."""
        body: Any = self.model[0].auto_model
        logits = nn.functional.linear(read[hidden], body.get_input_embeddings().weight, self.bias)
        total = nn.functional.cross_entropy(logits.float(), ids[hidden], reduction="sum")
        return total / hidden.sum().clamp(min=1)
