"""A signal removed changes what one attention is given at one token, and nothing when the block is left."""

from __future__ import annotations

import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.act.signal import RemoveSignal
from polyhead.errors import InputError
from polyhead.model import load


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_projections_are_given_less_at_that_token_only(family):
    model, inputs = load(tiny(family)), inputs_for(family)
    signal = torch.linspace(-1, 1, 32)
    seen = []
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        with RemoveSignal(signal, layer=1, position=2, row=1).on(model):
            hook = model.attention_layers[1].module.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            changed = model(**inputs).last_hidden_state
            hook.remove()
        hook = model.attention_layers[1].module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        after = model(**inputs).last_hidden_state
        hook.remove()
    expected = torch.zeros(2, 7, 32)
    expected[1, 2] = signal
    torch.testing.assert_close(seen[1] - seen[0], expected)
    assert torch.equal(before, after)
    torch.testing.assert_close(changed[0], before[0])
    assert (changed[1] - before[1]).abs().max() > 1e-6


def test_signals_add_up_when_nested_and_go_after_an_exception():
    model, inputs = load(tiny("gpt2")), inputs_for("gpt2")
    first, second = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with RemoveSignal(first, 0, 1).on(model), RemoveSignal(second, 0, 1).on(model):
            nested = model(**inputs).last_hidden_state
        with RemoveSignal(first + second, 0, 1).on(model):
            at_once = model(**inputs).last_hidden_state
        with pytest.raises(ZeroDivisionError), RemoveSignal(first, 0, 1).on(model):
            _ = 1 / 0
        assert torch.equal(model(**inputs).last_hidden_state, plain)
    torch.testing.assert_close(nested, at_once)
    assert (nested - plain).abs().max() > 1e-6


def test_what_does_not_fit_is_refused():
    model = load(tiny("gpt2"))
    with pytest.raises(InputError, match="hidden"):
        RemoveSignal(torch.zeros(2, 32), 0, 1)
    for action in (RemoveSignal(torch.zeros(32), 2, 0), RemoveSignal(torch.zeros(31), 0, 0)):
        with pytest.raises(InputError, match="width 32"), action.on(model):
            pass
    with pytest.raises(InputError, match="share one"), RemoveSignal(torch.zeros(32), 0, 0).on(load(tiny("albert"))):
        pass
