"""DeCoRe: decode by contrast with the same model without its retrieval heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import LogitsProcessor

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

    def processor(self, model: HeadedModel, attention_mask: torch.Tensor | None = None) -> LogitsProcessor:
        """For the model's own ``generate(..., logits_processor=[contrast.processor(model)])``: sampling, batches.

        The masked run keeps keys and values of its own, from one step to the next, so a processor is for one call.
        Where rows change places between steps (beam search) it reads the texts again.

        Args:
            model: whose ``generate`` is called.
            attention_mask: of a padded batch of prompts, ``[batch, tokens]``, as ``generate`` gets it.
        """
        return _Contrast(self, model, attention_mask)

    def generate(self, model: HeadedModel, prompt: str, *, max_new_tokens: int = 20) -> str:
        """Continue a prompt greedily by the model's own ``generate``, until the end token.

        Raises:
            InputError: the model gives no logits.
        """
        generate = getattr(model.module, "generate", None)
        if generate is None:
            raise InputError(f"'{model.name}' gives no logits: load it with load(name, lm_head=True).")
        inputs = model.tokenize([prompt])
        ends = model.config.eos_token_id
        stop = set(ends if isinstance(ends, (list, tuple)) else [ends])
        given = [self.processor(model, inputs.get("attention_mask"))]
        found = generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=model.config.pad_token_id or 0,
            logits_processor=given,
        )
        said = found[0, inputs["input_ids"].shape[1] :].tolist()
        text: str = model.tokenizer.decode(said[:-1] if said and said[-1] in stop else said)
        return text

    def _masked(self, model: HeadedModel) -> Gate:
        return Gate(1.0 - head_mask(self.heads, model.layers, model.heads).float())


class _Contrast(LogitsProcessor):  # type: ignore[misc,unused-ignore]
    """Scores of each step from those of ``generate`` and of a masked run that follows it."""

    def __init__(self, contrast: DeCoRe, model: HeadedModel, mask: torch.Tensor | None) -> None:
        self.contrast, self.model, self.mask = contrast, model, mask
        self._gate = contrast._masked(model)
        self._read: torch.Tensor | None = None
        self._cache: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[batch, vocabulary]`` of the next token of ``input_ids [batch, tokens]``."""
        read = self._read
        known = 0 if read is None or read.shape[0] != input_ids.shape[0] else read.shape[1]
        if known >= input_ids.shape[1] or (known and not torch.equal(read, input_ids[:, :known])):  # type: ignore[arg-type]
            known = 0
        more: dict[str, Any] = {}
        if self.mask is not None:
            fresh = input_ids.shape[1] - self.mask.shape[1]
            mask = torch.nn.functional.pad(self.mask, (0, fresh), value=1)
            places = (mask.cumsum(1) - 1).clamp(min=0)
            more = {"attention_mask": mask, "position_ids": places[:, known:]}
        with torch.no_grad(), self._gate.on(self.model):
            outputs = self.model(
                input_ids=input_ids[:, known:], past_key_values=self._cache if known else None, use_cache=True, **more
            )
        self._read, self._cache = input_ids.clone(), outputs.past_key_values
        return self.contrast.contrast(scores, _logits(outputs, self.model)[:, -1])


def _logits(outputs: Any, model: HeadedModel) -> torch.Tensor:
    logits: torch.Tensor | None = getattr(outputs, "logits", None)
    if logits is None:
        raise InputError(f"'{model.name}' gives no logits: load it with load(name, lm_head=True).")
    return logits
