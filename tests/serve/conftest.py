"""A service over an encoder without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from starlette.testclient import TestClient

from polyhead.embed import Embeddings
from polyhead.search.index import Index
from polyhead.serve import Limits, Service, create_app
from tests.search.fake_encoder import FakeEncoder


class ServedEncoder(FakeEncoder):
    """:class:`FakeEncoder` with what the service asks of an encoder too; notes the size of every pass."""

    prompts: ClassVar[dict[str, str]] = {}

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.passes: list[int] = []

    def encode(self, texts: list[str], *, heads: bool = False, **_: object) -> Embeddings:
        self.passes.append(len(texts))
        if any("poison" in text for text in texts):
            raise RuntimeError("poison")
        return Embeddings(*self._embed(texts, heads))

    def encode_token_ids(self, ids: list[list[int]], *, heads: bool = False, **_: object) -> Embeddings:
        return self.encode([" ".join(map(str, each)) for each in ids], heads=heads)

    def tokens(self, text: str) -> np.ndarray:
        return np.arange(len(text.split()) + 2)


@pytest.fixture
def encoder() -> ServedEncoder:
    return ServedEncoder()


@pytest.fixture
def service(encoder: ServedEncoder, tmp_path: Path) -> Service:
    limits = Limits(body_bytes=100_000, inputs=50, characters=2_000, documents=20, hits=50, waiting=100)
    return Service(encoder, Index(tmp_path / "index"), limits=limits)  # type: ignore[arg-type]


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client
