"""What goes wrong around a service, and that nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from polyhead.search.index import Index
from polyhead.search.posted import Posted
from polyhead.serve import Service, create_app
from tests.serve.conftest import ServedEncoder
from tests.serve.running import running

SERVER = """
import sys
import uvicorn
from polyhead.search.index import Index
from polyhead.serve import Service, create_app
from tests.serve.conftest import ServedEncoder
service = Service(ServedEncoder(), Index(sys.argv[1]))
uvicorn.run(create_app(service), port=int(sys.argv[2]), log_level="error")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(index: Path) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(index), str(port)], env=environment)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2):
                return process, url
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError("the service did not start")


def post(url: str, body: object) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.parametrize(("how", "seed"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_what_was_acknowledged_outlives_a_kill_under_write_load(tmp_path: Path, how: int, seed: int) -> None:
    process, url = started(tmp_path / "index")
    acknowledged: list[str] = []
    sent: list[str] = []

    def write(name: str) -> None:
        for number in range(1000):
            one = f"{name} {number}"
            sent.append(one)
            try:
                post(f"{url}/index", {"documents": [{"id": one, "text": f"text of {one}"}]})
            except (OSError, urllib.error.HTTPError):
                return
            acknowledged.append(one)

    writers = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    while len(acknowledged) < 6:
        time.sleep(0.01)
    time.sleep(random.Random(seed).random())
    process.send_signal(how)
    process.wait(60)
    for writer in writers:
        writer.join(60)
    there = {
        row["doc_id"].removeprefix("posted:")
        for row in Index.open(tmp_path / "index").store.rows(["doc_id"]).to_pylist()
    }
    assert set(acknowledged) <= there <= set(sent)
    again, url = started(tmp_path / "index")
    post(f"{url}/index", {"documents": [{"id": "after", "text": "goes on"}]})
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) in (0, -signal.SIGTERM)


def test_a_full_disk_is_told_and_what_was_there_stays(
    tmp_path: Path, encoder: ServedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path / "index")
    index.put([Posted("old", "the old one")], lambda: encoder)  # type: ignore[arg-type,return-value]
    with TestClient(create_app(Service(encoder, index)), raise_server_exceptions=False) as client:  # type: ignore[arg-type]

        class Full:
            def __getattr__(self, name: str) -> Callable[..., Full]:
                if name == "execute":
                    raise OSError(28, "No space left on device")
                return lambda *_: self

        with monkeypatch.context() as patched:
            patched.setattr(index.store._chunks, "merge_insert", lambda key: Full())
            answer = client.post("/index", json={"documents": [{"id": "new", "text": "no room"}]})
            assert answer.status_code == 507
            assert "space" in answer.json()["message"]
        found = client.post("/search", json={"query": "old", "strategy": "dense"}).json()
        assert [hit["document"] for hit in found["hits"]] == ["old"]
        assert client.post("/index", json={"documents": [{"id": "new", "text": "room now"}]}).json()["added"] == 1


def test_a_damaged_index_is_told_and_the_rest_still_serves(tmp_path: Path, encoder: ServedEncoder) -> None:
    Index(tmp_path / "index").put([Posted("a", "text")], lambda: encoder)  # type: ignore[arg-type,return-value]
    service = Service(encoder, Index(tmp_path / "index"))  # type: ignore[arg-type]
    for folder in (tmp_path / "index" / "chunks.lance" / "data").iterdir():
        folder.write_bytes(b"not lance")
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        answer = client.post("/search", json={"query": "text"})
        assert answer.status_code == 507
        assert str(tmp_path / "index") in answer.json()["message"]
        assert client.post("/v1/embeddings", json={"input": "still"}).status_code == 200
    shutil.rmtree(tmp_path / "index")


def test_a_thousand_connections_at_once_are_all_answered(encoder: ServedEncoder) -> None:
    with running(create_app(Service(encoder))) as url:  # type: ignore[arg-type]
        port = int(url.rpartition(":")[2])
        body = b'{"input": "one"}'
        fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        head = f"POST /v1/embeddings HTTP/1.1\r\n{fields}\r\nconnection: close\r\n\r\n"
        sockets = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(1000)]
        for one in sockets:
            one.sendall(head.encode() + body)
        statuses = []
        for one in sockets:
            answer = b""
            while piece := one.recv(65536):
                answer += piece
            statuses.append(int(answer.split(b" ", 2)[1]))
            one.close()
        assert set(statuses) == {200}


def test_ten_megabytes_and_broken_json_are_refused(encoder: ServedEncoder) -> None:
    with TestClient(create_app(Service(encoder)), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        large = client.post("/v1/embeddings", json={"input": "a" * (10 << 20)})
        assert large.status_code == 413
        broken = client.post("/search", content=b'{"query": "a', headers={"content-type": "application/json"})
        assert broken.status_code == 400
        surrogate = client.post(
            "/search", content=b'{"query": "\\ud800"}', headers={"content-type": "application/json"}
        )
        assert surrogate.status_code == 422
        assert client.post("/v1/embeddings", json={"input": "fine"}).status_code == 200
