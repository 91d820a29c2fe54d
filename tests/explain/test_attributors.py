"""Token attributions: against their definitions, and where one token is known to decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny

import polyhead
from polyhead.errors import InputError
from polyhead.explain.base import Attributor, ClassReadout, NextTokenReadout, Readout
from polyhead.explain.baselines import AttentionRow, GradientNorm, GradientXInput, LeaveOneOut, RandomScores
from polyhead.explain.reagent import ReAGent
from polyhead.explain.replacers import CausalReplacer, MaskedReplacer, UnigramReplacer
from polyhead.headmap import HeadMap

IDS = torch.tensor([5, 17, 42, 8, 61, 30])
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
CAUSAL = {
    "gpt2": ("GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaConfig", GROUPED),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
}


def _causal(family: str, dtype: torch.dtype = torch.float32) -> NextTokenReadout:
    torch.manual_seed(0)
    name, given = CAUSAL[family]
    config = getattr(transformers, name)(**given, initializer_range=0.3)
    module = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    return NextTokenReadout(polyhead.load(module), batch_size=4)


class _Known(Readout):
    """0.9 for class 0 while the token at ``decisive`` is as it was, else 0.1; other tokens matter a little."""

    def __init__(self, ids: torch.Tensor, decisive: int) -> None:
        super().__init__(polyhead.load(tiny("llama")))
        self.ids, self.decisive = ids, decisive

    def logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        ids = inputs["input_ids"]
        same = (ids == self.ids).double()
        first = 0.1 + 0.75 * same[:, self.decisive] + 0.05 * same.mean(1)
        return torch.stack([first, *[(1 - first) / 5] * 5], -1).log().float()

    def reads(self, tokens: int) -> torch.Tensor:
        return torch.full((tokens,), 1 / tokens)

    def name_of(self, target: int) -> str:
        return str(target)


def _uniform() -> UnigramReplacer:
    return UnigramReplacer(torch.ones(99))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_gives_a_score_for_judged_tokens(family: str, dtype: torch.dtype) -> None:
    readout = _causal(family, dtype)
    judged = np.array([False, True, True, True, True, True])
    methods: list[Attributor] = [GradientNorm(), GradientXInput(), LeaveOneOut(), AttentionRow(), RandomScores()]
    methods += [ReAGent(replace, max_steps=3) for replace in (_uniform(), CausalReplacer(readout.model))]
    for method in methods:
        scores = method.attribute(readout, IDS, 7, judged)
        assert (scores.shape, scores.dtype) == ((6,), np.float64), method.name
        assert np.isnan(scores).tolist() == (~judged).tolist(), method.name
        assert np.isfinite(method.attribute(readout, IDS, 7)).all(), method.name


@pytest.mark.parametrize("family", CAUSAL)
def test_gradients_are_finite_differences(family: str) -> None:
    readout = _causal(family)
    readout.model.module.double()
    states = readout.embed(IDS).detach()
    steps = 1e-3 * torch.eye(states.numel(), dtype=states.dtype).view(-1, *states.shape)
    with torch.no_grad():
        logits = readout.model(inputs_embeds=torch.cat([states + steps, states - steps])).logits[:, -1]
    up, down = torch.log_softmax(logits, -1)[:, 7].chunk(2)
    slope = ((up - down) / 2e-3).view_as(states)
    # Norms round to float32 inside whatever the weights are, and a step is finite.
    close = {"rel": 1e-2, "abs": 5e-3}
    assert GradientNorm().attribute(readout, IDS, 7) == pytest.approx(slope.norm(dim=-1).numpy(), **close)
    product = (slope * states).sum(-1).numpy()
    assert GradientXInput().attribute(readout, IDS, 7) == pytest.approx(product, **close)


def test_leave_one_out_is_what_it_says() -> None:
    readout = _causal("llama")
    whole = torch.softmax(readout.model(input_ids=IDS[None]).logits[0, -1].double(), -1)[7].item()
    for replacement in (None, 3):
        scores = LeaveOneOut(replacement).attribute(readout, IDS, 7)
        for token in range(len(IDS)):
            rest = [3] if replacement else []
            text = torch.tensor([[*IDS[:token], *rest, *IDS[token + 1 :]]])
            left = torch.softmax(readout.model(input_ids=text).logits[0, -1].double(), -1)[7].item()
            assert scores[token] == pytest.approx(whole - left, abs=1e-6)
    with pytest.raises(InputError, match="replacement"):
        LeaveOneOut().attribute(readout, IDS[:1], 7)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_rows_by_heads(family: str) -> None:
    readout = _causal(family)
    name, given = CAUSAL[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**given, initializer_range=0.3)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        rows = torch.stack(plain(input_ids=IDS[None], output_attentions=True).attentions)[:, 0, :, -1].numpy()
    assert AttentionRow().attribute(readout, IDS, 7) == pytest.approx(rows[-1].mean(0), abs=1e-5)
    weights = np.array([[1.0, -2.0, 0.0, np.nan], [0.0, 0.0, 0.5, 0.5]])
    found = AttentionRow(HeadMap(weights)).attribute(readout, IDS, 7)
    expected = (rows[0, 0] - 2 * rows[0, 1] + 0.5 * rows[1, 2] + 0.5 * rows[1, 3]) / 4
    assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="3, 4"):
        AttentionRow(HeadMap(np.ones((3, 4)))).attribute(readout, IDS, 7)


def test_a_class_is_read_from_all_tokens() -> None:
    model = polyhead.load(tiny("bert"))
    weight, bias = torch.randn(3, 32), torch.randn(3)
    readout = ClassReadout(model, weight, bias, ["a", "b", "c"])
    with torch.no_grad():
        output = model.module(input_ids=IDS[None])
    expected = torch.softmax(output.last_hidden_state[0].mean(0) @ weight.T + bias, -1)
    assert readout.probabilities(IDS[None])[0].numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert readout.from_states(readout.embed(IDS[None])).numpy() == pytest.approx(expected[None].numpy(), abs=1e-6)
    assert readout.name_of(1) == "b"
    with model.record("attention") as recording, torch.no_grad():
        model(input_ids=IDS[None])
    mean = recording.attention[0, -1].mean((0, 1)).numpy()
    assert AttentionRow().attribute(readout, IDS, 1) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("log_odds", [False, True])
@pytest.mark.parametrize("decisive", [0, 3, 5])
def test_reagent_finds_the_token_that_decides(decisive: int, log_odds: bool) -> None:
    # A run may end after one lucky step, so a single one says little: that is what averaging is for.
    found = ReAGent(_uniform(), max_steps=40, top_k=1, runs=30, log_odds=log_odds, seed=1)
    scores = found.attribute(_Known(IDS, decisive), IDS, 0)
    assert scores.sum() == pytest.approx(1)
    assert scores.argmax() == decisive
    assert scores[decisive] > 1.5 * np.delete(scores, decisive).max()
    assert LeaveOneOut(replacement=98).attribute(_Known(IDS, decisive), IDS, 0).argmax() == decisive


class _Told:
    """Replaces by 98 and remembers what it was asked."""

    def __init__(self) -> None:
        self.masks: list[np.ndarray] = []

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.masks.append(mask.numpy())
        return torch.where(mask, 98, ids)


@pytest.mark.parametrize("log_odds", [False, True])
def test_reagent_is_its_definition_step_by_step(log_odds: bool) -> None:
    told, steps, runs = _Told(), 4, 3
    readout = _causal("llama")
    judged = np.array([False, True, True, True, True, True])
    # Nothing ends a run: the least likely token never is among the first.
    target = int(readout.probabilities(IDS[None])[0].argmin())
    method = ReAGent(told, ratio=0.4, max_steps=steps, runs=runs, top_k=1, seed=4, log_odds=log_odds)
    scores = method.attribute(readout, IDS, target, judged)
    assert len(told.masks) == 2 * steps

    def probability(ids: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return torch.softmax(readout.model(input_ids=ids).logits[:, -1].double(), -1)[:, target].numpy()

    start = torch.rand(runs, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    whole, logits = probability(IDS[None])[0], np.concatenate([np.full((runs, 1), -np.inf), start], 1)
    for changed, kept in zip(told.masks[::2], told.masks[1::2], strict=True):
        assert (changed[:, 1:].sum(1) == 2).all()
        assert not changed[:, 0].any()
        d = (whole - probability(torch.where(torch.tensor(changed), 98, IDS)))[:, None]
        d = np.log((1 + d) / (1 - d)) if log_odds else d
        logits += np.where(changed, d, -d)
        for run in range(runs):  # the check replaces the least important 70%: 4 of 5, rounded
            assert set(np.flatnonzero(kept[run])) == set(1 + np.argsort(logits[run, 1:])[:4])
    expected = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).mean(0)
    assert scores[1:] == pytest.approx(expected[1:], abs=1e-6)
    assert np.isnan(scores[0])


def test_reagent_stops_when_few_tokens_are_enough() -> None:
    told = _Told()
    readout = _causal("llama")
    ReAGent(told, max_steps=50, top_k=99).attribute(readout, IDS, 7)  # always among the likeliest 99 of 99
    assert len(told.masks) == 2


def test_reagent_is_the_same_for_a_seed() -> None:
    readout = _causal("gpt2")
    first, again, other = (ReAGent(_uniform(), max_steps=3, seed=seed).attribute(readout, IDS, 7) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_replacers_replace_what_is_masked() -> None:
    readout = _causal("llama")
    torch.manual_seed(0)
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).eval()
    table = torch.full((99,), -1)
    table[40:60] = torch.arange(10, 30)  # only these have a counterpart
    replacers = [_uniform(), CausalReplacer(readout.model), MaskedReplacer(masked, 4), MaskedReplacer(masked, 4, table)]
    mask = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for replacer in replacers:
        changed = replacer(IDS, mask, torch.Generator().manual_seed(1))
        assert (changed == IDS)[~mask].all()
        assert (changed != IDS)[mask].float().mean() > 0.8
        assert changed.max() < 99
        assert changed.min() >= 0
    assert set(changed[mask].tolist()) <= set(range(40, 60))


def test_a_masked_model_sees_the_tokens_around_in_its_own_vocabulary() -> None:
    asked: list[torch.Tensor] = []

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> Any:
            asked.append(input_ids)
            logits = torch.zeros(*input_ids.shape, 30)
            logits[..., 12] = 50  # it is sure of its token 12, which is 2 of the explained model
            return type("Output", (), {"logits": logits})

    replacer = MaskedReplacer(Module(), 0, torch.tensor([-1, 11, 12, 13]))
    changed = replacer(torch.tensor([0, 1, 3]), torch.tensor([[False, False, True]]), torch.Generator())
    assert asked[0].tolist() == [[0, 11, 0]]  # one without a counterpart is masked too, but stays as it was
    assert changed.tolist() == [[0, 1, 2]]


def test_the_causal_replacer_draws_from_the_left_context() -> None:
    readout = _causal("llama")
    mask = torch.zeros(4000, 6, dtype=torch.bool)
    mask[:, 3] = True
    drawn = CausalReplacer(readout.model)(IDS, mask, torch.Generator().manual_seed(0))[:, 3]
    expected = readout.probabilities(IDS[None, :3])[0]
    found = torch.bincount(drawn, minlength=99) / 4000
    assert (found - expected).abs().max() < 0.03
    assert expected.max() > 0.06  # far from even, so the test can fail


def test_unigram_counts_decide() -> None:
    counts = torch.zeros(99)
    counts[[4, 9]] = torch.tensor([3.0, 1.0])
    drawn = UnigramReplacer(counts)(IDS, torch.ones(1000, 6, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {4, 9}
    assert float((drawn == 4).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_refusals() -> None:
    with pytest.raises(InputError, match="both directions"):
        NextTokenReadout(polyhead.load(tiny("bert")))
    with pytest.raises(InputError, match="lm_head=True"):
        NextTokenReadout(polyhead.load(tiny("llama"))).probabilities(IDS[None])
    with pytest.raises(InputError, match="lm_head=True"):
        CausalReplacer(polyhead.load(tiny("llama")))(IDS, torch.ones(1, 6, dtype=torch.bool), torch.Generator())
    with pytest.raises(InputError, match="classifier of 2"):
        ClassReadout(polyhead.load(tiny("bert")), torch.ones(3, 32), torch.ones(3), ["a", "b"])
    with pytest.raises(InputError, match="shares"):
        ReAGent(_uniform(), ratio=1.0)
    with pytest.raises(InputError, match="at least 1"):
        ReAGent(_uniform(), runs=0)
    with pytest.raises(InputError, match="at least 2"):
        ReAGent(_uniform()).attribute(_causal("llama"), IDS, 7, np.arange(6) == 2)
    with pytest.raises(InputError, match="counts"):
        UnigramReplacer(torch.zeros(5))
    with pytest.raises(InputError, match="temperature"):
        CausalReplacer(polyhead.load(tiny("llama")), temperature=0)
    with pytest.raises(InputError, match="at least one token"):
        _causal("llama").probabilities(IDS[None, :0])
