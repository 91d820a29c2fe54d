"""Head pursuit: somp against its definition and scikit-learn, heads against the logit lens and a planted head."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import _CONFIGS, tiny

from polyhead.errors import InputError
from polyhead.heads.head_pursuit import HeadPursuit, concept_tokens, heads_like, somp
from polyhead.heads.logit_lens import LogitLens
from polyhead.model import HeadedModel, load


class Numbers:
    """A tokenizer whose words are token ids; it pads on the side it is told."""

    def __init__(self, side: str = "left") -> None:
        self.side = side

    def __call__(self, texts, return_tensors=None, padding=False, truncation=False, max_length=None, **_):
        if isinstance(texts, str):
            return {"input_ids": [int(word) for word in texts.split() if word.isdigit()] or [1, 2]}
        rows = [[int(word) for word in text.split()][:max_length] for text in texts]
        width = max(len(row) for row in rows)
        gaps = [[0] * (width - len(row)) for row in rows]
        left = self.side == "left"
        ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
        mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for row, gap in zip(rows, gaps, strict=True)]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def decode(self, ids):
        return str(ids[0])


def decoder(family: str, side: str = "left", dtype: torch.dtype = torch.float64) -> HeadedModel:
    torch.manual_seed(0)
    name, given = _CONFIGS[family]
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**given)).eval()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    model = load(module.to(dtype))
    model.__dict__["tokenizer"] = Numbers(side)
    return model


TEXTS = ["4 8 15 16 23 42", "7 7 9", "90 12 33 51", "5"]


def by_definition(samples: torch.Tensor, dictionary: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """Every step from the beginning: inner products with the residual of a least-squares fit."""
    atoms: list[int] = []
    shares, residual = [], samples
    for _ in range(k):
        sums = [float(sum(abs(torch.dot(row, atom)) for row in residual)) for atom in dictionary]
        atoms.append(max((j for j in range(len(sums)) if j not in atoms), key=lambda j: sums[j]))
        picked = dictionary[atoms]
        residual = samples - samples @ torch.linalg.pinv(picked) @ picked
        shares.append(1 - float(residual.square().sum() / samples.square().sum()))
    return atoms, shares


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pursuit_is_its_definition():
    samples, dictionary = random(7, 12), random(40, 12, seed=1)
    found = somp(samples, dictionary, 6)
    atoms, shares = by_definition(samples, dictionary, 6)
    assert found.atoms.tolist() == atoms
    assert torch.allclose(found.explained, torch.tensor(shares, dtype=torch.float64), atol=1e-10)
    fit = found.coefficients @ dictionary[found.atoms]
    left = 1 - float((samples - fit).square().sum() / samples.square().sum())
    assert left == pytest.approx(shares[-1], abs=1e-10)
    assert somp(samples.float(), dictionary.float(), 6).atoms.tolist() == atoms


def test_one_sample_is_orthogonal_matching_pursuit():
    linear_model = pytest.importorskip("sklearn.linear_model")
    for seed in range(5):
        sample, dictionary = random(1, 20, seed=seed), random(60, 20, seed=seed + 9)
        dictionary = dictionary / dictionary.norm(dim=1, keepdim=True)  # scikit-learn expects unit norms
        expected = linear_model.orthogonal_mp(dictionary.T.numpy(), sample[0].numpy(), n_nonzero_coefs=5)
        found = somp(sample, dictionary, 5)
        assert sorted(found.atoms.tolist()) == sorted(expected.nonzero()[0].tolist())
        assert torch.allclose(found.coefficients[0], torch.tensor(expected)[found.atoms], atol=1e-8)


def test_planted_atoms_are_found_and_nothing_more():
    dictionary = random(50, 30)
    planted = torch.tensor([3, 17, 41])
    samples = random(20, 3, seed=2) @ dictionary[planted]
    found = somp(samples, dictionary, 10)
    assert set(found.atoms.tolist()) == set(planted.tolist())
    assert len(found.atoms) == 3
    assert float(found.explained[-1]) == pytest.approx(1, abs=1e-9)


def test_atoms_that_others_span_are_passed_by_and_nothing_is_explained_of_nothing():
    row = random(1, 6)
    dictionary = torch.cat([row, 2 * row, -row])
    found = somp(random(4, 6, seed=3), dictionary, 3)
    assert found.atoms.tolist() == [1]
    assert found.coefficients.shape == (4, 1)
    assert len(somp(torch.zeros(3, 6), dictionary, 2).atoms) == 0
    with pytest.raises(InputError, match="expected"):
        somp(torch.zeros(3, 5), dictionary, 2)


@pytest.mark.parametrize(
    ("family", "side"),
    [("gpt2", "right"), ("llama", "left"), ("llama", "right"), ("gemma3", "left")],
)  # GPT-2 counts its positions over padding on the left
def test_what_heads_write_is_their_logit_lens_text_by_text(family, side):
    model = decoder(family, side)
    lens = LogitLens(model)
    found = HeadPursuit(batch_size=3).writes(model, TEXTS)
    mean = HeadPursuit(batch_size=3, positions="mean").writes(model, TEXTS)
    for row, text in enumerate(TEXTS):
        inputs = {"input_ids": torch.tensor([[int(word) for word in text.split()]])}  # alone, without padding
        each = [lens.parts(inputs, position=place).heads for place in range(inputs["input_ids"].shape[1])]
        for layer in range(model.layers):
            assert torch.allclose(found[layer][row] @ lens.unembedding.T, each[-1][layer], atol=2e-5)
            assert torch.allclose(mean[layer][row] @ lens.unembedding.T, sum(each)[layer] / len(each), atol=2e-5)


def test_one_step_on_one_text_is_the_logit_lens():
    model = decoder("llama")
    inputs = {"input_ids": torch.tensor([[4, 8, 15]])}
    lens = LogitLens(model).parts(inputs).heads
    read = HeadPursuit().read(model, [(0, 1), (1, 3)], ["4 8 15"], k=1)
    for (layer, head), ((word, share),) in read.items():
        assert int(word) == int(lens[layer, head].abs().argmax())
        assert 0 < share < 1


def planted(dtype: torch.dtype = torch.float64) -> HeadedModel:
    """Head (1, 1) writes token 42 alone, head (1, 2) nothing."""
    model = decoder("llama", dtype=dtype)
    module = model.module
    module.model.norm.weight.data.fill_(1)
    write = module.model.layers[1].self_attn.o_proj.weight.data
    write[:, 8:16] = module.lm_head.weight.data[42][:, None] * torch.randn(8).to(dtype)
    write[:, 16:24] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_head_is_all_concept_and_a_silent_one_none(dtype):
    model = planted(dtype)
    found = HeadPursuit(["42", "7"]).score(model, TEXTS)
    assert found.top(1) == [(1, 1)]
    assert found.values[1, 1] == pytest.approx(1, abs=1e-2)
    assert found.values[1, 2] == 0
    without = HeadPursuit(["7", "8"]).score(model, TEXTS)
    assert without.values[1, 1] < 0.5
    assert HeadPursuit().read(model, [(1, 1)], TEXTS, k=1)[1, 1][0][0] == "42"


def test_score_is_the_share_by_definition():
    model = decoder("gemma3")
    tokens = [42, 7, 13]
    found = HeadPursuit([str(token) for token in tokens], atoms=2).score(model, TEXTS).values
    dictionary = LogitLens(model).unembedding[tokens]
    for layer, written in enumerate(HeadPursuit().writes(model, TEXTS)):
        for head in range(model.heads):
            assert found[layer, head] == pytest.approx(by_definition(written[:, head], dictionary, 2)[1][-1], abs=1e-8)


def test_controls_are_of_the_same_layers():
    model = decoder("llama")
    chosen = [(0, 1), (1, 2), (1, 3)]
    for seed in range(5):
        control = heads_like(chosen, model, seed)
        assert [layer for layer, _ in control] == [0, 1, 1]
        assert not set(control) & set(chosen)
        assert len(set(control)) == 3
    assert set(heads_like([(0, 0), (0, 1), (0, 2), (1, 0)], model)) == {(0, 3), (1, 1), (1, 2), (1, 3)}
    with pytest.raises(InputError, match="only 1 others"):
        heads_like([(0, 0), (0, 1), (0, 2)], model)


def test_refusals():
    model = decoder("llama")
    with pytest.raises(InputError, match="No concept 'smells'"):
        HeadPursuit("smells").score(model, TEXTS)
    with pytest.raises(InputError, match="one token"):
        concept_tokens(model, ["unknown"])
    with pytest.raises(InputError, match="list of texts"):
        HeadPursuit(["42"]).score(model, "4 8")
    with pytest.raises(InputError, match="positions"):
        HeadPursuit(["42"], positions="first").score(model, TEXTS)
    with pytest.raises(InputError, match="lm_head=True"):
        HeadPursuit(["42"]).score(load(tiny("bert")), TEXTS)
