"""Parts of a text: exact offsets, full coverage, and the splits a reader would make."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polyhead.embed.parts import PART_KINDS, Part, split_parts, thin_parts
from polyhead.errors import InputError

ASCII = ["word ", "Dr. ", "and ", ", ", "; ", ": ", ". ", "? ", "\n\n", "\r\n", "\n- ", "1,000 ", "https://x.y/a,b "]
OTHER = [
    "今天天气",
    "，",
    "。",
    "สวัสดี ",
    "ខ្មែរ",
    "é",
    "e\u0301",
    "👩\u200d👧 ",
    "\u2028",
    "\u00a0",
    "«oui» ",
    "ما هي، ",
    " — ",
]
PIECES = st.sampled_from([*ASCII, *OTHER])
TEXTS = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join))


def texts(text: str, kind: str, **options: object) -> list[str]:
    return [part.text for part in split_parts(text, (kind,), **options)]  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 9), st.sampled_from(["en", "zh", "th", "de", "xx"]))
@example("a\ud800b. \ud800 Cc", 2, "en")
@example("แ", 1, "th")
@example("\u0301\u0301 \u0301", 1, "en")
@example("เ เก", 1, "th")
def test_parts_have_exact_offsets_and_no_twins(text: str, window: int, language: str) -> None:
    parts = split_parts(text, PART_KINDS, window=window, language=language)
    for part in parts:
        assert text[part.start : part.end] == part.text
        assert part.text == part.text.strip() != ""
    assert len({(part.start, part.end) for part in parts}) == len(parts)
    assert bool(parts) == bool(text.strip())
    assert parts == split_parts(text, PART_KINDS, window=window, language=language)
    order = [(PART_KINDS.index(part.kind), part.start) for part in parts]
    assert order == sorted(order)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 9), st.data())
def test_windows_and_sentences_cover_every_character_that_is_not_blank(
    text: str, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    covers = {
        "window": split_parts(text, ("window",), window=window, stride=stride),
        "sentence": split_parts(text, ("sentence",)),
    }
    for kind, parts in covers.items():
        covered = {i for part in parts for i in range(part.start, part.end)}
        missed = [i for i, character in enumerate(text) if not character.isspace() and i not in covered]
        assert not missed, kind


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_clauses_lose_only_separators_and_coordinating_words(text: str) -> None:
    covered = {i for part in split_parts(text, ("clause",)) for i in range(part.start, part.end)}
    rest = "".join(character if i not in covered else " " for i, character in enumerate(text))
    words = [
        word for word in re.findall(r"[^\W\d_]+", rest) if word.lower() not in {"and", "or", "but", "nor", "while"}
    ]
    assert not words


@pytest.mark.parametrize("count", [1, 7, 8, 9, 11, 12, 13, 40])
def test_windows_are_full_and_overlap_by_half(count: int) -> None:
    words = [f"w{i}" for i in range(count)]
    found = [part.text.split() for part in split_parts(" ".join(words), ("window",))]
    assert all(len(one) == min(8, count) for one in found)
    firsts = [words.index(one[0]) for one in found]
    assert firsts[0] == 0
    assert firsts[-1] == max(0, count - 8)
    assert all(0 < later - earlier <= 4 for earlier, later in itertools.pairwise(firsts))
    assert len(found) == max(0, -(-(count - 8) // 4)) + 1


def test_windows_in_scripts_without_blanks() -> None:
    assert texts("一二三四五六七八九", "window", window=2) == ["一二三四", "三四五六", "五六七八", "七八九"]
    assert texts("Python3は便利です", "window", window=1) == ["Python3", "は便", "利で", "す"]
    # A vowel sign stays with its letter, and a leading vowel with the letter after it.
    assert texts("กกกกิก", "window", window=1) == ["กกกกิ", "ก"]
    assert texts("กกกเกก", "window", window=1) == ["กกกเก", "ก"]
    thai = split_parts("ประเทศไทยมีอาหารอร่อยมากมายหลายชนิดให้เลือกรับประทาน", ("window",))
    assert len(thai) > 1


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("What is A, how is B; and who is C?", "en", ["What is A", "how is B", "who is C?"]),
        ("Compare cats and dogs.", "en", ["Compare cats and dogs."]),
        ("how do tides work and why is it windy", "en", ["how do tides work", "why is it windy"]),
        ("wie alt ist Rom und wer baute es", "de", ["wie alt ist Rom", "wer baute es"]),
        ("wie alt ist Rom und wer baute es", "xx", ["wie alt ist Rom und wer baute es"]),
        (
            "At 12:30 the 1,000 men left http://x.y/a,b there",
            "en",
            ["At 12:30 the 1,000 men left http://x.y/a,b there"],
        ),
        ("one—two — three -- four - five well-kept", "en", ["one", "two", "three", "four", "five well-kept"]),
        ('He said "no," then left', "en", ['He said "no', "then left"]),
        ("今天天气很好，我们去公园：10：30见、好", "zh", ["今天天气很好", "我们去公园", "10：30见", "好"]),
        ("ما هي عاصمة فرنسا، كم عدد سكانها؟", "ar", ["ما هي عاصمة فرنسا", "كم عدد سكانها؟"]),
        ("สวัสดีครับ วันนี้อากาศดี", "th", ["สวัสดีครับ", "วันนี้อากาศดี"]),
        ("a, , b", "en", ["a", "b"]),
        ("First. Second, third.", "en", ["First.", "Second", "third."]),
    ],
)
def test_clauses(text: str, language: str, expected: list[str]) -> None:
    assert texts(text, "clause", language=language) == expected


def test_sentences_know_abbreviations_and_other_scripts() -> None:
    assert texts("Dr. Smith left the U.S. army. He was 40.", "sentence") == [
        "Dr. Smith left the U.S. army.",
        "He was 40.",
    ]
    assert texts("你好。今天天气很好！我们走吧？", "sentence", language="zh") == [
        "你好。",
        "今天天气很好！",
        "我们走吧？",
    ]
    assert texts("यह एक है। वह दो है।", "sentence", language="hi") == ["यह एक है।", "वह दो है।"]


def test_agreeing_kinds_give_one_part_of_the_kind_named_first() -> None:
    assert split_parts(" Cats sleep. ") == [Part("Cats sleep.", 1, 12, "sentence")]
    assert split_parts("Cats sleep.", ("window", "whole")) == [Part("Cats sleep.", 0, 11, "window")]
    assert split_parts(" \n\t") == []


def test_a_cap_refuses_and_thinning_counts() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    parts = split_parts(text, ("window",), window=1)
    assert split_parts(text, ("window",), window=1, max_parts=100) == parts
    with pytest.raises(InputError, match=r"100 parts.*max_parts=99"):
        split_parts(text, ("window",), window=1, max_parts=99)
    kept, left_out = thin_parts(parts, 7)
    gaps = [parts.index(b) - parts.index(a) for a, b in itertools.pairwise(kept)]
    assert (len(kept), left_out) == (7, 93)
    assert max(gaps) - min(gaps) <= 1
    assert thin_parts(parts, 100) == (parts, 0)


@pytest.mark.parametrize(
    "options", [{"kinds": ("phrase",)}, {"kinds": ()}, {"kinds": "clause"}, {"window": 0}, {"stride": 9}, {"stride": 0}]
)
def test_impossible_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options))).rstrip("s")):
        split_parts("text", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit"):
        thin_parts([], 0)
