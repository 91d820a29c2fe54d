"""The clients that others use, against a running service."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyhead.errors import PolyheadError
from polyhead.search.index import Index
from polyhead.search.posted import Posted
from polyhead.serve import Limits, Service, create_app
from tests.serve.conftest import ServedEncoder
from tests.serve.running import running


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    encoder = ServedEncoder(pause=0.0)
    index = Index(tmp_path_factory.mktemp("served") / "index")
    index.put([Posted(f"doc {i}", f"subject{i} tells of things") for i in range(6)], lambda: encoder)  # type: ignore[arg-type,return-value]
    with running(create_app(Service(encoder, index, limits=Limits(inputs=300)))) as url:  # type: ignore[arg-type]
        yield url


def test_the_openai_package_works_unchanged(address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    answer = client.embeddings.create(input=["one", "two words"], model="fake")
    expected, _ = ServedEncoder()._embed(["one", "two words"], False)
    assert np.allclose([item.embedding for item in answer.data], expected)
    assert answer.usage.total_tokens == 7
    assert len(client.embeddings.create(input="one", model="fake", dimensions=5).data[0].embedding) == 5
    assert [model.id for model in client.models.list()] == ["fake"]
    with pytest.raises(openai.UnprocessableEntityError, match="at most that"):
        client.embeddings.create(input="one", model="fake", dimensions=500)


def test_many_clients_get_their_own_answers(address: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    wrong: list[int] = []

    def ask(number: int) -> None:
        texts = [f"text {number} {i}" for i in range(number % 5 + 1)]
        found = [item.embedding for item in client.embeddings.create(input=texts, model="fake").data]
        if not np.allclose(found, ServedEncoder()._embed(texts, False)[0]):
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_langchain_retrieves(address: str) -> None:
    pytest.importorskip("langchain_core")
    from polyhead.integrations.langchain import PolyheadRetriever

    found = PolyheadRetriever(url=address, k=2, strategy="dense").invoke("subject4")
    assert len(found) == 2
    assert (found[0].id, found[0].page_content) == ("doc 4", "subject4 tells of things")
    assert found[0].metadata["kind"] == "text"
    with pytest.raises(ValueError, match="either index"):
        PolyheadRetriever()
    with pytest.raises(PolyheadError, match="answered 422"):
        PolyheadRetriever(url=address, where="nothing").invoke("x")
    with pytest.raises(PolyheadError, match="cannot be reached"):
        PolyheadRetriever(url="http://127.0.0.1:9").invoke("x")


def test_llama_index_retrieves(address: str) -> None:
    pytest.importorskip("llama_index.core")
    from polyhead.integrations.llama_index import PolyheadRetriever

    found = PolyheadRetriever(url=address, k=1, strategy="dense").retrieve("subject2")
    assert found[0].node.text == "subject2 tells of things"
    assert found[0].score == pytest.approx(found[0].node.metadata["score"])


@pytest.mark.real_model
def test_retrievers_open_an_index_by_themselves(tmp_path: Path) -> None:
    pytest.importorskip("langchain_core")
    from polyhead.embed import Encoder
    from polyhead.integrations.langchain import PolyheadRetriever

    Index(tmp_path / "i").put(
        [Posted("bread", "how to bake bread"), Posted("cars", "repairing an engine")], lambda: Encoder(backend="torch")
    )
    assert PolyheadRetriever(index=str(tmp_path / "i"), k=1).invoke("sourdough loaf")[0].id == "posted:bread"


def test_the_schema_holds_under_what_schemathesis_sends(tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    encoder = ServedEncoder()
    service = Service(encoder, Index(tmp_path / "index"))  # type: ignore[arg-type]
    service.index.put([Posted("a", "some text")], lambda: encoder)  # type: ignore[union-attr,arg-type,return-value]
    app = create_app(service)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/embeddings", "/v1/rerank", "/search", "/index"}

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        operation = data.draw(st.sampled_from(operations))
        case = data.draw(operation.as_strategy())
        # A filter that is a string may still be none of the filter language, which JSON Schema cannot say.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
    service.close()
