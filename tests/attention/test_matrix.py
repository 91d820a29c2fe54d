"""What every attention mechanism must do, whatever it is."""

from __future__ import annotations

import copy

import pytest
import torch

from polyhead.attention import Attention, State, mechanisms
from polyhead.errors import InputError
from tests.attention.cases import Case, all_cases

CASES_OF = all_cases()
EVERY = [
    pytest.param(case, causal, id=f"{name}-{'causal' if causal else 'both'}")
    for name, case in CASES_OF.items()
    for causal in (True, False)
    if (case.causal if causal else case.both)
]
ONCE = [pytest.param(case, case.causal, id=name) for name, case in CASES_OF.items()]
"""A case in one direction, for what does not depend on it."""
FIRST = [
    pytest.param(case, case.causal, id=name)
    for name, case in {type(case.make(case.causal)): (name, case) for name, case in reversed(CASES_OF.items())}.values()
]
"""The first case of each mechanism: compiling takes seconds, and its variants differ in values, not in kind."""
CAUSAL = [pytest.param(case, id=name) for name, case in CASES_OF.items() if case.causal]
STEPS = [pytest.param(case, id=name) for name, case in CASES_OF.items() if case.causal and case.steps]


def built(case: Case, causal: bool, dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    return case.make(causal).to(dtype).eval()


def states(batch: int = 2, tokens: int = 11, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_every_mechanism_is_in_the_matrix() -> None:
    tested = {type(case.make(case.causal)) for case in CASES_OF.values()}
    missing = {name for name, kind in mechanisms().items() if kind not in tested}
    assert not missing


def test_names_and_summaries_are_their_own() -> None:
    kinds = list(mechanisms().values())
    assert len({kind.summary for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(("case", "causal"), EVERY)
@pytest.mark.parametrize("tokens", [1, 11, 70])
def test_shape_and_finite(case: Case, causal: bool, tokens: int) -> None:
    out = built(case, causal)(states(tokens=tokens))
    assert out.shape == (2, tokens, 32)
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.parametrize("case", CAUSAL)
def test_nothing_leaks_from_behind(case: Case) -> None:
    layer, given = built(case, True, torch.float64), states(tokens=11, dtype=torch.float64)
    changed = given.clone()
    changed[:, 6:] = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before, after = layer(given), layer(changed)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-9)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-4)


@pytest.mark.parametrize(("case", "causal"), EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case: Case, causal: bool, side: str) -> None:
    if not case.padding:
        pytest.skip("defined for whole blocks of real tokens")
    layer, short = built(case, causal, torch.float64), states(1, 6, torch.float64)
    noise = 50 * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise[:, 0] = torch.nan
    real = torch.arange(10) < 6 if side == "right" else torch.arange(10) >= 4
    padded = torch.cat([short, noise] if side == "right" else [noise, short], 1)
    out = layer(padded, real[None])
    assert torch.allclose(out[:, real], layer(short), atol=1e-9)
    assert (out[:, ~real] == 0).all()


@pytest.mark.parametrize(("case", "causal"), EVERY)
def test_gradients_are_those_of_the_values(case: Case, causal: bool) -> None:
    if not case.gradients:
        pytest.skip("chooses hard")
    layer, given = built(case, causal, torch.float64), states(1, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (given,), fast_mode=True, atol=1e-4)
    layer(given).pow(2).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("case", STEPS)
def test_steps_are_the_whole(case: Case) -> None:
    layer, given = built(case, True, torch.float64), states(tokens=11, dtype=torch.float64)
    state: State | None = None
    parts = []
    for piece in given.split([4, 1, 1, 5], 1):
        part, state = layer.step(piece, state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), layer(given), atol=1e-6)
    assert state is not None
    assert state.seen == 11
    if case.exact_cache:
        assert state.bytes == 2 * layer.cache_bytes(11, itemsize=8)


@pytest.mark.parametrize(("case", "causal"), EVERY)
def test_bfloat16_stays_near(case: Case, causal: bool) -> None:
    exact = built(case, causal)(states())
    rough = built(case, causal, torch.bfloat16)(states(dtype=torch.bfloat16)).float()
    assert rough.isfinite().all()
    if case.gradients:
        assert (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("case", "causal"), FIRST)
def test_compiles_to_the_same(case: Case, causal: bool) -> None:
    layer = built(case, causal)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    assert torch.allclose(compiled(states()), layer(states()), atol=1e-5)


@pytest.mark.parametrize(("case", "causal"), ONCE)
def test_saved_and_loaded(case: Case, causal: bool) -> None:
    layer = built(case, causal)
    torch.manual_seed(7)
    other = case.make(causal).eval()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other(states()), layer(states()))


@pytest.mark.parametrize(("case", "causal"), EVERY)
def test_wrong_shapes_are_refused(case: Case, causal: bool) -> None:
    layer = built(case, causal)
    with pytest.raises(InputError, match="expected"):
        layer(torch.randn(2, 3, 31))
    with pytest.raises(InputError, match="True at real tokens"):
        layer(states(), torch.ones(2, 11))
    if not causal:
        with pytest.raises(InputError, match="causal=True"):
            layer.step(states())
