"""One watched run of a model: which linear layers make queries, keys and values, and which norms stand around them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.model import HeadedModel
from polyhead.structure import AttentionLayer, is_linear, probe_inputs

__all__ = ["Gain", "Probe", "projections_of"]

_ROLE = re.compile(r"^(?:in_proj_)?(q|k|v)(?:uery|ey|alue)?(?:_?proj|_lin|_layer)?$")
_FUSED = re.compile(r"^(qkv|qkv_proj|query_key_value|Wqkv|c_attn|in_proj|att_proj|W_pack)$")
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Gain:
    """What a norm (or a per-feature scale) does: ``y = x / size(x) * gain + bias``.

    Attributes:
        kind: "layer" (the mean is subtracted), "rms" or "scale" (nothing is divided by).
        gain, bias: ``[features]``.
    """

    kind: str
    gain: torch.Tensor
    bias: torch.Tensor


@dataclass
class _Event:
    module: nn.Module
    given: torch.Tensor
    gave: torch.Tensor
    is_gain: bool


@dataclass
class Probe:
    """What passed through a model's linear layers and norms, in order, and what its attention calls and heads held.

    Attributes:
        events: in the order of computation.
        calls: per layer ``(query, key, value)`` as the attention call saw them, where the model has one.
        heads: per layer the head outputs ``[batch, tokens, heads, dim]``.
        name: of the model.
    """

    name: str
    events: list[_Event] = field(default_factory=list)
    calls: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    heads: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def run(cls, model: HeadedModel) -> Probe:
        """Run a smallest input: four tokens, or one where the values can be seen in the head outputs only."""
        probe = cls(model.name)
        inputs = probe_inputs(model.module)
        interface = all(at.uses_interface for at in model.attention_layers)
        if not interface and "input_ids" in inputs:
            inputs = {"input_ids": inputs["input_ids"][:, :1]}

        def watch(layer: int, call: Any) -> None:
            probe.calls[layer] = (call.query, call.key, call.value)

        def heads(layer: int, z: torch.Tensor) -> None:
            probe.heads[layer] = z

        handles = []
        for module in model.module.modules():
            gain = _is_gain(module)
            if gain or is_linear(module):
                handles.append(module.register_forward_hook(probe._hook(gain)))
        training = model.module.training
        model.module.eval()
        try:
            with torch.no_grad(), model.tap_heads(heads):
                if interface:
                    with model.tap_attention(watch):
                        model(**inputs)
                else:
                    model(**inputs)
        finally:
            model.module.train(training)
            for handle in handles:
                handle.remove()
        return probe

    def _hook(self, is_gain: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], gave: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(gave, torch.Tensor):
                self.events.append(_Event(module, args[0], gave, is_gain))

        return hook

    def index_of(self, module: nn.Module, call: int) -> int | None:
        """Position of a module's ``call``-th event."""
        found = [i for i, event in enumerate(self.events) if event.module is module]
        return found[call] if call < len(found) else None

    def event(self, module: nn.Module, at: AttentionLayer) -> _Event | None:
        """A module's event in a layer: models may share one module among layers."""
        index = self.index_of(module, at.call)
        return None if index is None else self.events[index]

    def norms_around(self, at: AttentionLayer) -> tuple[Gain | None, Gain | None, bool]:
        """The norm before the projections, the gain after the output projection, and whether norms follow the sums.

        A norm whose output goes on as the residual stream itself (BERT) is not one to fold.
        """
        out = self.index_of(at.output_projection, at.call)
        first = self.event(_linear_children(at.module)[0], at)
        if out is None or first is None:
            return None, None, False
        wrote = self.events[out].gave
        before = next((e for e in self.events[:out][::-1] if e.is_gain and _same(e.gave, first.given)), None)
        after = next((e for e in self.events[out:] if e.is_gain and _same(e.given, wrote)), None)
        after_gain = None if after is None else gain_of(after.module, after.given, after.gave)
        following = next((e for e in self.events[out:] if e.is_gain and e.given.shape == wrote.shape), None)
        if before is None:
            return None, after_gain, False
        if following is not None and before.gave.shape == wrote.shape and _near(following.given - wrote, before.gave):
            return None, after_gain, True
        gain = gain_of(before.module, before.given, before.gave)
        if gain is None:
            raise UnreadableModelError(
                f"The norm before attention in layer {at.index} of '{self.name}' ({type(before.module).__name__}) is "
                "neither a LayerNorm nor an RMSNorm: read the weights without it, read_weights(model, fold=False)."
            )
        return gain, after_gain, False

    def norm_before(self, at: AttentionLayer) -> nn.Module | None:
        """The module whose output the projections of a layer are given, where that is a norm."""
        out, first = self.index_of(at.output_projection, at.call), self.event(_linear_children(at.module)[0], at)
        if out is None or first is None:
            return None
        return next((e.module for e in self.events[:out][::-1] if e.is_gain and _same(e.gave, first.given)), None)

    def final_gain(self, hidden: int) -> Gain | None:
        """The last norm of the run."""
        last = next((e for e in self.events[::-1] if e.is_gain and e.given.shape[-1] == hidden), None)
        return None if last is None else gain_of(last.module, last.given, last.gave)

    def _query_key_norms(self, at: AttentionLayer) -> dict[str, _Event]:
        """Norms inside the attention module, by role: query-key norm."""
        out = self.index_of(at.output_projection, at.call)
        inside = {id(m): name for name, m in at.module.named_children() if _is_gain(m)}
        found: dict[str, _Event] = {}
        for event in self.events[:out]:
            name = inside.get(id(event.module), "")
            if name[:1] in ("q", "k"):
                found[name[0]] = event
        return found

    def query_key_gains(self, at: AttentionLayer) -> dict[str, torch.Tensor]:
        """Gains of the query-key norm ``[key_dim]`` or ``[heads * key_dim]`` by role; empty where there is none."""
        gains = {}
        for role, event in self._query_key_norms(at).items():
            gain = gain_of(event.module, event.given, event.gave)
            if gain is not None:
                gains[role] = gain.gain
        return gains

    def position_or_norm(self, at: AttentionLayer, parts: Parts) -> list[str]:
        """What the attention call does to queries and keys beyond projecting them, in words."""
        norms = self._query_key_norms(at)
        if at.index not in self.calls:
            return ["what happens to queries and keys after their projection could not be seen in this model"]
        said = []
        if norms:
            said.append(
                "query-key norm divides each query and key by its own size, so scores of query-key weights hold up "
                "to one factor a token and head"
            )
        moved = odd = False
        for role, seen in zip("qk", self.calls[at.index][:2], strict=True):
            weight, bias = parts[role]
            expected = _projected(self, at, weight, bias)
            if role in norms:
                expected = _as_seen(norms[role].gave, expected, seen)
            ratio = _ratio(seen[:, :, :1], expected[:, :, :1])
            odd |= not _near(expected[:, :, :1] * ratio, seen[:, :, :1])
            moved |= not _near(expected * ratio, seen)
        if odd:
            said.append("queries or keys differ from their projections in a way that was not recognised")
        elif moved:
            said.append("queries and keys are rotated by position, so query-key weights hold for tokens side by side")
        return said


def _as_seen(normed: torch.Tensor, projected: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A query-key norm's output ``[batch, heads, tokens, dim]``: models put heads before or after tokens."""
    batch, heads, tokens, dim = projected.shape
    by_token = normed.reshape(batch, tokens, heads, dim).transpose(1, 2)
    by_head = normed.reshape(batch, heads, tokens, dim)
    return by_token if _near(by_token[:, :, :1], seen[:, :, :1]) else by_head


def _projected(probe: Probe, at: AttentionLayer, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, dim]`` of one role, from what really entered the projections."""
    event = probe.event(_linear_children(at.module)[0], at)
    assert event is not None
    return torch.einsum("bti,hid->bhtd", event.given, weight) + bias[:, None]


def _linear_children(module: nn.Module) -> list[nn.Module]:
    """The projections of an attention module that queries, keys and values come from, query first."""
    named = {name: child for name, child in module.named_children() if is_linear(child)}
    separate = {found.group(1): child for name, child in named.items() if (found := _ROLE.match(name))}
    if len(separate) == 3:
        return [separate[role] for role in "qkv"]
    fused = [child for name, child in named.items() if _FUSED.match(name)]
    return fused[:1]


def projections_of(model: HeadedModel, at: AttentionLayer, probe: Probe) -> Parts:
    """Weight ``[heads, hidden, dim]`` and bias ``[heads, dim]`` of each role, checked against the values really seen.

    Raises:
        UnreadableModelError: no such projections, or none of the known ways to cut them gives those values.
    """
    linears = _linear_children(at.module) if at.module is not None else []
    if not linears or probe.event(linears[0], at) is None:
        names = ", ".join(name for name, child in at.module.named_children() if is_linear(child))
        raise UnreadableModelError(
            f"Layer {at.index} of '{model.name}' ({type(at.module).__name__}) has no query, key and value projections "
            f"that could be told apart; its linear layers are {names or 'none'}. Expected three, or one fused."
        )
    for parts in _cuts(linears, at):
        value = _projected(probe, at, *parts["v"])
        if at.index in probe.calls:
            seen = probe.calls[at.index][2]
        else:
            groups = at.heads // value.shape[1]
            value, seen = value.repeat_interleave(groups, 1), probe.heads[at.index].transpose(1, 2)
        if value.shape == seen.shape and _near(value, seen):
            return parts
    raise UnreadableModelError(
        f"No known way to cut the query, key and value projections of layer {at.index} of '{model.name}' "
        f"({type(at.module).__name__}) gives the values that its heads were seen to work with."
    )


def _cuts(linears: list[nn.Module], at: AttentionLayer) -> list[Parts]:
    """Ways the projections' features may belong to heads."""
    oriented = [_oriented(linear) for linear in linears]
    if len(oriented) == 3:
        counts = (at.heads, at.kv_heads, at.kv_heads)
        if any(len(w) % n for (w, _), n in zip(oriented, counts, strict=True)):
            return []
        cut = [_by_head(w, b, n) for (w, b), n in zip(oriented, counts, strict=True)]
        return [dict(zip("qkv", cut, strict=True))]
    weight, bias = oriented[0]
    shared = len(weight) // at.head_dim - at.heads  # key and value heads together
    if len(weight) % at.head_dim or shared < 2 or shared % 2:
        return []
    key_values, dim = shared // 2, at.head_dim
    widths = [at.heads * dim, key_values * dim, key_values * dim]
    in_row = [
        _by_head(w, b, n)
        for w, b, n in zip(weight.split(widths), bias.split(widths), (at.heads, key_values, key_values), strict=True)
    ]
    found = [dict(zip("qkv", in_row, strict=True))]
    if at.heads % key_values == 0:  # each key head's queries, then its key, then its value
        w = weight.reshape(key_values, -1, dim, weight.shape[-1])
        b = bias.reshape(key_values, -1, dim)
        roles = {"q": slice(None, -2), "k": slice(-2, -1), "v": slice(-1, None)}
        found.append({r: (w[:, s].flatten(0, 1).transpose(1, 2), b[:, s].flatten(0, 1)) for r, s in roles.items()})
    return found


def _oriented(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[out, in]`` and bias ``[out]``."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    weight = weight.detach().T if hasattr(linear, "nf") else weight.detach()
    bias = getattr(linear, "bias", None)
    return weight, weight.new_zeros(len(weight)) if not isinstance(bias, torch.Tensor) else bias.detach()


def _by_head(weight: torch.Tensor, bias: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.unflatten(0, (heads, -1)).transpose(1, 2), bias.unflatten(0, (heads, -1))


def _is_gain(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.dim() == 1 for p in own) and not list(module.children())


def gain_of(module: nn.Module, given: torch.Tensor, gave: torch.Tensor) -> Gain | None:
    """The formula of a norm that reproduces what it gave, or None: LayerNorm, RMSNorm (gain w or 1 + w), or a scale."""
    own = dict(module.named_parameters(recurse=False))
    bias = own.pop("bias", None)
    if len(own) != 1 or given.shape != gave.shape:
        return None
    weight = next(iter(own.values())).detach().double()
    if weight.shape[0] != given.shape[-1]:
        return None
    offset = torch.zeros_like(weight) if bias is None else bias.detach().double()
    x = given.double()
    eps = next((float(v) for n in ("eps", "variance_epsilon") if (v := getattr(module, n, None)) is not None), 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    shapes = {
        "layer": centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt(),
        "rms": x * (x.square().mean(-1, keepdim=True) + eps).rsqrt(),
        "scale": x,
    }
    for kind, shaped in shapes.items():
        for gain in (weight, 1 + weight):
            if _near(shaped * gain + offset, gave):
                return Gain(kind, gain, offset)
    return None


def _near(found: torch.Tensor, seen: torch.Tensor) -> bool:
    if found.shape != seen.shape:
        return False
    tolerance = 0.03 if seen.dtype in (torch.bfloat16, torch.float16) else 1e-4
    size = seen.double().abs().max()
    return bool((found.double() - seen.double()).abs().max() <= tolerance * size + 1e-8)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are one, perhaps seen in another shape; every tensor of a run is kept, so memory tells."""
    return first.numel() == second.numel() and first.data_ptr() == second.data_ptr()


def _ratio(seen: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The one factor between two tensors, such as a query that was scaled when it was projected."""
    return (seen.double() * expected.double()).sum() / expected.double().square().sum().clamp(min=1e-30)
