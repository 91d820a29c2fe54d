"""Multi-head to latent attention (MHA2MLA): few rotary pairs, the rest of keys and values in one latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from polyhead.compress._compare import report_of
from polyhead.compress._replace import Replacement, linear_of, parity_or_refuse, replaced, turned
from polyhead.compress.report import Report
from polyhead.errors import InputError
from polyhead.heads.tasks import Task
from polyhead.papers import paper
from polyhead.structure import AttentionLayer
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["LatentAttention", "Selection", "choose_pairs", "latent_factors", "rope_contribution", "to_mla"]

Selection = Literal["high", "low", "uniform"]
Factors = Literal["joint", "split"]
_REFUSED = {
    "q_norm": "normalises its queries and keys, which a latent cannot stand for",
    "attn_logit_softcapping": "caps its logits",
    "sinks": "has sinks of its own",
}


def rope_contribution(model: HeadedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """How much each rotary pair adds to logits: the mean over all queries and keys of ``|q pair| |k pair|``.

    Args:
        model: a decoder with rotary positions.
        batches: inputs of the model, such as ``[model.tokenize(texts)]``; padding counts as tokens.

    Returns:
        ``[kv_heads, head_dim / 2]`` a layer, the mean over the query heads that share a key-value head.

    Raises:
        InputError: no inputs.

    Source:
        mha2mla (Ji et al. 2025, section 3.1, 2-norm contribution).
    """
    if not batches:
        raise InputError("No inputs were given; expected a few batches of texts such as the model will see.")
    sums: dict[tuple[int, str], torch.Tensor] = {}
    counts: dict[int, int] = {}

    def watch(layer: int, call: AttentionCall) -> None:
        for name, states in (("q", call.query), ("k", call.key)):
            lengths = states.double().unflatten(-1, (2, -1)).norm(dim=-2)  # turning a pair keeps its length
            sums[layer, name] = sums.get((layer, name), 0) + lengths.sum((0, 2)).cpu()
        counts[layer] = counts.get(layer, 0) + call.query.shape[0] * call.query.shape[2]

    with torch.no_grad(), model.tap_attention(watch):
        for batch in batches:
            model(**batch)
    found = []
    for layer in model.attention_layers:
        q, k = (sums[layer.index, name] / counts[layer.index] for name in "qk")
        found.append((q.unflatten(0, (len(k), -1)).mean(1) * k).float())
    return found


def choose_pairs(contribution: torch.Tensor | Selection, kept: int, kv_heads: int, pairs: int) -> torch.Tensor:
    """Rotary pairs that keep their rotation, ``[kv_heads, kept]`` rising.

    Args:
        contribution: ``[kv_heads, pairs]``, of which the highest stay; or "high" or "low" frequencies, or "uniform"ly
            spread ones, the same for all heads.
        kept: how many.
        kv_heads, pairs: of the layer.

    Example:
        >>> choose_pairs("uniform", 2, 1, 8), choose_pairs(torch.tensor([[0.1, 0.9, 0.5]]), 2, 1, 3)
        (tensor([[0, 4]]), tensor([[1, 2]]))
    """
    if isinstance(contribution, torch.Tensor):
        if contribution.shape != (kv_heads, pairs):
            raise InputError(f"Contributions {list(contribution.shape)} were given; expected {[kv_heads, pairs]}.")
        return contribution.topk(kept, dim=1).indices.sort(1).values
    rows = {
        "high": torch.arange(kept),
        "low": torch.arange(pairs - kept, pairs),
        "uniform": torch.arange(kept) * pairs // max(1, kept),
    }
    if contribution not in rows:
        raise InputError(f"select={contribution!r} was given; expected 'high', 'low', 'uniform' or contributions.")
    return rows[contribution].expand(kv_heads, -1).clone()


def latent_factors(
    keys: torch.Tensor, values: torch.Tensor, rank: int, factors: Factors = "joint"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights through a latent: ``keys ~ down @ up_keys`` and ``values ~ down @ up_values``.

    Args:
        keys: ``[dim, a]`` on row vectors, the parts that are not rotated.
        values: ``[dim, b]``.
        rank: numbers of the latent.
        factors: one singular value decomposition of both side by side, or half of the rank for each.

    Returns:
        ``[dim, rank]``, ``[rank, a]``, ``[rank, b]`` float64; both factors carry the square root of singular values.

    Source:
        mha2mla (Ji et al. 2025, section 3.2).
    """
    wide = keys.shape[1]
    if factors == "joint":
        down, up = _factor(torch.cat([keys, values], 1), rank)
        return down, up[:, :wide], up[:, wide:]
    if factors != "split":
        raise InputError(f"factors={factors!r} was given; expected 'joint' or 'split'.")
    most = [min(part.shape) for part in (keys, values)]
    first = min(max(rank // 2, rank - most[1]), most[0])
    down_keys, up_keys = _factor(keys, first)
    down_values, up_values = _factor(values, rank - first)
    zeros = [up.new_zeros(n, up.shape[1]) for up, n in ((up_keys, rank - first), (up_values, first))]
    ups = torch.cat([up_keys, zeros[0]]), torch.cat([zeros[1], up_values])
    return torch.cat([down_keys, down_values], 1), ups[0], ups[1]


def _factor(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, sizes, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


class LatentAttention(Replacement):
    """A decoder's attention that caches a latent for keys and values beside the keys' few rotated pairs.

    ``c = x down`` is cached with ``k_rope(x)`` of each key-value head, rotated. Keys are
    ``[rotated pairs, c up_keys]``, values ``c up_values``. A step of decoding never forms them: queries are carried
    into the latent instead (``absorbs``), which gives the same numbers.

    Args:
        layer: the layer it takes the place of.
        pairs: ``[kv_heads, kept]`` rotary pairs that keep their rotation.
        rank: numbers of the latent.
        factors: "joint" or "split", see :func:`latent_factors`.

    Source:
        mha2mla (Ji et al. 2025, sections 3.1 and 3.2; absorption as in DeepSeek-V2).
    """

    def __init__(self, layer: AttentionLayer, pairs: torch.Tensor, rank: int, factors: Factors = "joint") -> None:
        super().__init__(layer)
        old: Any = layer.module
        half, kept = layer.head_dim // 2, pairs.shape[1]
        self.pairs: torch.Tensor
        self.register_buffer("pairs", pairs)
        self.rank, self.absorbs = rank, True
        rest = torch.ones(len(pairs), half, dtype=torch.bool).scatter(1, pairs, value=False)
        rest_pairs = rest.nonzero()[:, 1].view(len(pairs), half - kept)
        order = torch.cat([pairs, pairs + half, rest_pairs, rest_pairs + half], 1)  # [kv_heads, head_dim]
        split = 2 * kept

        def by_head(linear: nn.Linear, heads: int) -> tuple[torch.Tensor, torch.Tensor | None]:
            bias = None if linear.bias is None else linear.bias.detach().unflatten(0, (heads, -1))
            return linear.weight.detach().unflatten(0, (heads, -1)), bias

        def ordered(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return torch.stack([each[own] for each, own in zip(states, index, strict=True)])

        weight, bias = by_head(old.q_proj, self.heads)
        query = order.repeat_interleave(self.num_key_value_groups, 0)
        moved = None if bias is None else ordered(bias, query).flatten()
        self.q_proj = linear_of(ordered(weight, query).flatten(0, 1), moved, old.q_proj)
        weight, bias = by_head(old.k_proj, self.kv_heads)
        weight, bias = ordered(weight, order), None if bias is None else ordered(bias, order)
        rope_bias, key_bias = (None, None) if bias is None else (bias[:, :split], bias[:, split:])
        down, keys, values = latent_factors(
            weight[:, split:].flatten(0, 1).T, old.v_proj.weight.detach().T, rank, factors
        )
        flat = [None if each is None else each.flatten() for each in (rope_bias, key_bias)]
        self.k_rope = linear_of(weight[:, :split].flatten(0, 1), flat[0], old.k_proj)
        self.down = linear_of(down.T, None, old.k_proj)
        self.up_keys = linear_of(keys.T, flat[1], old.k_proj)
        self.up_values = linear_of(values.T, old.v_proj.bias, old.v_proj)
        self.cache_numbers_per_token = rank + self.kv_heads * split

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As transformers' attention modules: ``[batch, tokens, dim]`` -> the same, and weights where there are."""
        width = 2 * self.pairs.shape[1]
        q = self.split(self.q_proj(hidden_states), self.heads)
        rope, latent = self.split(self.k_rope(hidden_states), self.kv_heads), self.down(hidden_states)[:, None]
        angles = [each[..., : each.shape[-1] // 2][:, :, self.pairs].transpose(1, 2) for each in position_embeddings]
        rope = turned(rope, *angles)
        grouped = [each.repeat_interleave(self.num_key_value_groups, 1) for each in angles]
        q_rope, q_rest = turned(q[..., :width], *grouped), q[..., width:]
        if past_key_values is not None:
            latent, rope = past_key_values.update(latent, rope, self.layer_idx)
        if self.absorbs and q.shape[2] == 1 and latent.shape[2] > 1:
            heads, weights = self._absorbed(q_rope, q_rest, rope, latent, attention_mask, **kwargs)
        else:
            keys, values = (self.split(up(latent[:, 0]), self.kv_heads) for up in (self.up_keys, self.up_values))
            q, keys = torch.cat([q_rope, q_rest], -1), torch.cat([rope, keys], -1)
            heads, weights = self.run_kernel(q, keys, values, attention_mask, **kwargs)
        return self.o_proj(heads.flatten(2)), weights

    def _absorbed(
        self, q_rope: torch.Tensor, q_rest: torch.Tensor, rope: torch.Tensor, latent: torch.Tensor, mask: Any, **kw: Any
    ) -> tuple[torch.Tensor, Any]:
        """Heads of one step with queries carried into the latent; a bias of keys adds the same to a query's logits."""
        groups = self.num_key_value_groups
        up_keys, up_values = (
            up.weight.unflatten(0, (self.kv_heads, -1)).repeat_interleave(groups, 0)
            for up in (self.up_keys, self.up_values)
        )
        q = torch.cat([q_rope, torch.einsum("bhtd,hdr->bhtr", q_rest, up_keys)], -1)
        shared = latent.expand(-1, self.kv_heads, -1, -1)
        mixed, weights = self.run_kernel(q, torch.cat([rope, shared], -1), shared, mask, **kw)
        heads = torch.einsum("bthr,hdr->bthd", mixed, up_values)
        if self.up_values.bias is not None:
            heads = heads + self.up_values.bias.unflatten(0, (self.kv_heads, -1)).repeat_interleave(groups, 0)
        return heads, weights


@paper("mha2mla")
def to_mla(
    model: HeadedModel,
    rank: int | None = None,
    rope_pairs: int | None = None,
    *,
    select: Selection | Sequence[torch.Tensor] = "uniform",
    factors: Factors = "joint",
    task: Task | None = None,
) -> tuple[HeadedModel, Report]:
    """A copy of a decoder whose attention caches a latent in place of keys and values.

    Args:
        model: with rotary positions over whole heads, and no norm of queries and keys (Llama, Mistral, Qwen 2, ...).
        rank: numbers of the latent; None for as many as it takes to be exact.
        rope_pairs: pairs of each key-value head that keep their rotation; None for all.
        select: which: the :func:`rope_contribution` of each layer (the paper's choice), or "high" or "low" frequencies
            or "uniform"ly spread ones.
        factors: "joint" (the paper's) or "split", see :func:`latent_factors`.
        task: to measure the quality before and after.

    Returns:
        The copy, whose attention modules are :class:`LatentAttention`, and the report: ``parity`` is that of the exact
        form. It runs, generates and trains as before; train it a little. ``save_pretrained`` has no stock form for it.

    Raises:
        InputError: a rank or a number of pairs that the layers do not have.
        UnreadableModelError: layers of another build.

    Source:
        mha2mla (Ji et al. 2025, section 3).

    Example:
        >>> import polyhead
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=8)
        >>> smaller, report = to_mla(polyhead.load(LlamaModel(config)), rank=32, rope_pairs=1)
        >>> report.before.cache_bytes_per_token, report.after.cache_bytes_per_token
        (1024, 384)
    """
    from polyhead.model import HeadedModel

    layers = model.attention_layers
    pairs = min(layer.head_dim for layer in layers) // 2
    kept = pairs if rope_pairs is None else rope_pairs
    most = min(_full_rank(layer, kept) for layer in layers)
    if not 0 <= kept <= pairs or (rank is not None and not 1 <= rank <= most):
        raise InputError(
            f"rank={rank} and rope_pairs={rope_pairs} were given; expected 1 to {most} numbers and 0 to {pairs} pairs."
        )

    def chosen(at: int, count: int) -> torch.Tensor:
        own = select if isinstance(select, str) else select[at]
        return choose_pairs(own, count, layers[at].kv_heads, layers[at].head_dim // 2)

    if not isinstance(select, str) and len(select) != len(layers):
        raise InputError(f"Contributions of {len(select)} layers were given; '{model.name}' has {len(layers)}.")
    exact = replaced(
        model,
        lambda layer: LatentAttention(layer, chosen(layer.index, layer.head_dim // 2), _full_rank(layer, pairs)),
        refuse=_REFUSED,
    )
    parity = parity_or_refuse(model, exact)
    module = replaced(
        model,
        lambda layer: LatentAttention(layer, chosen(layer.index, kept), rank or _full_rank(layer, kept), factors),
        refuse=_REFUSED,
    )
    smaller = HeadedModel(module, name=model.name, files=model.files)
    details = {"rank": rank, "rope pairs": kept, "factors": factors}
    return smaller, report_of(model, smaller, task, parity=parity, details=details)


def _full_rank(layer: AttentionLayer, kept: int) -> int:
    """Numbers of a latent that loses nothing."""
    weight = layer.output_projection.weight
    assert isinstance(weight, torch.Tensor)
    return min(weight.shape[0], layer.kv_heads * (2 * layer.head_dim - 2 * kept))
