from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from polyhead.search.index import Index
from polyhead.search.view import ArrayView
from polyhead.serve import Service, create_app
from polyhead.serve.pages.plane import figure_of, plane_of, principal
from tests.serve.conftest import ServedEncoder

PAGE = {"accept": "text/html"}
HTMX = {"HX-Request": "true"}
HOSTILE = "<img src=x onerror=alert(1)> & \"more\" 'yet'"


@pytest.fixture
def filled(client: TestClient) -> TestClient:
    documents: list[dict[str, Any]] = [
        {"id": f"notes/a{i}", "text": f"subject{i} lives among the rivers", "title": f"Number {i}", "kind": "note"}
        for i in range(8)
    ]
    documents.append({"id": "b", "text": "far away", "kind": "mail", "attributes": {"year": 2020, "by": HOSTILE}})
    documents.append({"id": "c", "text": "rivers", "title": HOSTILE, "kind": "mail", "attributes": {"year": 2021}})
    client.post("/index", json={"documents": documents}).raise_for_status()
    return client


def plotted(page: str) -> dict[str, Any]:
    found = re.search(r'data-plot="([^"]*)"', page)
    assert found
    return dict(json.loads(html.unescape(found.group(1))))


def test_two_strategies_on_typed_questions(filled: TestClient) -> None:
    given = {"first": "dense", "second": "aspects", "questions": "subject3\r\n\r\nsubject5 rivers", "k": "3"}
    page = filled.get("/app/compare/lists", params=given, headers=HTMX).text
    assert page.count('class="card answer"') == 2
    assert "<html" not in page
    assert "Number 3" in page
    mean = re.search(r'id="mean-overlap">(\d+)%', page)
    each = [int(found) for found in re.findall(r"in both: (\d+)% at 3", page)]
    assert mean
    assert abs(int(mean.group(1)) - np.mean(each)) <= 1
    for column, share in zip(page.split('class="card answer"')[1:], each, strict=True):
        assert column.count("only here") == 2 * round(3 * (1 - share / 100))
    whole = filled.get("/app/compare", params=given, headers=PAGE)
    assert whole.status_code == 200
    assert whole.text.count('class="card answer"') == 2


def test_a_strategy_overlaps_with_itself(filled: TestClient) -> None:
    given = {"first": "dense", "second": "dense", "questions": HOSTILE}
    page = filled.get("/app/compare/lists", params=given, headers=HTMX).text
    assert 'id="mean-overlap">100%' in page
    assert "only here" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"first": "magic"}, "no strategy 'magic'"),
        ({"k": "0"}, "from 1 to 50"),
        ({"k": "x"}, "from 1 to 50"),
        ({"questions": "\n".join("q" * 21)}, "at most 20"),
    ],
)
def test_what_cannot_be_compared_is_told(filled: TestClient, given: dict[str, str], told: str) -> None:
    given = {"questions": "rivers", **given}
    for path, headers in (("/app/compare", PAGE), ("/app/compare/lists", HTMX)):
        answer = filled.get(path, params=given, headers=headers)
        assert answer.status_code == 422
        assert told in html.unescape(answer.text)


def test_the_plane_colours_documents(filled: TestClient) -> None:
    page = filled.get("/app/compare/plane", headers=HTMX).text
    figure = plotted(page)
    assert {group["name"]: len(group["x"]) for group in figure["groups"]} == {"note": 8, "mail": 2}
    assert page.count('<th scope="row">') == 10
    assert "&lt;img" in str(figure)
    years = plotted(filled.get("/app/compare/plane", params={"colour": "year"}, headers=HTMX).text)
    assert {group["name"] for group in years["groups"]} == {"none", "2020", "2021"}
    folders = plotted(filled.get("/app/compare/plane", params={"colour": "folder"}, headers=HTMX).text)
    assert {group["name"] for group in folders["groups"]} == {"notes", "(top)"}
    refused = filled.get("/app/compare/plane", params={"colour": "shape"}, headers=HTMX)
    assert refused.status_code == 422
    assert "year" in refused.text
    filled.post("/index", json={"documents": [{"id": "new", "text": "one more"}]})
    assert len(re.findall('<th scope="row">', filled.get("/app/compare/plane", headers=HTMX).text)) == 11


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 0.5, 0.1]
    at, shares = principal(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert np.allclose(at.var(0, ddof=1), values[:2])
    assert np.allclose(shares, values[:2] / values.sum())
    assert np.allclose(at, principal(vectors)[0])
    assert abs(at[:, 0] @ at[:, 1]) < 1e-8
    for few in (1, 2):
        assert principal(vectors[:few])[0].shape == (few, 2)
    assert np.isfinite(principal(np.ones((3, 4)))[1]).all()


def test_a_large_index_is_sampled_and_chunks_share_a_point() -> None:
    dense = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    records = [
        {"doc_id": str(i // 2), "path": f"{i // 2}", "title": None, "kind": f"k{i // 2}", "attributes": "{}"}
        for i in range(60)
    ]
    plane = plane_of(ArrayView(dense, records=records))
    assert len(plane.points) == 30
    assert plane.rows == plane.of_rows == 60
    some = plane_of(ArrayView(dense, records=records), most=20)
    assert some.rows == 20
    figure, rows = figure_of(plane, "kind")
    assert [group["name"] for group in figure["groups"]][-1] == "all others"
    assert sum(len(group["x"]) for group in figure["groups"]) == len(rows) == 30


@pytest.mark.usefixtures("data_dir")
def test_labelled_questions_with_intervals_and_a_test(client: TestClient) -> None:
    given = {"data": "limit-small", "first": "dense", "second": "parts", "size": "20"}
    deadline = time.monotonic() + 60
    page = client.get("/app/compare/labelled", params=given, headers=HTMX).text
    while "hx-trigger" in page:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        page = client.get("/app/compare/labelled", params=given, headers=HTMX).text
    assert "20 of 1,000 questions chosen at random, 46 documents" in page
    assert "Holm-corrected over 3 tests" in page
    assert len(re.findall(r"\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", page)) == 10
    again = client.get("/app/compare/labelled", params=given, headers=HTMX).text
    assert again == page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": "secret"}, "limit-small"),
        ({"size": "5"}, "from 10 to 1000"),
        ({"second": "dense"}, "two different"),
        ({"first": "magic"}, "no strategy"),
    ],
)
def test_trials_that_cannot_be_run_are_refused(client: TestClient, change: dict[str, str], told: str) -> None:
    given = {"data": "limit-small", "first": "dense", "second": "parts", "size": "20", **change}
    answer = client.get("/app/compare/labelled", params=given, headers=HTMX)
    assert answer.status_code == 422
    assert told in html.unescape(answer.text)


def test_a_trial_that_fails_says_why_and_can_be_begun_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from polyhead.errors import DataNotFoundError
    from polyhead.evaluate import datasets

    def missing(_: str) -> None:
        raise DataNotFoundError("set POLYHEAD_DATA")

    monkeypatch.setattr(datasets, "load_retrieval", missing)
    given = {"data": "limit-small", "first": "dense", "second": "parts", "size": "30"}
    for _ in range(2):
        deadline = time.monotonic() + 20
        while "POLYHEAD_DATA" not in (page := client.get("/app/compare/labelled", params=given, headers=HTMX).text):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert 'role="alert"' in page


def test_empty_states_help(encoder: ServedEncoder, tmp_path: Path) -> None:
    with TestClient(create_app(Service(encoder))) as bare:  # type: ignore[arg-type]
        page = bare.get("/app/compare", headers=PAGE).text
        assert "polyhead serve --index DIR" in page
        assert "On labelled questions" in page
        assert bare.get("/app/compare/plane", headers=HTMX).status_code == 422
    with TestClient(create_app(Service(encoder, Index(tmp_path / "new")))) as client:  # type: ignore[arg-type]
        assert "The index is empty" in client.get("/app/compare", headers=PAGE).text
        client.post("/index", json={"documents": [{"id": "1", "text": "now there"}]})
        assert 'id="questions"' in client.get("/app/compare", headers=PAGE).text
        client.post("/index", json={"remove": ["1"]})
        assert "The index is empty" in client.get("/app/compare", headers=PAGE).text
