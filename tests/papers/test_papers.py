"""The mark, the look-up, and what people and machines are shown."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from polyhead.errors import InputError
from polyhead.papers import (
    Paper,
    catalogue,
    evidence,
    explain,
    find,
    implementations,
    paper,
    search_papers,
    table,
    to_json,
)
from polyhead.papers import cards as cards_module


def shown(what: RenderableType, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, no_color=True).print(what)
    return out.getvalue()


def test_importing_the_room_reads_and_loads_nothing() -> None:
    code = (
        "import sys, polyhead.papers as p\n"
        "from polyhead.papers.cards import _cards\n"
        "p.paper('no-such-paper')(lambda: 0)\n"
        "print(_cards.cache_info().currsize, sorted({'yaml', 'rich', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"


def test_mark_keeps_the_object_and_its_ids_in_order() -> None:
    def votes() -> int:
        return 7

    assert paper("test-a", "test-b", "test-a")(votes) is votes
    assert votes() == 7
    assert votes.__papers__ == ("test-a", "test-b")  # type: ignore[attr-defined]
    paper("test-c", "test-b")(votes)
    assert votes.__papers__ == ("test-a", "test-b", "test-c")  # type: ignore[attr-defined]
    where = f"{votes.__module__}.{votes.__qualname__}"
    assert implementations("test-a") == implementations("test-b") == implementations("test-c") == (where,)
    assert implementations("test-d") == ()


def test_a_subclass_has_its_own_papers() -> None:
    @paper("test-base")
    class Base: ...

    @paper("test-derived")
    class Derived(Base): ...

    class Unmarked(Base): ...

    assert vars(Base)["__papers__"] == ("test-base",)
    assert vars(Derived)["__papers__"] == ("test-derived",)
    assert "__papers__" not in vars(Unmarked)
    assert implementations("test-base") == (f"{Base.__module__}.{Base.__qualname__}",)


@pytest.mark.parametrize("ids", [(), (lambda: 0,), ("",)])
def test_a_mark_without_an_id_is_refused(ids: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"write @paper\('mrag'\)"):
        paper(*ids)


def test_find_forgives_spelling_of_case_and_separators() -> None:
    assert find("mrag").title == "Multi-Head RAG: Solving Multi-Aspect Problems with LLMs"
    assert find("Aspect Doc_Embeddings") is find("aspect-doc-embeddings")
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("mrag").state = "works"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "near"),
    [("mragg", "mrag"), ("longhead", "longheads"), ("pointer networks nips", None), ("hopfield", None)],
)
def test_unknown_paper_names_what_comes_near(given: str, near: str | None) -> None:
    with pytest.raises(InputError) as caught:
        find(given)
    message = str(caught.value)
    assert repr(given) in message
    assert "349" in message
    assert "`polyhead papers`" in message
    if near:
        assert f"Did you mean {near}" in message


def test_unknown_paper_is_also_looked_for_in_titles() -> None:
    with pytest.raises(InputError, match="mqa"):
        find("fast transformer decoding")


def test_search_takes_all_words_and_all_filters_together() -> None:
    everything = list(catalogue().values())
    assert search_papers() == everything
    assert {card.id for card in search_papers("MULTI-ASPECT rag")} == {"mrag"}
    heads = search_papers(family="heads")
    assert len(heads) == 30
    found = search_papers("circuit", family="heads", kind="mechanism")
    assert found
    assert all(card in heads and card.kind == "mechanism" for card in found)
    states = [search_papers(state=state) for state in ("planned", "partial", "works")]
    assert sum(map(len, states)) == len(everything)
    assert search_papers("no card holds thisword") == []


@pytest.mark.parametrize("wrong", [{"family": "head"}, {"state": "done"}, {"kind": "paper"}])
def test_search_refuses_a_filter_nothing_can_match(wrong: dict[str, str]) -> None:
    expected = {"head": "heads", "done": "planned, partial, works", "paper": "benchmark, mechanism, study"}
    with pytest.raises(InputError, match=expected[next(iter(wrong.values()))]):
        search_papers(**wrong)  # type: ignore[arg-type]


def test_evidence_is_none_until_a_claim_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards_module, "EVIDENCE", tmp_path)
    assert evidence("mrag") is None
    assert "no evidence yet" in shown(explain(find("mrag")))
    (tmp_path / "mrag.json").write_text(json.dumps({"verdict": "refuted", "measured": 0.37}))
    assert evidence("MRAG") == {"verdict": "refuted", "measured": 0.37}
    page = shown(explain(find("mrag")))
    assert "verdict: refuted" in page
    assert "no evidence yet" not in page
    with pytest.raises(InputError, match=r"'\.\./mrag'"):
        evidence("../mrag")


def test_table_shows_every_paper_and_counts_states() -> None:
    some = [
        dataclasses.replace(find("mrag"), state="planned"),
        dataclasses.replace(find("mqa"), title="[bold]Not[/bold] markup", state="works"),
    ]
    text = shown(table(some))
    assert "2 papers: 1 planned, 1 works" in text
    assert "mrag" in text
    assert "[bold]Not[/bold] markup" in text
    assert table(catalogue().values()).row_count == 349
    assert "0 papers" in shown(table([]))


def test_explain_says_whose_word_the_claim_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards_module, "EVIDENCE", tmp_path)
    card = dataclasses.replace(find("mrag"), arxiv_checked=False)
    page = shown(explain(card), width=400)
    for part in (card.title, card.summary, card.claim, "its word, not our result", "id not checked"):
        assert part in page
    done = dataclasses.replace(
        card, state="works", code=("polyhead.a.B",), docs="guide/x.md", arxiv=None, claim_file="claims/mrag.py"
    )
    page = shown(explain(done), width=400)
    for part in ("In Polyhead: works", "polyhead.a.B", "guide/x.md", "claims/mrag.py has not run", "not on arXiv"):
        assert part in page


def test_json_holds_the_whole_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards_module, "EVIDENCE", tmp_path)
    card = find("mrag")
    one = json.loads(to_json(card))
    assert one.pop("evidence") is None
    assert Paper(**{key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}) == card
    several = json.loads(to_json(search_papers(family="cache")))
    assert [entry["id"] for entry in several] == ["razor-attention", "ltri-llm", "headkv", "sparsemm"]


@pytest.mark.parametrize("module", ["", ".cards", ".marks", ".render"])
def test_examples_in_the_docstrings_hold(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"polyhead.papers{module}"))
    assert result.attempted > 0
    assert result.failed == 0
