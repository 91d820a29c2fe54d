from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import polyhead
from polyhead.act import Gate
from polyhead.errors import InputError
from polyhead.heads.attention_profile import attention_profile
from polyhead.search.index import Index
from polyhead.serve import Service, create_app
from polyhead.serve.pages.bench import MEASURES, Bench
from polyhead.serve.pages.headacts import gain_of
from polyhead.serve.pages.heads import TEXT, Look
from tests.serve.conftest import ServedEncoder
from tests.serve.tinysaved import FolderEncoder, save_decoder, save_encoder

PAGE = {"accept": "text/html"}
HTMX = {"HX-Request": "true"}
HOSTILE = "<script>alert('x')</script> river"
SAID = "the river rises in the hills"
DOCUMENTS = [{"id": f"d{i}", "text": f"word{i} {'river ' * i}", "title": f"Title {i}"} for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="module")
def looked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    service = Service(FolderEncoder(folder), Index(tmp_path_factory.mktemp("heads") / "index"))  # type: ignore[arg-type]
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.post("/index", json={"documents": DOCUMENTS}).raise_for_status()
        yield client


def figure(page: str) -> dict[str, Any]:
    found = re.search(r'data-plot="([^"]*)"', page)
    assert found
    return dict(json.loads(html.unescape(found.group(1))))


def numbers(page: str) -> list[float]:
    """Before, after and difference of the first line of a change."""
    return [float(found) for found in re.findall(r'<td class="number">([+-]?\d\.\d{4})</td>', page)[:3]]


def test_the_importance_of_the_index_is_shown_without_the_model(client: TestClient) -> None:
    client.post("/index", json={"documents": DOCUMENTS}).raise_for_status()
    page = client.get("/app/heads", headers=PAGE).text
    drawn = figure(page)
    assert drawn["y"] == ["4", "7"]
    assert drawn["z"] == [[round(v, 6) for v in row] for row in client.get("/heads").json()["maps"][0]["values"]]
    assert page.count("data-cell=") == 6
    assert 'aria-label="layer 7, head 2: ' in page
    assert 'aria-current="page"' in page


def test_a_model_that_cannot_be_loaded_is_told_beside_what_is_known(client: TestClient) -> None:
    client.post("/index", json={"documents": DOCUMENTS}).raise_for_status()
    part = client.get("/app/heads/7/2", headers=HTMX)
    assert part.status_code == 200
    assert re.search(
        r"importance in this index</th>\s*<td class=\"number\">[\d.e-]+</td><td class=\"number\">\d of 6", part.text
    )
    assert "cannot be loaded by that name" in part.text
    assert "Act on it" not in part.text
    for path in ("/app/heads/map?score=output-norm", "/app/heads/7/2/change?question=x", "/app/heads/9/9"):
        answer = client.get(path, headers=HTMX)
        assert answer.status_code == 422
        assert 'role="alert"' in answer.text
    page = client.get("/app/heads?score=output-norm", headers=PAGE)
    assert page.status_code == 422
    assert 'id="score"' in page.text


def test_without_an_index_a_score_of_attention_is_asked_for(folder: Path) -> None:
    with TestClient(create_app(Service(FolderEncoder(folder)))) as bare:  # type: ignore[arg-type]
        page = bare.get("/app/heads", headers=PAGE).text
        assert 'hx-trigger="load"' in page
        assert '<option value="importance"' not in page
        assert figure(bare.get("/app/heads/map", headers=HTMX).text)["y"] == ["0", "1"]
        refused = bare.get("/app/heads/map?score=importance", headers=HTMX)
        assert refused.status_code == 422
        asked = bare.get("/app/heads/0/1/change?question=river", headers=HTMX)
        assert "second text" in asked.text


@pytest.mark.parametrize("score", [name for name in MEASURES if name != "importance"])
def test_every_score_of_the_list_is_measured(looked: TestClient, score: str) -> None:
    answer = looked.get("/app/heads/map", params={"score": score, "texts": SAID}, headers=HTMX)
    assert answer.status_code == 200
    drawn = figure(answer.text)
    assert np.shape(drawn["z"]) == (2, 4)
    assert answer.headers["hx-replace-url"].startswith(f"/app/heads?score={score}")
    whole = looked.get(answer.headers["hx-replace-url"], headers=PAGE)
    assert figure(whole.text) == drawn


def test_a_map_is_what_the_library_measures(looked: TestClient, folder: Path) -> None:
    texts = (SAID, "who lives far , far in the hills")
    page = looked.get("/app/heads/map", params={"score": "attention-distance", "texts": "\r\n\n".join(texts)}).text
    expected = attention_profile(polyhead.load(str(folder)), texts)["distance"]
    assert np.allclose(figure(page)["z"], expected.values, atol=1e-6)
    assert "2 texts" in page


def test_a_heads_attention_is_the_recorded_one(looked: TestClient, folder: Path) -> None:
    page = looked.get("/app/heads/1/2", params={"text": SAID}, headers=HTMX).text
    model = polyhead.load(str(folder))
    with torch.inference_mode(), model.record("attention") as recording:
        model(**model.tokenize([SAID]))
    shown = np.array([float(one) for one in re.findall(r'data-weight="([\d.]+)"', page)])
    assert np.allclose(shown, recording.attention[0, 1, 2].flatten().numpy(), atol=1e-4)
    assert re.findall(r'data-row="\d+" aria-label="(\S+) attends', page) == ["[CLS]", *SAID.split(), "[SEP]"]
    assert page.count(" of 8</td>") >= 8
    assert "Mask it" in page


def test_long_texts_are_cut_and_say_so(looked: TestClient) -> None:
    page = looked.get("/app/heads/0/0", params={"text": "river " * 100}, headers=HTMX).text
    assert "The first 64 tokens are looked at; 38 more are left out." in page
    for given in ({"text": "x" * 4001}, {"texts": "river\n" * 33}):
        answer = looked.get("/app/heads/0/0", params=given, headers=HTMX)
        assert answer.status_code == 422
        assert "at most" in answer.text


def test_hostile_texts_are_shown_as_texts(looked: TestClient) -> None:
    for path in ("/app/heads", "/app/heads/0/0", "/app/heads/map"):
        page = looked.get(path, params={"text": HOSTILE, "texts": HOSTILE, "layer": "0", "head": "1"}).text
        assert "<script>alert" not in page


def test_masking_changes_the_similarity_of_two_texts(looked: TestClient, folder: Path) -> None:
    texts = ["the river rises", "who lives in the hills"]
    given = {"question": texts[0], "other": texts[1]}
    page = looked.get("/app/heads/0/3/change", params={**given, "mask": "1", "gain": "1.5"}, headers=HTMX).text
    model = polyhead.load(str(folder))

    def cosine() -> float:
        inputs = model.tokenize(texts)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0))

    with torch.inference_mode():
        before = cosine()
        with Gate.off([(0, 3)], model).on(model):
            after = cosine()
    assert abs(before - after) > 1e-3
    assert numbers(page) == pytest.approx([before, after, after - before], abs=2e-4)
    assert "head 3 masked" in page
    left = looked.get("/app/heads/0/3/change", params={**given, "gain": "1"}, headers=HTMX).text
    assert numbers(left)[2] == 0


def test_masking_changes_what_the_index_answers(looked: TestClient) -> None:
    page = looked.get("/app/heads/0/3/change", params={"question": SAID, "gain": "2"}, headers=HTMX).text
    assert page.count("<li>Title") == 20
    assert "times 2.0" in page
    assert numbers(page)[1] < 1
    same = looked.get("/app/heads/0/3/change", params={"question": SAID, "gain": "1"}, headers=HTMX).text
    before, after = same.split("<h4>After</h4>")
    assert re.findall(r"Title \d+", before) == re.findall(r"Title \d+", after)


def test_a_decoder_shows_its_next_tokens(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "decoder")
    with TestClient(create_app(Service(FolderEncoder(folder)))) as client:  # type: ignore[arg-type]
        assert "Text to go on from" in client.get("/app/heads/1/0", params={"text": SAID}, headers=HTMX).text
        page = client.get("/app/heads/1/0/change", params={"question": SAID, "mask": "1"}, headers=HTMX).text
        assert page.count("<li>") == 20
        before, after, difference = numbers(page)
        assert 0 < after < 1
        assert difference == pytest.approx(after - before, abs=2e-4)
        assert difference != 0


@pytest.mark.parametrize("gain", ["-0.1", "2.1", "nan", "inf", "much", ""])
def test_factors_outside_the_range_are_refused(looked: TestClient, gain: str) -> None:
    with pytest.raises(InputError, match="from 0"):
        gain_of(gain)
    answer = looked.get("/app/heads/0/0/change", params={"question": "river", "gain": gain}, headers=HTMX)
    assert answer.status_code == 422


def test_heads_that_are_not_there_are_refused(looked: TestClient) -> None:
    for path in ("/app/heads/2/0", "/app/heads/0/4", "/app/heads/0/4/change?question=river", "/app/heads/0/x"):
        assert looked.get(path, headers=HTMX).status_code == 422
    for query in ("layer=0", "layer=x&head=1", "layer=0&head=4"):
        answer = looked.get(f"/app/heads?{query}", headers=PAGE)
        assert answer.status_code == 422
        assert 'id="score"' in answer.text
    assert looked.get("/app/heads/0/0/change?question=+", headers=HTMX).status_code == 422
    assert looked.get("/app/heads/map?score=magic", headers=HTMX).status_code == 422


def test_the_address_keeps_what_was_typed() -> None:
    look = Look.read({"score": "output-norm", "text": "a & b", "texts": "x\r\ny", "layer": "1", "head": "0"})
    assert look.lines == ("x", "y")
    assert look.place == (1, 0)
    assert look.address == "/app/heads?score=output-norm&texts=x%0Ay&layer=1&head=0&text=a+%26+b"
    assert Look.read({}).address == "/app/heads"
    assert Look().at(3, 4) == "/app/heads?layer=3&head=4#head"


def test_the_bench_keeps_only_so_many_maps(folder: Path) -> None:
    bench = Bench(Service(FolderEncoder(folder)))  # type: ignore[arg-type]
    for number in range(9):
        bench.map("attention-same", (f"river {'sea ' * number}",))
    assert len(bench._maps) == 64
    ranked = bench.at_hand(("river " + "sea " * 8,))
    assert len(ranked) == 8
    places = [ranked[0].place(layer, head) for layer in range(2) for head in range(4)]
    assert sorted(place.rank for place in places if place) == list(range(1, 9))
    assert ranked[0].place(2, 0) is ranked[0].place(0, 4) is None


@pytest.mark.real_model
def test_a_head_of_the_real_model(minilm_path: str) -> None:
    encoder = ServedEncoder(name=minilm_path)
    with TestClient(create_app(Service(encoder))) as client:  # type: ignore[arg-type]
        page = client.get("/app/heads/5/3", params={"text": TEXT}, headers=HTMX).text
        assert "river attends most to" in page
        given = {"question": "A river.", "other": "A stream of water.", "mask": "1"}
        before, after, _ = numbers(client.get("/app/heads/5/3/change", params=given, headers=HTMX).text)
    from polyhead.embed import Encoder

    dense = Encoder(minilm_path, backend="torch").encode([given["question"], given["other"]]).dense
    assert before == pytest.approx(float(dense[0] @ dense[1]), abs=2e-4)
    assert before != after
