from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from polyhead.search.filters import compile_filter
from polyhead.search.index import Index
from polyhead.serve import Service, create_app
from polyhead.serve.pages import site as site_module
from polyhead.serve.pages.asking import Ask, quoted
from polyhead.serve.pages.marking import excerpt, marked, words_of
from tests.serve.conftest import ServedEncoder

PAGE = {"accept": "text/html"}
HOSTILE = "<script>alert('x')</script> \"quoted\" & 'more'"


@pytest.fixture
def filled(client: TestClient) -> TestClient:
    documents = [
        {"id": f"notes/a{i}", "text": f"subject{i} lives among the rivers", "title": f"Number {i}", "kind": "note"}
        for i in range(6)
    ]
    documents += [
        {"id": "bad", "text": HOSTILE + " rivers", "title": HOSTILE, "kind": "it's"},
        {"id": "not%es/b", "text": "subject9 far from rivers", "kind": "mail"},
    ]
    client.post("/index", json={"documents": documents}).raise_for_status()
    return client


def titles(page: str) -> list[str]:
    return [html.unescape(found) for found in re.findall(r"</span> (.*?)</h3>", page)]


def test_a_search_shows_why_each_document_is_there(filled: TestClient) -> None:
    answer = filled.get("/", params={"q": "where does subject3 live? tell of rivers", "k": 3}, headers=PAGE)
    page = answer.text
    assert answer.status_code == 200
    assert "script-src" not in answer.headers["content-security-policy"]
    assert len(titles(page)) == 3
    assert "<mark>rivers</mark>" in page
    assert "Answers “" in page or "For the whole question" in page
    assert "How it was decided" in page
    assert re.search(r'role="img" aria-label="Heads that spoke for it. layer [47], head \d: \d+\.\d% ', page)
    assert 'value="where does subject3 live? tell of rivers"' in page
    assert '<option value="aspects"' in page


def test_the_part_is_the_results_alone_and_names_the_pages_address(filled: TestClient) -> None:
    answer = filled.get(
        "/app/results", params={"q": "subject1", "kind": "note", "k": 10}, headers={"HX-Request": "true"}
    )
    assert "<html" not in answer.text
    assert answer.headers["hx-replace-url"] == "/?q=subject1&kind=note"
    assert 'hx-swap-oob="innerHTML"' in answer.text
    assert "6 hits by aspects" in answer.text
    assert filled.get(answer.headers["hx-replace-url"], headers=PAGE).text.count("<article") == 6


def test_hostile_texts_and_questions_are_shown_as_texts(filled: TestClient) -> None:
    for path in ("/", "/app/results"):
        page = filled.get(path, params={"q": HOSTILE, "folder": HOSTILE[:8]}, headers=PAGE).text
        assert "<script>alert" not in page
    page = filled.get("/", params={"q": "alert rivers " + HOSTILE, "kind": "it's"}, headers=PAGE).text
    assert titles(page) == [HOSTILE]
    assert "&lt;<mark>script</mark>&gt;<mark>alert</mark>(" in page


def test_filters_are_quoted_not_pasted(filled: TestClient) -> None:
    def found(**fields: str) -> list[str]:
        return titles(filled.get("/app/results", params={"q": "rivers", **fields}).text)

    assert found(kind="it's") == [HOSTILE]
    assert found(kind="' OR kind != '") == []
    assert len(found(folder="notes")) == len(found(folder="/notes/")) == 6
    assert found(folder="not%es") == ["not%es/b"]
    assert found(folder="not_s") == found(folder="note") == []
    assert found(since="2999-01-01") == []
    assert len(found(since="2000-01-01", until="2999-12-30")) == 8


@pytest.mark.parametrize("value", ["it's", "'", "''", "a' OR 'a' = 'a", 'x"y', "\\'", "a\nb"])
def test_any_value_stays_one_value(value: str) -> None:
    where = Ask(q="x", kind=value, folder=value, since="2026-01-01", until="2026-12-31").where()
    compiled = compile_filter(where)
    assert compiled is not None
    assert f"`kind` = {quoted(value)}" in compiled


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"since": "yesterday"}, "2026-01-31"),
        ({"until": "9999-12-31"}, "cannot be read"),
        ({"k": "0"}, "from 1 to 50"),
        ({"k": "51"}, "from 1 to 50"),
        ({"k": "many"}, "from 1 to 50"),
        ({"strategy": "magic"}, "magic"),
    ],
)
def test_what_cannot_be_asked_is_told_beside_the_form(filled: TestClient, fields: dict[str, str], told: str) -> None:
    page = filled.get("/", params={"q": "rivers", **fields}, headers=PAGE)
    assert page.status_code == 422
    assert told in html.unescape(page.text)
    assert '<form class="ask"' in page.text
    part = filled.get("/app/results", params={"q": "rivers", **fields}, headers={"HX-Request": "true"})
    assert part.status_code == 422
    assert told in html.unescape(part.text)
    assert 'role="alert"' in part.text
    assert "<html" not in part.text


def test_two_strategies_stand_side_by_side(filled: TestClient) -> None:
    page = filled.get("/app/results", params={"q": "subject2 rivers", "beside": "dense", "k": "2"}).text
    assert re.findall(r'aria-label="Found by (\w+)"', page) == ["aspects", "dense"]
    assert page.count("<article") == 4
    assert len(set(re.findall(r' id="([^"]+)"', page))) == len(re.findall(r' id="([^"]+)"', page))
    once = filled.get("/app/results", params={"q": "subject2", "beside": "aspects"}).text
    assert once.count("Found by") == 1


@pytest.mark.parametrize("strategy", ["aspects", "dense", "heads", "vote", "parts"])
def test_every_strategy_shows_its_hits(filled: TestClient, strategy: str) -> None:
    page = filled.get("/app/results", params={"q": "subject2 rivers", "strategy": strategy}).text
    assert "<article" in page
    assert "Heads that spoke" in page or strategy in ("dense", "parts")


def test_late_says_what_it_lacks_and_then_which_words_met(
    filled: TestClient, service: Service, encoder: ServedEncoder
) -> None:
    alone = filled.get("/app/results", params={"q": "subject2 rivers", "strategy": "late"})
    assert alone.status_code == 422
    assert "no token vectors" in html.unescape(alone.json()["message"])
    both = filled.get("/app/results", params={"q": "subject2 rivers", "strategy": "late", "beside": "dense"})
    assert both.status_code == 200
    assert "late cannot answer this" in both.text
    assert "<article" in both.text
    assert service.index is not None
    service.index.update_tokens(encoder)  # type: ignore[arg-type]
    page = filled.get("/app/results", params={"q": "subject2 rivers", "strategy": "late"}).text
    assert "rivers met rivers" in page


def test_copies_are_json_and_python_that_can_be_read(filled: TestClient) -> None:
    page = filled.get("/app/results", params={"q": "it's rivers", "kind": "it's"}).text
    copied = {
        name: html.unescape(text) for name, text in re.findall(r'<pre id="(\w+)-1" hidden>(.*?)</pre>', page, re.S)
    }
    told = json.loads(copied["json"])
    assert told["hits"][0]["document"] == "bad"
    assert told["hits"][0]["title"] == HOSTILE
    compile(copied["python"], "copied", "exec")
    assert "kind = 'it''s'" in copied["python"]


def test_empty_states_help(filled: TestClient, encoder: ServedEncoder, tmp_path: Path) -> None:
    assert "Ask something" in filled.get("/", headers=PAGE).text
    nothing = filled.get("/app/results", params={"q": "x", "since": "2999-01-01"}).text
    assert "Nothing found" in nothing
    assert 'href="/?q=x"' in nothing
    with TestClient(create_app(Service(encoder))) as bare:  # type: ignore[arg-type]
        page = bare.get("/?q=x", headers=PAGE)
        assert page.status_code == 200
        assert "polyhead serve --index DIR" in page.text
    empty = Service(encoder, Index(tmp_path / "new"))  # type: ignore[arg-type]
    with TestClient(create_app(empty)) as client:
        assert "The index is empty" in client.get("/?q=x", headers=PAGE).text
        client.post("/index", json={"documents": [{"id": "1", "text": "now there"}]})
        assert '<form class="ask"' in client.get("/", headers=PAGE).text
        client.post("/index", json={"remove": ["1"]})
        assert "The index is empty" in client.get("/", headers=PAGE).text


def test_choices_follow_the_index(filled: TestClient) -> None:
    def page() -> str:
        return html.unescape(filled.get("/", headers=PAGE).text)

    assert all(f"<option>{kind}</option>" in page() for kind in ("it's", "mail", "note"))
    assert '<option value="notes">' in page()
    filled.post("/index", json={"documents": [{"id": "x/y/z", "text": "new", "kind": "fresh"}]})
    assert "<option>fresh</option>" in page()
    assert '<option value="x/y">' in page()


def test_words_are_marked_whole_and_in_any_form() -> None:
    words = words_of("What do the Heads of a model see?")
    assert marked("A head sees; ahead of models <b>", words) == (
        "A <mark>head</mark> <mark>sees</mark>; ahead of <mark>models</mark> &lt;b&gt;"
    )
    assert words_of("who are you") == {"who", "are", "you"}
    assert words_of("") == frozenset()


def test_excerpts_are_where_the_words_are() -> None:
    text = "filler word " * 100 + "the river met the sea " + "filler word " * 100
    short, cut = excerpt(text, words_of("river sea"))
    assert cut
    assert "<mark>river</mark> met the <mark>sea</mark>" in short
    assert len(short) < 450
    assert excerpt("short", words_of("x")) == ("short", False)
    assert excerpt("x" * 1000, frozenset())[1]


def test_colours_of_both_themes_can_be_read() -> None:
    style = (Path(site_module.__file__).parent / "static" / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r"\{([^{}]*--ground:[^{}]*)\}", style)
    ]
    assert len(themes) == 3
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent", "bad") for ground in ("ground", "raised")]
    for theme in themes:
        for ink, ground in [*pairs, ("on-accent", "accent"), ("on-mark", "mark")]:
            light, dark = sorted((luminance(theme[ink]), luminance(theme[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
