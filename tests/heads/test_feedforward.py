"""Feed-forward layers by role: keys, gate and values give what the model's own memories hold, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, inputs_for, tiny, tower_of
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.heads._feedforward import ACTIVATIONS, find_feedforward, tap_memories
from polyhead.model import HeadedModel, load


def _model(family: str) -> HeadedModel:
    module = tiny(family)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():  # norms and biases that are not the identity
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return load(module, tower=tower_of(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_give_the_coefficients_and_the_output(family):
    """m = f(x K^T + b) [* (x U^T + c)] is what enters the value matrix, and m V + bias is what leaves it."""
    model = _model(family)
    layers = find_feedforward(model)
    assert [layer.layer for layer in layers] == list(range(model.layers))
    for layer in layers:
        seen: dict[str, list[torch.Tensor]] = {"x": [], "y": []}
        linear, values = layer._key.linear, layer.projection
        handles = [
            linear.register_forward_pre_hook(lambda _, args, seen=seen: seen["x"].append(args[0])),
            values.register_forward_hook(lambda _, args, out, seen=seen: seen["y"].append(out.clone())),
        ]
        got: list[torch.Tensor] = []
        with torch.no_grad(), tap_memories(model, [layer], lambda _, m, got=got: got.append(m)):
            model(**inputs_for(family))
        for handle in handles:
            handle.remove()
        x, y = seen["x"][layer.call].double(), seen["y"][layer.call].double()
        double = {"fold": False, "dtype": torch.float64}
        b, c = layer.biases(**double)
        expected = ACTIVATIONS[layer.activation](x @ layer.keys(**double).T + b)
        if layer.gated:
            expected = expected * (x @ layer.ups(**double).T + c)
        assert len(got) == 1
        assert torch.allclose(got[0].double(), expected, atol=1e-5)
        bias = layer.projection.bias
        wrote = got[0].double() @ layer.values(**double) + (0 if bias is None else bias.double())
        assert torch.allclose(wrote, y, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "llama", "gemma3", "phi3", "modernbert", "dinov2"])
def test_folded_keys_read_the_stream_before_the_norm(family):
    """Folded keys on a state over its size are bare keys on the normed state; folded values carry the norm after."""
    model = _model(family)
    layer = find_feedforward(model)[1]
    captured = {}

    def keep(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        if isinstance(out, torch.Tensor) and args:
            captured[out.data_ptr()] = (module, args[0], out)

    entered: list[torch.Tensor] = []
    handles = [m.register_forward_hook(keep) for m in model.module.modules() if "Norm" in type(m).__name__]
    handles.append(layer._key.linear.register_forward_pre_hook(lambda _, args: entered.append(args[0])))
    with torch.no_grad():
        model(**inputs_for(family))
    for handle in handles:
        handle.remove()
    module, before, normed = captured[entered[0].data_ptr()]
    x = before.double()
    centred = x - x.mean(-1, keepdim=True) if "LayerNorm" in type(module).__name__ else x
    eps = getattr(module, "eps", None) or module.variance_epsilon
    size = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    bare, folded = layer.keys(fold=False, dtype=torch.float64), layer.keys(dtype=torch.float64)
    b, folded_b = layer.biases(fold=False, dtype=torch.float64)[0], layer.biases(dtype=torch.float64)[0]
    assert torch.allclose(normed.double() @ bare.T + b, (x / size) @ folded.T + folded_b, rtol=1e-3, atol=1e-3)
    if family == "gemma3":
        gain = 1 + model.module.layers[1].post_feedforward_layernorm.weight.double()
        values = layer.values(fold=False, dtype=torch.float64)
        assert torch.allclose(layer.values(dtype=torch.float64), values * gain)


def test_norms_after_the_sums_are_not_folded():
    layer = find_feedforward(_model("bert"))[0]
    assert torch.equal(layer.keys(), layer.keys(fold=False))
    assert torch.equal(layer.values(), layer.values(fold=False))


def test_what_is_no_feed_forward_layer_is_refused():
    class Other(nn.Module):
        """Two projections whose sum, not product, goes on."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 37), nn.Linear(32, 37), nn.Linear(37, 32)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    module = tiny("llama")
    for block in module.layers:
        block.mlp = Other()
    with pytest.raises(UnreadableModelError, match="feed-forward"):
        find_feedforward(load(module))
