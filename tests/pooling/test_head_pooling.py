"""Head pooling: formula by hand, saved folders in sentence-transformers, and a fit that finds what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import polyhead
from polyhead.data import SentencePairs
from polyhead.embed import Encoder
from polyhead.errors import InputError
from polyhead.pooling import HeadPooler
from polyhead.pooling.heads_fit import PairForms, fit_weights, folds_of, mean_spearman, whitening
from polyhead.pooling.heads_pooler import BlockPooler

WORDS = "abcdefg"


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return list(dict.fromkeys(" ".join(random.choice(list(WORDS), random.integers(2, 9))) for _ in range(count)))


TEXTS = texts(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of 2 layers with states of 16 numbers, and a tokenizer of seven words."""
    where = tmp_path_factory.mktemp("headpooled")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=24, **special).save_pretrained(where)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(names), max_position_embeddings=24, pad_token_id=0, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(where)
    return str(where)


@pytest.fixture(scope="module")
def pairs(folder: str) -> SentencePairs:
    """Pairs that one head of the model would score: their gold is the cosine of its centred, whitened mean."""
    wanted = HeadPooler(folder, kind="heads", power=1.0).fit(TEXTS)
    reader = wanted.reader(TEXTS)
    blocks = Encoder(folder, pooling=reader).encode(TEXTS).dense
    head = blocks[:, 4 * 5 : 4 * 6]  # layer 1, head 1
    z = whitening(head, 1.0)(head)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    left, right = np.triu_indices(len(TEXTS), 1)
    some = np.random.default_rng(1).choice(len(left), 120, replace=False)
    gold = (z[left[some]] * z[right[some]]).sum(1).astype(np.float64)
    chosen = [(TEXTS[i], TEXTS[j]) for i, j in zip(left[some], right[some], strict=True)]
    return SentencePairs("planted", chosen, gold, [f"set {i % 2}" for i in range(120)])


def by_hand(folder: str, text: str, pooler: BlockPooler) -> np.ndarray:
    """The formula of one text in float64 from a recording of the model."""
    model = polyhead.load(folder)
    given = model.tokenize([text])
    with model.record("heads", "tokens") as seen, torch.no_grad():
        model(**given)
    weights = pooler.token_weights.double()[given["input_ids"][0]]
    if pooler.by_position:
        weights = weights * torch.arange(1, len(weights) + 1)
    weights = weights / weights.sum()
    blocks = [(seen.tokens[0, layer].double() * weights[:, None]).sum(0) for layer in pooler.layers]
    blocks += [(seen.heads[0, layer, head].double() * weights[:, None]).sum(0) for layer, head in pooler.heads]
    if pooler.layer_weights is not None:
        blocks = [sum(a * x for a, x in zip(pooler.layer_weights.double(), blocks, strict=True))]
    found = pooler.map.double() @ torch.cat(blocks) + pooler.offset.double()
    return (found / found.norm()).numpy()


@pytest.mark.parametrize(
    ("kind", "power", "by_position", "stock"),
    [("blend", None, False, True), ("blend", 0.5, False, True), ("both", (0.5, 1.0), True, False)],
)
def test_formula_and_folder(
    folder: str, tmp_path: Path, kind: str, power: float | None, by_position: bool, stock: bool, pairs: SentencePairs
) -> None:
    pooler = HeadPooler(folder, kind=kind, power=power, by_position=by_position, keep=5).fit(
        TEXTS, None if stock else pairs
    )
    some = [*TEXTS[:5], "a", "g g g g g g g g g g"]
    found = pooler.encode(some).dense
    expected = [by_hand(folder, text, pooler.pooler_) for text in some]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert pooler.save(tmp_path / "saved") is stock
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=not stock)
    np.testing.assert_allclose(plain.encode(some), found, atol=5e-5)
    again = Encoder(str(tmp_path / "saved"), backend="torch")
    np.testing.assert_allclose(again.encode(some).dense, found, atol=5e-5)


def test_pairs_find_the_head_that_made_them(folder: str, pairs: SentencePairs) -> None:
    pooler = HeadPooler(folder, kind="both", power=1.0, keep=3)
    blind = pooler.fit(TEXTS).heads_
    assert blind.values.min() == pytest.approx(blind.values.max())
    seeing = pooler.fit(TEXTS, pairs)
    assert seeing.heads_.top(1) == [(1, 1)]
    assert seeing.penalty_ is not None
    assert seeing.layers_.sum() + seeing.heads_.values.sum() == pytest.approx(1)
    vectors = seeing.encode(TEXTS).dense
    place = {text: row for row, text in enumerate(TEXTS)}
    cosines = np.array([vectors[place[a]] @ vectors[place[b]] for a, b in pairs.pairs])
    assert mean_spearman(cosines, pairs.gold, np.array(pairs.group)) > 0.9 > seeing.held_out_ - 0.1


def test_tokens_weigh_by_rarity(folder: str) -> None:
    reader = HeadPooler(folder, rarity=0.1, special=0.25).reader(["a a a b"])
    assert reader.token_weights[[4, 5, 6, 2, 3]].tolist() == pytest.approx(
        [0.1 / (0.1 + 3 / 6), 0.1 / (0.1 + 1 / 6), 1.0, 0.25, 0.25]
    )


def test_dim_keeps_the_principal_directions(folder: str) -> None:
    whole = HeadPooler(folder, kind="heads", power=1.0).fit(TEXTS)
    few = HeadPooler(folder, kind="heads", power=1.0, dim=6).fit(TEXTS)
    x, y = (each.encode(TEXTS, normalize=False).dense.astype(np.float64) for each in (whole, few))
    x -= x.mean(0)
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    best = (left[:, :6] * sizes[:6]) @ (left[:, :6] * sizes[:6]).T
    y -= y.mean(0)
    np.testing.assert_allclose(y @ y.T, best, atol=1e-3 * np.abs(best).max())


def test_whitening_is_white() -> None:
    x = np.random.default_rng(0).normal(size=(500, 4)) @ np.diag([4.0, 1.0, 0.5, 0.1]) + 3
    z = whitening(x, 1.0)(x)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(4) / 4, atol=1e-6)
    np.testing.assert_allclose(whitening(x, None)(x), x / np.sqrt((x**2).sum(1).mean()), rtol=1e-6)


def test_folds_hold_whole_sets() -> None:
    group = np.array(["a"] * 50 + ["b"] * 30 + ["c"] * 20 + ["d"] * 10)
    fold = folds_of(group, 2)
    assert all(len(set(fold[group == name])) == 1 for name in "abcd")
    assert sorted(np.bincount(fold)) == [50, 60]


def test_zero_prior_stays_zero_and_a_penalty_holds() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 3, 2))
    forms = torch.tensor(np.stack([x[:, 0] * x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2], 1)[:, :, [0, 1]])
    gold = (x[:, 0, 1] * x[:, 1, 1]).copy()
    pairs = PairForms(forms, gold, np.array(["one"] * 200))
    assert fit_weights(pairs, np.array([1.0, 0.0]), 0.1)[1] == 0
    free, held = (fit_weights(pairs, np.ones(2), penalty) for penalty in (0.001, 100.0))
    assert free[1] / free[0] > 5
    assert held[1] / held[0] < 1.2


def test_errors(folder: str) -> None:
    with pytest.raises(InputError, match="kind = 'mean', expected"):
        HeadPooler(folder, kind="mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not fitted"):
        HeadPooler(folder).encode(["a"])
    with pytest.raises(InputError, match="several texts"):
        HeadPooler(folder).fit(["a"])
    alike = SentencePairs("alike", [("a", "b"), ("c", "d")], np.ones(2), ["x", "x"])
    with pytest.raises(InputError, match="All 2 pairs have the score"):
        HeadPooler(folder).fit(TEXTS, alike)
    with pytest.raises(InputError, match="nothing to read"):
        BlockPooler([], [], (4, 1, 4), 9)
    with pytest.raises(InputError, match="cannot be blended"):
        BlockPooler([0], [(0, 0)], (4, 1, 4), 9, blend=True)
    with pytest.raises(InputError, match="give it ids"):
        BlockPooler([0], [], (4, 1, 4), 9)(torch.ones(1, 2, 4), torch.ones(1, 2))
