from __future__ import annotations

import html
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from starlette.testclient import TestClient

from polyhead.papers import cards as cards_module
from polyhead.papers import catalogue, evidence
from polyhead.serve.pages.evidenceview import found_on, plot_of
from polyhead.serve.pages.samples import sample_of
from tests.serve.conftest import ServedEncoder

PAGE = {"accept": "text/html"}
PART = {"HX-Request": "true"}
ATOM = "{http://www.w3.org/2005/Atom}"


def listed(client: TestClient, **asked: str) -> list[str]:
    page = client.get("/app/papers-found", params=asked, headers=PART)
    assert page.status_code == 200
    assert "<html" not in page.text
    return re.findall(r'<th scope="row"><a href="/app/papers/([^"]+)"', page.text)


def test_the_catalogue_is_listed_and_filtered(client: TestClient) -> None:
    page = client.get("/app/papers", headers=PAGE).text
    assert page.count('<th scope="row">') == len(catalogue())
    assert f"{len(catalogue())} papers" in page
    works = {card.id for card in catalogue().values() if card.state == "works" and card.family == "heads"}
    assert set(listed(client, family="heads", state="works")) == works
    refuted = listed(client, verdict="refuted")
    assert refuted
    assert all((evidence(id) or {})["verdict"] == "refuted" for id in refuted)
    assert not any(evidence(id) for id in listed(client, verdict="none yet"))
    assert listed(client, q="landmark", by="words", family="pooling") == ["lmk-pooling"]


def test_papers_are_found_by_meaning_and_encoded_once(client: TestClient, encoder: ServedEncoder) -> None:
    card = catalogue()["landmark-attention"]
    assert listed(client, q=card.summary)[0] == card.id
    texts = sum(encoder.passes)
    assert texts > 2 * len(catalogue())
    assert listed(client, q=card.claim, by="dense")[0] == card.id
    assert sum(encoder.passes) == texts + 1  # the question alone
    found = listed(client, q="landmark tokens and blocks", family="vision")
    assert found
    assert all(catalogue()[id].family == "vision" for id in found)


def test_the_part_names_the_pages_address(client: TestClient) -> None:
    answer = client.get("/app/papers-found", params={"q": "a&b", "by": "words", "state": "works"}, headers=PART)
    assert answer.headers["hx-replace-url"] == "/app/papers?q=a%26b&by=words&state=works"
    assert "No paper passes" in answer.text
    assert 'value="a&amp;b"' in client.get(answer.headers["hx-replace-url"], headers=PAGE).text


def test_hostile_questions_are_shown_as_texts(client: TestClient) -> None:
    for by in ("words", "aspects"):
        page = client.get("/app/papers", params={"q": '"><script>alert(1)</script>', "by": by}, headers=PAGE)
        assert page.status_code == 200
        assert "<script>alert" not in page.text


@pytest.mark.parametrize("asked", [{"family": "no"}, {"state": "no"}, {"verdict": "no"}, {"by": "no"}])
def test_unknown_filters_are_told(client: TestClient, asked: dict[str, str]) -> None:
    page = client.get("/app/papers", params=asked, headers=PAGE)
    assert page.status_code == 422
    assert 'role="alert"' in page.text
    assert '<form class="ask"' in page.text
    assert client.get("/app/papers-found", params=asked, headers=PART).status_code == 422


def test_every_paper_has_a_page(client: TestClient) -> None:
    for card in catalogue().values():
        page = client.get(f"/app/papers/{card.id}", headers=PAGE)
        assert page.status_code == 200, card.id
        text = html.unescape(page.text)
        assert f"<h1>{card.title}</h1>" in text
        assert all(f"from {name.rpartition('.')[0]} import" in text for name in card.code)
        known = evidence(card.id)
        if known is None:
            assert "svg class" not in text
            continue
        assert f"<strong>{known['verdict'].capitalize()}</strong>" in text
        assert ('<svg class="interval"' in text) == (known["interval"] is not None)


def test_code_of_cards_is_shown_with_its_example() -> None:
    samples = [sample_of(name) for card in catalogue().values() for name in card.code]
    assert all(sample.summary for sample in samples)
    assert sum(bool(sample.example) for sample in samples) > len(samples) / 2
    for sample in samples:
        compile(sample.example, sample.name, "exec")
    shown = sample_of("polyhead.attention.fastmax.FastmaxAttention")
    assert shown.summary.startswith("Weights <code>f(q_i")
    assert shown.example.splitlines()[-1] == "# (torch.Size([1, 9, 64]), 153)"
    missing = sample_of("polyhead.no_such_module.Thing")
    assert "cannot be loaded" in missing.summary
    assert missing.line == "from polyhead.no_such_module import Thing"


def test_similar_papers_by_method_task_and_data(client: TestClient) -> None:
    for by in ("method", "task", "data"):
        part = client.get("/app/papers/fastmax/similar", params={"by": by}, headers=PART).text
        near = re.findall(r'<li><a href="/app/papers/([^"]+)"', part)
        assert len(near) == 8
        assert "fastmax" not in near
        whole = client.get("/app/papers/fastmax", params={"similar": by}, headers=PAGE).text
        assert re.findall(r'<li><a href="/app/papers/([^"]+)"', whole) == near
        assert 'hx-trigger="load"' not in whole
    assert "based" in near  # both were tried on associative recall
    bare = next(card.id for card in catalogue().values() if evidence(card.id) is None)
    assert "no data to go by" in client.get(f"/app/papers/{bare}/similar?by=data", headers=PART).text
    assert client.get("/app/papers/fastmax/similar?by=colour", headers=PART).status_code == 422


def test_an_unknown_paper_is_told_with_those_that_come_near(client: TestClient) -> None:
    page = client.get("/app/papers/fastmaxx", headers=PAGE)
    assert page.status_code == 404
    assert "fastmax" in page.text
    assert client.get("/app/papers/<script>", headers=PAGE).text.count("<script>") == 0


def test_the_feed_is_atom_with_the_newest_first(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.get("/app/papers.atom")
    assert answer.headers["content-type"].startswith("application/atom+xml")
    feed = ElementTree.fromstring(answer.content)
    entries = feed.findall(f"{ATOM}entry")
    assert feed.tag == f"{ATOM}feed"
    assert len(entries) == 50
    dates = [entry.findtext(f"{ATOM}updated") or "" for entry in entries]
    assert dates == sorted(dates, reverse=True)
    assert feed.findtext(f"{ATOM}updated") == dates[0]
    assert len({entry.findtext(f"{ATOM}id") for entry in entries}) == 50
    link = entries[0].find(f"{ATOM}link")
    assert link is not None
    assert client.get(link.attrib["href"]).status_code == 200

    known = {**(evidence("fastmax") or {}), "date": "2999-01-01", "expected": "<b>\x0bold</b>"}
    (tmp_path / "fastmax.json").write_text(json.dumps(known))
    monkeypatch.setattr(cards_module, "EVIDENCE", tmp_path)
    (entry,) = ElementTree.fromstring(client.get("/app/papers.atom").content).findall(f"{ATOM}entry")
    assert entry.findtext(f"{ATOM}updated") == "2999-01-01T00:00:00+00:00"
    assert "<b>old</b>" in (entry.findtext(f"{ATOM}summary") or "")
    assert "was not kept" not in (entry.findtext(f"{ATOM}summary") or "")
    assert "on 2999-01-01" in client.get("/app/papers/fastmax", headers=PAGE).text


def test_evidence_without_a_date_has_that_of_its_file() -> None:
    when, says = found_on("fastmax", {})
    assert not says
    assert when.timestamp() == int((cards_module.EVIDENCE / "fastmax.json").stat().st_mtime)


def test_plots_stay_in_the_picture_and_need_an_interval() -> None:
    for low, high, value in [(-1e-9, 2e-9, 0.0), (5, 6, 5.5), (-3, -2, -2.5), (0, 0, 0), (1, 2, 40)]:
        plot = plot_of({"interval": [low, high], "decides": "it", "measured": {"it": value}})
        assert plot is not None
        assert all(0 <= place <= 600 for place in (plot.low, plot.high, plot.zero, plot.value or 0))
        assert plot.low <= plot.high
        assert plot.said.startswith("it: 95% interval from")
    assert plot_of({"interval": None}) is None
    assert plot_of({"interval": [float("nan"), 1.0]}) is None
    lone = plot_of({"interval": [1.0, 2.0], "measured": {}})
    assert lone is not None
    assert lone.value is None
