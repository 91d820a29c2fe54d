"""The contract of self-attention: a few steps, of which a mechanism overrides the one it changes.

``project`` (hidden -> queries, keys, values), ``position`` (queries and keys -> the same, told where they stand),
``score`` (queries, keys -> logits; ``inner`` where these stay inner products), ``choose`` (who may look at whom),
``weigh`` (logits -> weights), ``mix`` (weights, values -> heads), ``output`` (heads -> hidden). Linear and recurrent
forms override ``attend``, which is score to mix at once, and ``step``. A layer whose score to mix are
the stock ones runs them as one fused kernel.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.call import AttentionShape, Call, State, check_input, positions_of
from polyhead.errors import InputError

__all__ = ["Attention", "LayerMatrices", "Positions", "repeat_groups"]

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Positions(Protocol):
    """What tells queries and keys where they stand: a module of ``positions/``."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[batch, heads, tokens, head_dim]`` and keys ``[batch, kv_heads, tokens, head_dim]``, changed."""
        ...


class LayerMatrices(Protocol):
    """A trained layer's matrices on row vectors, as :func:`polyhead.heads.read_weights` gives them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    output_bias: torch.Tensor


class Attention(nn.Module):
    """Multi-head self-attention, and the base of every mechanism.

    Args:
        shape: widths; None for the steps alone, without projections, as stock models use them
            (:func:`polyhead.attention.register`).
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand; None for no positions.

    Example:
        >>> import torch
        >>> layer = Attention(AttentionShape(32, 4), causal=True)
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    name: ClassVar[str] = "mha"
    summary: ClassVar[str] = "Scaled dot-product attention of several heads"
    cost: ClassVar[str] = "tokens^2"
    """Growth of time with tokens."""
    both_directions: ClassVar[bool] = True
    """Whether it is also defined where a token sees what stands behind it."""

    def __init__(
        self, shape: AttentionShape | None, *, causal: bool = False, positions: Positions | None = None
    ) -> None:
        super().__init__()
        if not causal and not self.both_directions:
            raise InputError(f"{type(self).__name__} with causal=False was asked for; it is defined with causal=True.")
        self.shape = shape
        self.causal = causal
        self.positions = positions
        self.balance_loss: torch.Tensor | None = None
        if shape is not None:
            self.make_projections(shape)

    # --- the steps

    def make_projections(self, shape: AttentionShape) -> None:
        """Create the layer's projections."""
        narrow = shape.groups_of * shape.size
        self.q_proj = nn.Linear(shape.dim, shape.width, bias=shape.bias)
        self.k_proj = nn.Linear(shape.dim, narrow, bias=shape.bias)
        self.v_proj = nn.Linear(shape.dim, narrow, bias=shape.bias)
        self.o_proj = nn.Linear(shape.width, shape.dim, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """``[batch, tokens, dim]`` -> queries ``[batch, heads, tokens, head_dim]``, keys and values a kv head each."""
        return self.split(self.q_proj(hidden)), self.split(self.k_proj(hidden)), self.split(self.v_proj(hidden))

    def position(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, told where they stand."""
        return (q, k) if self.positions is None else self.positions(q, k, call)

    def inner(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys whose inner product is the logit, for mechanisms that stay with inner products."""
        return q * self.scale(q, call), k

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Logits ``[batch, heads, query tokens, key tokens]``."""
        q, k = self.inner(q, k, call)
        return q @ repeat_groups(k, q.shape[1]).transpose(2, 3)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor | None:
        """Who may look at whom, ``[batch or 1, heads or 1, query tokens, key tokens]``; None: all at all."""
        return call.allowed()

    def weigh(self, logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Weights of the shape of ``logits``, zero where looking is not allowed."""
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        return logits.softmax(-1)

    def mix(self, weights: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` of weights and values ``[batch, kv_heads, tokens, head_dim]``."""
        return weights @ repeat_groups(v, weights.shape[1])

    def output(self, heads: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` -> ``[batch, tokens, dim]``."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    # --- the runs

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, query tokens, head_dim]``: score, choose, weigh and mix."""
        if self._is_stock("score", "weigh", "mix"):
            plain = call.causal and call.mask is None and call.padding is None and q.shape[2] == k.shape[2]
            plain = plain and self._is_stock("choose")
            allowed = None if plain else self.choose(q, k, call)
            q, k = self.inner(q, k, call)
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, is_causal=plain, scale=1.0, enable_gqa=grouped
            )
        return self.mix(self.weights(q, k, call), v, call)

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, query tokens, key tokens]``, for layers that have them."""
        return self.weigh(self.score(q, k, call), self.choose(q, k, call))

    def heads_of(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Head outputs ``[batch, heads, tokens, head_dim]`` before the output projection."""
        q, k, v, call = self._prepared(hidden, padding)
        return self.attend(q, k, v, call)

    def attention_weights(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Weights ``[batch, heads, tokens, tokens]`` of a run; rows of padding say nothing.

        Raises:
            InputError: the mechanism never forms weights.
        """
        if type(self).attend is not Attention.attend and type(self).weights is Attention.weights:
            raise InputError(f"{type(self).__name__} forms no attention weights; read its heads with heads_of().")
        q, k, _, call = self._prepared(hidden, padding)
        return self.weights(q, k, call)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, tokens, dim]`` -> the same shape, zero at padding.

        Args:
            hidden: states.
            padding: ``[batch, tokens]`` booleans, True at real tokens, on either side; None where all are.

        Raises:
            InputError: other shapes.
        """
        q, k, v, call = self._prepared(hidden, padding)
        mixed = self.output(self.attend(q, k, v, call), call)
        return mixed if padding is None else mixed.masked_fill(~padding[..., None], 0.0)

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens of a text, given what the tokens before left behind.

        Args:
            hidden: ``[batch, new tokens, dim]``, no padding.
            state: what the last step returned; None at the start. It is not changed.

        Returns:
            ``[batch, new tokens, dim]``, as the whole text at once would give, and the next state.

        Raises:
            InputError: a layer that is not causal.
        """
        q, k, v, call, state = self._begin_step(hidden, state)
        kept = State(state.seen + hidden.shape[1], {"keys": k, "values": v})
        if state.tensors:
            for name in ("keys", "values"):
                kept.tensors[name] = torch.cat([state.tensors[name], kept.tensors[name]], 2)
        call.k_positions = torch.arange(kept.seen, device=hidden.device)[None]
        out = self.output(self.attend(q, kept.tensors["keys"], kept.tensors["values"], call), call)
        kept.tensors |= call.after
        return out, kept

    # --- what a layer says of itself

    @property
    def dim(self) -> int:
        """Features of a token."""
        if self.shape is None:
            raise InputError("This layer was made without a shape, to serve a stock model; it has no width of its own.")
        return self.shape.dim

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes that :meth:`step` keeps after ``tokens`` tokens of one text, at ``itemsize`` bytes a number."""
        assert self.shape is not None
        return 2 * self.shape.groups_of * self.shape.size * tokens * itemsize

    def scale(self, q: torch.Tensor, call: Call) -> float:
        """Factor of the logits."""
        return q.shape[-1] ** -0.5 if call.scale is None else call.scale

    def split(self, features: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, heads x head_dim]`` -> ``[batch, heads, tokens, head_dim]``."""
        assert self.shape is not None
        return features.unflatten(2, (-1, self.shape.size)).transpose(1, 2)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: Any) -> Attention:
        """A layer that starts from a trained one's weights (see :func:`polyhead.heads.read_weights`).

        A mechanism whose projections are of another form overrides this, or refuses.
        """
        made = cls(shape_of(layer), **knobs)
        copy_matrices(made, layer)
        return made

    def _prepared(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> tuple[Any, Any, Any, Call]:
        check_input(hidden, padding, self.dim)
        if padding is not None:
            hidden = hidden.masked_fill(~padding[..., None], 0.0)
        positions = positions_of(hidden, padding)
        call = Call(hidden, positions, positions, padding, self.causal, keys_hidden=hidden)
        q, k, v = self.project(hidden)
        q, k = self.position(q, k, call)
        return q, k, v, call

    def _begin_step(self, hidden: torch.Tensor, state: State | None) -> tuple[Any, Any, Any, Call, State]:
        """Queries, keys and values of new tokens at their places, and the state so far."""
        call, state = self._step_call(hidden, state)
        q, k, v = self.project(hidden)
        q, k = self.position(q, k, call)
        return q, k, v, call, state

    def _step_call(self, hidden: torch.Tensor, state: State | None) -> tuple[Call, State]:
        """What a step knows before it projects, and the state so far."""
        if not self.causal:
            raise InputError("A step was asked of a layer with causal=False; make it with causal=True to decode.")
        check_input(hidden, None, self.dim)
        state = state or State()
        here = torch.arange(state.seen, state.seen + hidden.shape[1], device=hidden.device)[None]
        return Call(hidden, here, here, causal=True, before=state.tensors), state

    def _is_stock(self, *steps: str) -> bool:
        return all(getattr(type(self), step) is getattr(Attention, step) for step in steps)


def repeat_groups(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Key-value heads ``[batch, kv_heads, ...]`` repeated to one a query head (a view where there is one already)."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], 1)


def shape_of(layer: LayerMatrices) -> AttentionShape:
    """The widths of a trained layer.

    Raises:
        InputError: values of another width than keys.
    """
    heads, dim, size = layer.query.shape
    if layer.value.shape[2] != size:
        raise InputError(
            f"Values of {layer.value.shape[2]} features with keys of {size} were given; expected one width for both."
        )
    return AttentionShape(dim, heads, len(layer.key), size, bias=True)


def copy_matrices(made: Attention, layer: LayerMatrices) -> None:
    """Write a trained layer's matrices into the stock projections of ``made``."""
    pairs = (("q_proj", layer.query, layer.query_bias), ("k_proj", layer.key, layer.key_bias))
    for name, matrix, bias in (*pairs, ("v_proj", layer.value, layer.value_bias)):
        linear: nn.Linear = getattr(made, name)
        linear.weight.data.copy_(matrix.transpose(1, 2).flatten(0, 1))
        linear.bias.data.copy_(bias.flatten())
    made.o_proj.weight.data.copy_(layer.output.flatten(0, 1).T)
    made.o_proj.bias.data.copy_(layer.output_bias)
