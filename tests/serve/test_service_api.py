from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from polyhead.search.index import Index
from polyhead.serve import KeyRing, RateLimit, Service, add_key, create_app, is_loopback
from tests.serve.conftest import ServedEncoder


def test_embeddings_are_the_encoders_in_order(client: TestClient, encoder: ServedEncoder) -> None:
    answer = client.post("/v1/embeddings", json={"input": ["one two", "three"], "model": "any"}).json()
    expected, _ = encoder._embed(["one two", "three"], False)
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert np.array_equal(np.array([item["embedding"] for item in answer["data"]], np.float32), expected)
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert answer["model"] == "fake"


def test_embeddings_of_one_text_of_token_ids_and_in_base64(client: TestClient, encoder: ServedEncoder) -> None:
    expected, _ = encoder._embed(["5 6"], False)
    for given in ("5 6", [5, 6], [[5, 6]]):
        answer = client.post("/v1/embeddings", json={"input": given, "encoding_format": "base64"}).json()
        packed = base64.b64decode(answer["data"][0]["embedding"])
        assert np.array_equal(np.frombuffer(packed, "<f4"), expected[0])


def test_fewer_dimensions_have_length_one_again(client: TestClient) -> None:
    whole = client.post("/v1/embeddings", json={"input": "one"}).json()["data"][0]["embedding"]
    short = client.post("/v1/embeddings", json={"input": "one", "dimensions": 6}).json()["data"][0]["embedding"]
    assert len(short) == 6
    assert np.allclose(short, np.array(whole[:6]) / np.linalg.norm(whole[:6]), atol=1e-6)
    refused = client.post("/v1/embeddings", json={"input": "one", "dimensions": 25})
    assert refused.status_code == 422
    assert "gives 24" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "no JSON"),
        (b"{}", 422, "input"),
        (b'{"input": []}', 422, "input"),
        (b'{"input": ""}', 422, "input"),
        (b'{"input": [1.5]}', 422, "input"),
        (b'{"input": "a", "encoding_format": "hex"}', 422, "encoding_format"),
        (json.dumps({"input": ["a"] * 51}).encode(), 422, "at most 50"),
        (json.dumps({"input": "a" * 2_001}).encode(), 422, "2,001 characters"),
        (b'{"input": "' + b"a" * 100_000 + b'"}', 413, "100,000 bytes"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client: TestClient, body: bytes, status: int, told: str) -> None:
    answer = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_a_body_sent_in_pieces_is_counted_too(client: TestClient) -> None:
    pieces = (b"x" * 10_000 for _ in range(11))
    assert client.post("/v1/embeddings", content=pieces).status_code == 413


def test_rerank_puts_the_matching_document_first(client: TestClient) -> None:
    documents = ["red green", {"text": "blue sky above"}, "blue"]
    for strategy in ("dense", "late", "both"):
        body = {"query": "blue sky", "documents": documents, "strategy": strategy, "return_documents": True}
        results = client.post("/v1/rerank", json=body).json()["results"]
        scores = [one["relevance_score"] for one in results]
        assert results[0]["index"] == 1
        assert results[0]["document"] == {"text": "blue sky above"}
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores)
    best = client.post("/v1/rerank", json={**body, "top_n": 1, "return_documents": False}).json()["results"]
    assert [set(one) for one in best] == [{"index", "relevance_score"}]


def documents(*numbers: int) -> list[dict[str, object]]:
    return [
        {"id": f"doc {i}", "text": f"subject{i} is what this text tells of", "attributes": {"year": 2000 + i}}
        for i in numbers
    ]


def test_documents_are_put_searched_changed_and_removed(client: TestClient) -> None:
    first = client.post("/index", json={"documents": documents(*range(8))}).json()
    assert (first["added"], first["total_chunks"]) == (8, 8)
    hit = client.post("/search", json={"query": "subject3", "k": 1, "strategy": "dense"}).json()["hits"][0]
    assert hit["document"] == "doc 3"
    assert "heads" not in hit
    filtered = client.post("/search", json={"query": "subject3", "where": "attributes.year > 2005"}).json()
    assert {one["document"] for one in filtered["hits"]} == {"doc 6", "doc 7"}
    changed = client.post(
        "/index", json={"documents": [{"id": "doc 3", "text": "otherwise"}], "remove": ["doc 4", "no"]}
    )
    assert {name: changed.json()[name] for name in ("added", "changed", "removed", "total_chunks")} == {
        "added": 0,
        "changed": 1,
        "removed": 1,
        "total_chunks": 7,
    }
    told = client.post("/search", json={"query": "otherwise", "strategy": "dense", "explain": True, "k": 1}).json()
    assert told["hits"][0]["text"] == "otherwise"
    assert told["hits"][0]["terms"]
    assert client.post("/index", json={"remove": ["doc 0"]}).json()["total_chunks"] == 6
    assert client.post("/index", json={}).status_code == 422


def test_posted_documents_outlive_an_update_from_files(tmp_path: Path, encoder: ServedEncoder) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_text("a file about subject9")
    index = Index(tmp_path / "index")
    service = Service(encoder, index)  # type: ignore[arg-type]
    with TestClient(create_app(service)) as client:
        client.post("/index", json={"documents": documents(1, 2)})
    report = index.update(folder, lambda: encoder)  # type: ignore[arg-type,return-value]
    assert (report.added, report.removed, report.total_chunks) == (1, 0, 3)
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("another")
    assert index.update(folder, lambda: encoder).total_chunks == 3  # type: ignore[arg-type,return-value]
    assert index.remove(["doc 1", "doc 1"]) == 1
    assert index.store.count() == 2


def test_the_same_document_again_encodes_nothing(client: TestClient, encoder: ServedEncoder) -> None:
    client.post("/index", json={"documents": documents(1, 2)})
    before = len(encoder.texts)
    again = client.post("/index", json={"documents": documents(1, 2)}).json()
    assert again["chunks"] == 0
    assert len(encoder.texts) == before


def test_filters_cannot_reach_beyond_their_language(client: TestClient) -> None:
    client.post("/index", json={"documents": documents(1, 2)})
    for where in ("1=1; DROP TABLE chunks", "id = 'x' OR read_file('/etc/passwd') = 'y'", "kind = 'a' UNION SELECT"):
        refused = client.post("/search", json={"query": "subject1", "where": where})
        assert refused.status_code == 422
        assert "filter" in refused.json()["message"]


def test_an_empty_index_and_none_at_all_are_told_apart(client: TestClient, encoder: ServedEncoder) -> None:
    assert "is empty" in client.post("/search", json={"query": "x"}).json()["message"]
    with TestClient(create_app(Service(encoder))) as bare:  # type: ignore[arg-type]
        assert "--index" in bare.post("/search", json={"query": "x"}).json()["message"]
        assert bare.get("/heads").json()["maps"] == []


def test_heads_health_ready_models_and_metrics(client: TestClient, service: Service) -> None:
    client.post("/index", json={"documents": documents(*range(20))})
    found = client.get("/heads").json()
    assert np.array(found["maps"][0]["values"]).shape == (2, 3)
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/ready").json()["status"] == "ready"
    assert client.get("/v1/models").json()["data"][0]["id"] == "fake"
    page = client.get("/metrics").text
    assert 'polyhead_requests_total{method="POST",route="/index",status="200"} 1.0' in page
    assert "polyhead_texts_total" in page
    service.ready = False
    assert client.get("/ready").status_code == 503
    assert client.get("/nothing").status_code == 404


def test_keys_are_asked_for_compared_and_limited(tmp_path: Path, encoder: ServedEncoder) -> None:
    file = tmp_path / "keys.json"
    free, slow = add_key(file, "free"), add_key(file, "slow", per_minute=2)
    assert free not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    with TestClient(create_app(Service(encoder), keys=KeyRing(file))) as client:  # type: ignore[arg-type]

        def ask(key: str | None) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return client.post("/v1/embeddings", json={"input": "a"}, headers=headers).status_code

        assert [ask(None), ask(free + "x"), ask(free)] == [401, 401, 200]
        assert [ask(slow), ask(slow), ask(slow), ask(free)] == [200, 200, 429, 200]
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 401


def test_a_browser_signs_in_with_a_key(tmp_path: Path, encoder: ServedEncoder) -> None:
    key = add_key(tmp_path / "keys.json", "person")
    app = create_app(Service(encoder), keys=KeyRing(tmp_path / "keys.json"))  # type: ignore[arg-type]
    with TestClient(app, headers={"accept": "text/html"}) as client:
        sent = client.get("/app/papers", follow_redirects=False)
        assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=/app/papers")
        assert client.get("/static/style.css").status_code == 200
        wrong = client.post("/login", data={"key": "ph-no", "next": "/app/papers"})
        assert wrong.status_code == 401
        assert "no key of this service" in wrong.text
        there = client.post("/login", data={"key": key, "next": "/app/papers"}, follow_redirects=False)
        assert there.headers["location"] == "/app/papers"
        assert "HttpOnly" in there.headers["set-cookie"]
        assert "SameSite=strict" in there.headers["set-cookie"]
        assert client.get("/app/papers", follow_redirects=False).status_code == 200
        for elsewhere in ("//evil.example", "https://evil.example", "/\\evil.example"):
            moved = client.post("/login", data={"key": key, "next": elsewhere}, follow_redirects=False)
            assert moved.headers["location"] == "/"


def test_rate_limits_fill_steadily() -> None:
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    assert [limit.take() for _ in range(60)] == [0.0] * 60
    assert limit.take() == pytest.approx(1.0)
    now[0] = 1.0
    assert limit.take() == 0.0


def test_other_hosts_are_refused_without_keys(client: TestClient) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")


def test_a_failure_inside_is_told_without_its_entrails(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"input": "poison"})
    assert answer.status_code == 500
    assert "poison" not in answer.json()["error"]["message"]
