"""Ask an index: filters, strategies and reasons end to end, with an encoder whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search.fake_encoder import FakeEncoder

from polyhead.errors import IndexMismatchError, InputError
from polyhead.search.engine import search_index
from polyhead.search.index import Index
from polyhead.search.strategies import STRATEGIES

RIVER = "the river rises in the northern hills"
BRIDGE = "an iron bridge was opened for the railway"
OTHERS = [
    f"entry {n} about {word} and nothing else" for n, word in enumerate(["bread", "wool", "glass", "silk", "tin"])
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "river.txt").write_text(RIVER)
    (folder / "bridge.md").write_text(BRIDGE)
    for number, text in enumerate(OTHERS):
        (folder / f"other{number}.txt").write_text(text)
    (folder / "long.txt").write_text("filler words come first " * 20 + "the copper violin was found in a lantern")
    index = Index(tmp_path_factory.mktemp("index") / "it")
    index.update(folder, FakeEncoder)
    return index


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_finds_and_says_why(index: Index, name: str) -> None:
    result = search_index(index, RIVER, FakeEncoder(), k=3, by=name)
    assert [hit.rank for hit in result.hits] == [1, 2, 3]
    assert result.hits[0].path == "river.txt"
    assert [hit.score for hit in result.hits] == sorted((hit.score for hit in result.hits), reverse=True)
    assert result.strategy == name
    assert "rows in memory" in result.plan
    assert json.loads(json.dumps(result.to_json()))["hits"][0]["document"] == result.hits[0].document
    if STRATEGIES[name].uses_heads:
        assert result.hits[0].heads
        assert {share.layer for share in result.hits[0].heads} <= {4, 7}, "the model's own layer numbers"


def test_each_hit_names_the_part_it_answers(index: Index) -> None:
    # Hashed words have no meaning, so the whole of two sentences is as near as each: "parts" always lets parts speak.
    result = search_index(index, f"{RIVER}; {BRIDGE}", FakeEncoder(), k=2, by="parts")
    assert {hit.path for hit in result.hits} == {"river.txt", "bridge.md"}
    for hit in result.hits:
        assert hit.answers is not None
        assert ("river" in hit.answers) == (hit.path == "river.txt")


def test_a_long_document_is_one_hit_by_its_best_chunk(index: Index) -> None:
    result = search_index(index, "the copper violin was found in a lantern", FakeEncoder(), k=9)
    assert [hit.path for hit in result.hits].count("long.txt") == 1
    assert result.hits[0].path == "long.txt"
    assert "copper violin" in result.hits[0].text
    assert result.hits[0].start > 400


def test_filters_hold_before_ranking(index: Index) -> None:
    result = search_index(index, RIVER, FakeEncoder(), k=5, where="kind = 'md'")
    assert [hit.path for hit in result.hits] == ["bridge.md"]
    nothing = search_index(index, RIVER, FakeEncoder(), where="kind = 'pdf'")
    assert nothing.hits == []
    assert nothing.decision == "nothing to rank"


def test_bad_input_says_what_to_do(index: Index, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="k is 0: ask for at least 1"):
        search_index(index, "a", FakeEncoder(), k=0)
    with pytest.raises(InputError, match="query is empty"):
        search_index(index, "  ", FakeEncoder())
    with pytest.raises(InputError, match=r"'nearest'.*aspects.*dense"):
        search_index(index, "a", FakeEncoder(), by="nearest")
    with pytest.raises(InputError, match="no column 'knd', did you mean 'kind'"):
        search_index(index, "a", FakeEncoder(), where="knd = 'md'")
    with pytest.raises(IndexMismatchError, match="cannot be compared"):
        search_index(index, "a", FakeEncoder(seed=5))
