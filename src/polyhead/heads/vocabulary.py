"""Heads read in the vocabulary: which token a head turns into which, without running a text.

A state of the residual stream that stands for a token goes through a head's value and output matrices and the
unembedding, ``logits = x W_V W_O diag(g) U^T``, with the gains of the norms around folded in. Rows are taken in blocks:
the vocabulary-by-vocabulary matrix is never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.heads._probe import Probe
from polyhead.heads.weights import ModelWeights, read_weights
from polyhead.model import HeadedModel

__all__ = ["States", "VocabularyView", "places", "single_token", "token_states"]

States = Literal["embedding", "first-mlp", "both"]


class _LayerOneReachedError(Exception):
    """Ends a run of the model once the state that enters layer 1 has been seen."""


def token_states(model: HeadedModel, ids: Sequence[int] | torch.Tensor, states: States = "both") -> torch.Tensor:
    """A residual state for each token, ``[tokens, hidden]`` float32, as it stands after layer 0 without attention.

    The model's own layer 0 runs on each token alone, its heads switched off and every other embedding (positions) at
    zero. Token states are in the model's own scale.

    Args:
        model: a model whose layers read the stream through a norm of their own (all pre-norm decoders).
        ids: tokens.
        states: "embedding" (before layer 0), "first-mlp" (what the feed-forward of layer 0 writes) or "both".

    Raises:
        InputError: a model with norms after the residual sums, or other ``states``.
    """
    if states not in ("embedding", "first-mlp", "both"):
        raise InputError(f"states is {states!r}, expected 'embedding', 'first-mlp' or 'both'.")
    given = torch.as_tensor(ids, device=model.device).reshape(-1)
    norms = _norms_before(model)
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[layer] = args[0]
            if layer == 1:
                raise _LayerOneReachedError

        return hook

    found = []
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(model.tap_heads(lambda _, z: torch.zeros_like(z), layers=[0]))
        stack.enter_context(_without_positions(model))
        for layer, norm in enumerate(norms):
            stack.callback(norm.register_forward_pre_hook(keep(layer)).remove)
        for block in given.split(1024):
            seen.clear()
            with suppress(_LayerOneReachedError):
                model(input_ids=block[:, None])
            before, after = seen[0][:, 0].float(), seen[1][:, 0].float()
            found.append({"embedding": before, "first-mlp": after - before, "both": after}[states])
    return torch.cat(found)


def _norms_before(model: HeadedModel) -> list[nn.Module]:
    """The norms before attention of layers 0 and 1."""
    probe, found = Probe.run(model), []
    for at in model.attention_layers[:2]:
        norm = None if probe.norms_around(at)[2] else probe.norm_before(at)
        if norm is None or len(model.attention_layers) < 2:
            raise InputError(
                f"Token states of '{model.name}' were asked for: expected a decoder of two layers or more whose layers "
                "read the stream through a norm of their own (GPT-2, Llama, Gemma), not norms after the sums (BERT)."
            )
        found.append(norm)
    return found


@contextmanager
def _without_positions(model: HeadedModel) -> Iterator[None]:
    find: Any = model.module.get_input_embeddings
    tokens = find()
    with ExitStack() as stack:
        for module in model.module.modules():
            if isinstance(module, nn.Embedding) and module is not tokens:
                stack.callback(module.register_forward_hook(lambda _, args, out: torch.zeros_like(out)).remove)
        yield


class VocabularyView:
    """A model's heads between tokens: states of source tokens in, logits of target tokens out.

    Args:
        model: a language model.
        states: what stands for a token; see :func:`token_states`.

    Example:
        >>> view = VocabularyView(load("gemma-3-270m"))
        >>> view.rows(view.states([1234]), layer=5)[0].shape  # [heads, vocabulary]
        torch.Size([4, 262144])
    """

    def __init__(self, model: HeadedModel, states: States = "both") -> None:
        self.model, self.kind = model, states
        self.weights: ModelWeights = read_weights(model)
        self.weights.require_unembedding()
        self._layers = [layer.expanded() for layer in self.weights.layers]

    def states(self, ids: Sequence[int] | torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """States ``[tokens, hidden]`` for the heads of a layer: those of layer 0 always read the embedding."""
        return token_states(self.model, ids, "embedding" if layer == 0 else self.kind)

    def writes(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """What each head writes for each state alone: ``[states, heads, hidden]``; biases and sizes left out."""
        at = self._layers[layer]
        values = torch.einsum("ni,hid->nhd", states.to(at.value.dtype), at.value)
        return torch.einsum("nhd,hdo->nho", values, at.output)

    def rows(self, states: torch.Tensor, layer: int, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[states, heads, vocabulary]`` (or of ``targets`` alone) of what each head writes for each state."""
        return self.weights.to_logits(self.writes(states, layer), targets)

    def ranks(self, states: torch.Tensor, layer: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many tokens a head puts above, and below, each state's target: two of ``[states, heads]``.

        A tie counts half: a head that writes nothing ties all tokens, so both are half the vocabulary.
        """
        above, below = [], []
        for some, target in zip(states.split(16), targets.split(16), strict=True):
            logits = self.rows(some, layer)
            higher, lower = places(logits, target[:, None].expand(-1, logits.shape[1]))
            above.append(higher)
            below.append(lower)
        return torch.cat(above), torch.cat(below)


def places(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of ``logits [..., vocabulary]`` lie above, and below, that of ``targets [...]``; a tie counts half."""
    own = logits.gather(-1, targets[..., None])
    higher, lower = (logits > own).sum(-1), (logits < own).sum(-1)
    ties = (logits.shape[-1] - 1 - higher - lower) / 2
    return higher + ties, lower + ties


def single_token(model: HeadedModel, words: Sequence[str]) -> dict[str, int]:
    """The words (a space before them, as they stand in text) that are one token of the model, with that token."""
    found = {}
    for word in words:
        ids = model.tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            found[word] = int(ids[0])
    return found
