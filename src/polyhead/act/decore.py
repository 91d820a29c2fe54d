"""DeCoRe: decode by contrast with the same model without its retrieval heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from polyhead.act.gate import Gate
from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["DeCoRe"]


@paper("decore")
class DeCoRe:
    """Contrastive decoding: what the model says more strongly with its retrieval heads than without them.

    Scores are ``(1 + a) log p - a log p_masked``, over tokens that have at least ``plausibility`` of the most probable
    token's probability. Two forward passes a token; no training.

    Args:
        heads: what is masked in the contrast: ``retrieval_map.top(n)``.
        alpha: "entropy" takes the entropy of ``p`` (in nats), so that the contrast grows where the model is unsure; a
            number is taken as it is, and 0 is greedy decoding.
        plausibility: of the maximum probability.

    Example:
        >>> def answer(model, retrieval_map, prompt):  # a decoder loaded with lm_head=True
        ...     contrast = DeCoRe(retrieval_map.top(4))
        ...     return contrast.generate(model, prompt, max_new_tokens=10)
    """

    def __init__(self, heads: Heads, alpha: Literal["entropy"] | float = "entropy", plausibility: float = 0.1) -> None:
        if isinstance(alpha, str) and alpha != "entropy":
            raise InputError(f"alpha is {alpha!r}, expected 'entropy' or a number.")
        if not 0 <= plausibility <= 1:
            raise InputError(f"plausibility is {plausibility}, expected a share between 0 and 1.")
        self.heads = heads if heads is None or hasattr(heads, "shape") else list(heads)
        self.alpha, self.plausibility = alpha, plausibility

    def contrast(self, base: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Scores ``[..., vocabulary]`` from the logits of the two runs; minus infinity for implausible tokens."""
        log_base, log_masked = (torch.log_softmax(logits.float(), -1) for logits in (base, masked))
        alpha: Any = self.alpha
        if alpha == "entropy":
            alpha = -(log_base.exp() * log_base.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
        scores = (1 + alpha) * log_base - alpha * log_masked
        floor = log_base.amax(-1, keepdim=True) + torch.log(torch.tensor(self.plausibility))
        return scores.masked_fill(log_base < floor, float("-inf"))

    def next_scores(self, model: HeadedModel, **inputs: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, ``[batch, tokens, vocabulary]``, after every token of the inputs."""
        base = _logits(model(**inputs), model)
        with self._masked(model).on(model):
            masked = _logits(model(**inputs), model)
        return self.contrast(base, masked)

    def generate(self, model: HeadedModel, prompt: str, *, max_new_tokens: int = 20) -> str:
        """Continue a prompt, token by token, until the end token; both runs have a key-value cache of their own.

        Raises:
            InputError: the model gives no logits.
        """
        step = model.tokenize([prompt])["input_ids"]
        caches: list[Any] = [None, None]
        masked = self._masked(model)
        ends = model.config.eos_token_id
        stop = set(ends if isinstance(ends, (list, tuple)) else [ends])
        said: list[int] = []
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                base = model(input_ids=step, past_key_values=caches[0], use_cache=True)
                with masked.on(model):
                    other = model(input_ids=step, past_key_values=caches[1], use_cache=True)
                caches = [base.past_key_values, other.past_key_values]
                scores = self.contrast(_logits(base, model)[:, -1], _logits(other, model)[:, -1])
                step = scores.argmax(-1, keepdim=True)
                if int(step) in stop:
                    break
                said.append(int(step))
        text: str = model.tokenizer.decode(said)
        return text

    def _masked(self, model: HeadedModel) -> Gate:
        return Gate(1.0 - head_mask(self.heads, model.layers, model.heads).float())


def _logits(outputs: Any, model: HeadedModel) -> torch.Tensor:
    logits: torch.Tensor | None = getattr(outputs, "logits", None)
    if logits is None:
        raise InputError(f"'{model.name}' gives no logits: load it with load(name, lm_head=True).")
    return logits
