"""Grouped-query to latent attention (TransMLA): the copying of key-value heads becomes a matrix that can learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.compress._compare import report_of
from polyhead.compress._replace import Replacement, linear_of, parity_or_refuse, replaced, turned
from polyhead.compress.report import Report
from polyhead.errors import InputError
from polyhead.heads.tasks import Task
from polyhead.papers import paper
from polyhead.structure import AttentionLayer

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ExpandedAttention", "gqa_to_mla", "is_gqa_representable"]

_REFUSED = {"attn_logit_softcapping": "caps its logits", "sinks": "has sinks of its own"}


class ExpandedAttention(Replacement):
    """Attention that caches what grouped-query attention caches, and makes keys and values for every query head of it.

    ``c_k = x down_keys`` and ``c_v = x down_values`` are cached, as wide as the old keys and values; ``up_keys`` and
    ``up_values`` make ``[heads x head_dim]`` of them, at first copies. Rotary positions (and a norm of keys) come after
    ``up_keys``. Angles of cached tokens are kept once for all layers of the model beside the cache.

    Args:
        layer: the layer it takes the place of.
        balance: spread singular values evenly over both factors, so that neither learns much faster.

    Source:
        transmla (Meng et al. 2025, section 3).
    """

    down_keys: nn.Linear
    down_values: nn.Linear
    up_keys: nn.Linear
    up_values: nn.Linear

    def __init__(self, layer: AttentionLayer, balance: bool = False) -> None:
        super().__init__(layer)
        old: Any = layer.module
        share = self.num_key_value_groups
        self.num_key_value_groups = 1
        self.q_norm: nn.Module | None = getattr(old, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(old, "k_norm", None)
        for role in ("key", "value"):
            linear = getattr(old, f"{role[0]}_proj")
            down = linear.weight.detach().double()
            up = (
                torch.eye(len(down))
                .double()
                .unflatten(0, (self.kv_heads, -1))
                .repeat_interleave(share, 0)
                .flatten(0, 1)
            )
            if balance:
                down, up = _balanced(down, up, share)
            bias = linear.bias
            if bias is not None:
                bias = bias.detach().unflatten(0, (self.kv_heads, -1)).repeat_interleave(share, 0).flatten()
            setattr(self, f"down_{role}s", linear_of(down, None, linear))
            setattr(self, f"up_{role}s", linear_of(up, bias, linear))
        self.cache_numbers_per_token = 2 * self.kv_heads * self.head_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As transformers' attention modules: ``[batch, tokens, dim]`` -> the same, and weights where there are."""
        half = self.head_dim // 2
        cos, sin = (each[:, None, :, :half].expand(len(hidden_states), -1, -1, -1) for each in position_embeddings)
        q = self.split(self.q_proj(hidden_states), self.heads)
        q = turned(q if self.q_norm is None else self.q_norm(q), cos, sin)
        keys, values = self.down_keys(hidden_states)[:, None], self.down_values(hidden_states)[:, None]
        if past_key_values is not None:
            angles = self._angles(past_key_values, cos, sin)
            keys, values = past_key_values.update(keys, values, self.layer_idx)
            cos_k, sin_k = (each[:, :, -keys.shape[2] :] for each in angles)
        else:
            cos_k, sin_k = cos, sin
        keys = self.split(self.up_keys(keys[:, 0]), self.heads)
        keys = turned(keys if self.k_norm is None else self.k_norm(keys), cos_k, sin_k)
        values = self.split(self.up_values(values[:, 0]), self.heads)
        heads, weights = self.run_kernel(q, keys, values, attention_mask, **kwargs)
        return self.o_proj(heads.flatten(2)), weights

    def _angles(self, cache: Any, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all tokens so far; the first layer of its kind writes down those of new tokens."""
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[self.layer_idx] if kinds else ""
        known: dict[str, tuple[torch.Tensor, torch.Tensor]] = cache.__dict__.setdefault("_polyhead_angles", {})
        held = known.get(kind)
        past = cache.get_seq_length(self.layer_idx)
        if past and held is None:
            raise InputError("The cache was filled by another model; give latent attention a fresh one.")
        if held is None or past == 0:
            known[kind] = cos, sin
        elif held[0].shape[2] != past + cos.shape[2]:
            known[kind] = torch.cat([held[0][:, :, :past], cos], 2), torch.cat([held[1][:, :, :past], sin], 2)
        return known[kind]


def _balanced(down: torch.Tensor, up: torch.Tensor, share: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product of a ``down [latent, dim]`` and an ``up [heads x head_dim, latent]`` of equal singular values.

    Columns of the copying ``up`` are orthogonal and of length ``sqrt(share)``: decomposing ``down`` is enough.
    """
    left, sizes, right = torch.linalg.svd(down, full_matrices=False)
    root = (sizes * share**0.5).sqrt()
    if len(root) < len(down):  # a latent wider than the model: the rest of it stays zero
        spare = len(down) - len(root)
        left, root = nn.functional.pad(left, (0, spare)), nn.functional.pad(root, (0, spare))
        right = nn.functional.pad(right, (0, 0, 0, spare))
    return root[:, None] * right, up @ left * (root / share**0.5)


def is_gqa_representable(layer: ExpandedAttention, tolerance: float = 1e-6) -> bool:
    """Whether the query heads of each old group still have the same keys and values, as grouped-query attention can.

    Args:
        layer: a converted layer, trained or not.
        tolerance: largest difference of weights, relative to the largest weight.
    """
    for up in (layer.up_keys, layer.up_values):
        for each in (up.weight, up.bias):
            if each is None:
                continue
            heads = each.detach().unflatten(0, (layer.kv_heads, -1, layer.head_dim))
            if (heads - heads[:, :1]).abs().max() > tolerance * each.detach().abs().max():
                return False
    return True


@paper("transmla")
def gqa_to_mla(model: HeadedModel, *, balance: bool = False, task: Task | None = None) -> tuple[HeadedModel, Report]:
    """A copy of a decoder that computes the same at the same cache, and whose heads can learn keys of their own.

    Args:
        model: with rotary positions over whole heads (Llama, Mistral, Qwen 2 and 3, Gemma 3, ...).
        balance: spread singular values evenly over both factors of keys and of values.
        task: to measure the quality before and after, which are the same.

    Returns:
        The copy, whose attention modules are :class:`ExpandedAttention`, and the report. Train ``up_keys`` and
        ``up_values`` (and whatever else). ``save_pretrained`` has no stock form for it.

    Raises:
        UnreadableModelError: layers of another build.

    Source:
        transmla (Meng et al. 2025, section 3).

    Example:
        >>> import polyhead
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(
        ...     vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
        ... )
        >>> same, report = gqa_to_mla(polyhead.load(LlamaModel(config)))
        >>> report.before.cache_bytes_per_token == report.after.cache_bytes_per_token, report.change < 1e-5
        (True, True)
    """
    from polyhead.model import HeadedModel

    module = replaced(model, lambda layer: ExpandedAttention(layer, balance), refuse=_REFUSED)
    parity = parity_or_refuse(model, module)
    expanded = HeadedModel(module, name=model.name, files=model.files)
    return expanded, report_of(model, expanded, task, parity=parity, details={"balance": balance})
