"""The tasks of the attention claims: their labels are what they ask for, and training trains what it should."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.moh import MixtureOfHeads
from polyhead.claims._tiny_tasks import (
    Batch,
    TinyTransformer,
    accuracy_and_bits,
    character_batches,
    character_scores,
    news_characters,
    recall_batch,
    train,
)
from polyhead.claims.better_relative_position import moved_letters, sorted_letters
from polyhead.claims.mae_heads import dialects
from polyhead.claims.selective_self_attention import copy_or_average


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def news(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "ag-news"
    folder.mkdir()
    rows = [f'"1","Title {n}","Some {n} WORDS, with signs; and more of them."' for n in range(60)]
    (folder / "test.csv").write_text("\n".join(rows))
    monkeypatch.setenv("POLYHEAD_DATA", str(tmp_path))
    news_characters.cache_clear()
    yield
    news_characters.cache_clear()


def test_characters_are_those_of_the_news(news: None) -> None:
    codes = news_characters()
    known = "abcdefghijklmnopqrstuvwxyz0123456789 .\n?"
    said = "".join(known[code] for code in codes[:50].tolist())
    assert said == "title 0. some 0 words? with signs? and more of the"
    batch, test = character_batches(5, 12, held=7)
    one = batch(drawn())
    assert one.inputs.shape == (5, 12, 40)
    assert torch.equal(one.inputs.argmax(2)[:, 1:], one.labels[:, :-1])
    assert test.labels.shape == (7, 12)
    assert torch.equal(test.inputs[0].argmax(1), codes[len(codes) * 9 // 10 :][:12])


def test_characters_are_scored_at_every_length(news: None) -> None:
    def make() -> TinyTransformer:
        return TinyTransformer([Attention(AttentionShape(8, 2), causal=True)], 40, 40)

    found = character_scores({"a": make, "b": make}, [0, 1], 2, lengths=[8, 16])
    assert found["a"].shape == (2, 2, 2)
    assert (found["a"] == found["b"]).all()
    assert (found["a"][0] != found["a"][1]).any()


def test_letters_move_and_sort() -> None:
    one = moved_letters(drawn(), 2, 9)
    letters = one.inputs.argmax(2)
    assert torch.equal(one.labels[:, 3:], letters[:, :-3])
    assert (one.labels[:, :3] == -1).all()
    other = sorted_letters(drawn(), 2, 9)
    letters = other.inputs.argmax(2)
    assert all(other.labels[1, t] == sorted(letters[1, t - 1 : t + 2].tolist())[1] for t in range(1, 8))


def test_dialects_read_backwards_or_by_lexicon() -> None:
    one = dialects(drawn(), 6)
    tokens, lexicon = one.inputs.argmax(2), {}
    for text in range(6):
        assert tokens[text, 0] == 16 + text % 2
        word, said = tokens[text, 1:].tolist(), one.labels[text, 1:].tolist()
        if text % 2 == 0:
            assert said == word[::-1]
        else:
            assert all(lexicon.setdefault(letter, heard) == heard for letter, heard in zip(word, said, strict=True))


def test_values_are_copied_or_counted() -> None:
    one = copy_or_average(drawn(), 3)
    names, values, mark = one.inputs[..., :32], one.inputs[..., 32:40], one.inputs[..., 40]
    for text in range(3):
        held = {int(names[text, t].argmax()): int(values[text, t].argmax()) for t in range(16)}
        for t in range(16, 32):
            if mark[text, t]:
                counts = torch.bincount(torch.tensor(list(held.values())), minlength=8)
                assert counts[one.labels[text, t]] == counts.max()
            else:
                assert one.labels[text, t] == held[int(names[text, t].argmax())]
            assert values[text, t].sum() == 0


def test_bits_and_accuracy_count_what_is_asked() -> None:
    model = nn.Identity()
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]]))
    right, bits = accuracy_and_bits(model, Batch(logits, torch.tensor([[0, 2, -1]])))
    assert right == 0.5
    assert bits == pytest.approx((1 + 2) / 2)


def test_training_weighs_balance_and_keeps_within_its_rounds() -> None:
    def trained(balance: float) -> tuple[torch.Tensor, list[int]]:
        torch.manual_seed(0)
        model = TinyTransformer([MixtureOfHeads(AttentionShape(16, 4), shared=0, top_k=1)], 80, 16)
        seen: list[int] = []

        @contextmanager
        def around(step: int):  # type: ignore[no-untyped-def]
            seen.append(step)
            yield

        train(model, lambda generator: recall_batch(generator, 4, 3), 3, 0, balance=balance, around=around)
        layer = model.layers[0]
        assert isinstance(layer, MixtureOfHeads)
        return layer.route.weight.detach().clone(), seen

    (plain, seen), (balanced, _) = trained(0.0), trained(10.0)
    assert seen == [0, 1, 2]
    assert not torch.allclose(plain, balanced)
