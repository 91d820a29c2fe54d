"""Late interaction: MaxSim and MUVERA against their definitions and peers, and token vectors that outlive a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from search.fake_encoder import FakeEncoder
from typer.testing import CliRunner

from polyhead.cli.app import app
from polyhead.embed.tokens import TokenVectors
from polyhead.errors import IndexMismatchError, InputError
from polyhead.evaluate.datasets import RetrievalData
from polyhead.evaluate.run import rank_all
from polyhead.search.engine import search_index
from polyhead.search.index import Index
from polyhead.search.late import FDEEncoder, MuveraIndex, best_matches, maxsim, store
from polyhead.search.late.words import token_text
from polyhead.search.strategies import Late, strategy


def ragged(lengths: list[int], dim: int = 12, seed: int = 0) -> TokenVectors:
    generator = np.random.default_rng(seed)
    texts = [generator.standard_normal((n, dim)).astype(np.float32) for n in lengths]
    return TokenVectors.of([t / np.linalg.norm(t, axis=1, keepdims=True) for t in texts])


DOCUMENTS = ragged([3, 7, 1, 12, 5, 9, 2, 30])
QUERY = ragged([6], seed=1)[0]


def maxsim64(query: np.ndarray, document: np.ndarray) -> float:
    return sum(max(float(q.astype(np.float64) @ p.astype(np.float64)) for p in document) for q in query)


def test_maxsim_is_its_definition_in_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [maxsim64(QUERY, document) for document in DOCUMENTS]
    for size in (1 << 22, 60, 1):
        monkeypatch.setattr("polyhead.search.late.scoring.SCORES_AT_ONCE", size)
        np.testing.assert_allclose(maxsim(QUERY, DOCUMENTS), expected, rtol=1e-5)
    half = TokenVectors(DOCUMENTS.vectors.astype(np.float16), DOCUMENTS.offsets)
    np.testing.assert_allclose(maxsim(QUERY, half), expected, atol=5e-3)


def test_maxsim_is_that_of_sentence_transformers() -> None:
    import torch
    from sentence_transformers.util import maxsim as peer

    theirs = peer([torch.from_numpy(QUERY)], [torch.from_numpy(document) for document in DOCUMENTS])
    np.testing.assert_allclose(maxsim(QUERY, DOCUMENTS), theirs[0].numpy(), atol=1e-5)


def test_a_document_without_tokens_comes_last_and_a_question_without_is_refused() -> None:
    some = TokenVectors.of([DOCUMENTS[0], np.zeros((0, 12), np.float32), DOCUMENTS[1], np.zeros((0, 12), np.float32)])
    scores = maxsim(QUERY, some)
    assert np.isneginf(scores[[1, 3]]).all()
    np.testing.assert_allclose(scores[[0, 2]], maxsim(QUERY, DOCUMENTS)[:2], rtol=1e-6)
    with pytest.raises(InputError, match="at least one token"):
        maxsim(np.zeros((0, 12), np.float32), DOCUMENTS)
    with pytest.raises(InputError, match="rising offsets"):
        TokenVectors(DOCUMENTS.vectors, np.array([0, 2]))


def test_matches_are_the_summands() -> None:
    met, similarity = best_matches(QUERY, DOCUMENTS[3])
    assert met.tolist() == (QUERY.astype(np.float64) @ DOCUMENTS[3].T).argmax(1).tolist()
    assert similarity.sum() == pytest.approx(maxsim64(QUERY, DOCUMENTS[3]), rel=1e-5)


def encoding64(encoder: FDEEncoder, tokens: np.ndarray, document: bool) -> np.ndarray:
    """The encoding of one text from the paper's definition, token by token."""
    blocks = []
    for planes, signs in zip(encoder.planes, encoder.signs, strict=True):
        bits = [tuple(int(x @ plane > 0) for plane in planes.T) for x in tokens]
        for number in range(2**encoder.k_sim):
            bucket = tuple(number >> bit & 1 for bit in range(encoder.k_sim))
            inside = [x.astype(np.float64) for x, of in zip(tokens, bits, strict=True) if of == bucket]
            if inside:
                block = np.mean(inside, 0) if document else np.sum(inside, 0)
            elif document and encoder.fill_empty:
                distances = [sum(a != b for a, b in zip(of, bucket, strict=True)) for of in bits]
                numbers = [sum(b << at for at, b in enumerate(of)) for of in bits]
                nearest = min(range(len(tokens)), key=lambda at: (distances[at], numbers[at], at))
                block = tokens[nearest].astype(np.float64)
            else:
                block = np.zeros(encoder.dim)
            blocks.append(block @ signs.astype(np.float64) / np.sqrt(signs.shape[1]))
    return np.concatenate(blocks)


@pytest.mark.parametrize("fill", [True, False])
def test_encodings_are_their_definition(fill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FDEEncoder(12, k_sim=3, r_reps=3, d_proj=4, fill_empty=fill, seed=3)
    monkeypatch.setattr("polyhead.search.late.muvera.TOKENS_AT_ONCE", 20)
    for document, found in ((True, encoder.encode_documents(DOCUMENTS)), (False, encoder.encode_queries(DOCUMENTS))):
        expected = [encoding64(encoder, text, document) for text in DOCUMENTS]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_encodings_are_those_of_fastembed() -> None:
    peer = pytest.importorskip("fastembed.postprocess").Muvera(12, k_sim=3, dim_proj=4, r_reps=5)
    ours = FDEEncoder(12, k_sim=3, d_proj=4, r_reps=5)
    for hashes, planes in zip(peer.simhash_projections, ours.planes, strict=True):
        hashes.simhash_vectors = planes
    peer.dim_reduction_projections = ours.signs
    np.testing.assert_allclose(
        ours.encode_documents(DOCUMENTS), [peer.process_document(text) for text in DOCUMENTS], atol=1e-5
    )
    np.testing.assert_allclose(
        ours.encode_queries(DOCUMENTS), [peer.process_query(text) for text in DOCUMENTS], atol=1e-5
    )


def test_encodings_without_projection_never_exceed_maxsim_and_one_bucket_is_sum_times_mean() -> None:
    encoder = FDEEncoder(12, k_sim=3, r_reps=8, d_proj=None)
    query = TokenVectors.of([QUERY])
    estimate = encoder.encode_documents(DOCUMENTS) @ encoder.encode_queries(query)[0] / encoder.r_reps
    exact = maxsim(QUERY, DOCUMENTS)
    assert (estimate <= exact + 1e-5).all()
    assert (estimate > exact - 2 * len(QUERY)).all()
    one = FDEEncoder(12, k_sim=0, r_reps=1, d_proj=None)
    product = one.encode_documents(DOCUMENTS) @ one.encode_queries(query)[0]
    np.testing.assert_allclose(product, [QUERY.sum(0) @ text.mean(0) for text in DOCUMENTS], atol=1e-5)


def test_a_fitted_encoding_carries_each_documents_mean_shortfall() -> None:
    encoder = FDEEncoder(12, k_sim=2, r_reps=4, d_proj=6, seed=2)
    plain = encoder.encode_documents(DOCUMENTS)
    encoder.fit(ragged([400], seed=9)[0], count=50)
    assert encoder.sample_ is not None
    assert encoder.sample_.shape == (50, 12)
    fitted, query = encoder.encode_documents(DOCUMENTS), encoder.encode_queries(TokenVectors.of([QUERY, QUERY[:2]]))
    np.testing.assert_allclose(fitted[:, :-1], plain, rtol=1e-6)
    assert query[:, -1].tolist() == [24.0, 8.0]
    for text, row, of in zip(DOCUMENTS, fitted, plain, strict=True):
        gaps = [
            maxsim64(token[None], text) - encoding64(encoder, token[None], False) @ of.astype(np.float64) / 4
            for token in encoder.sample_
        ]
        assert row[-1] == pytest.approx(np.mean(gaps), abs=1e-5)
    with pytest.raises(InputError, match="sample of"):
        encoder.fit(np.zeros((0, 12)))


def test_the_final_projection_keeps_inner_products_on_average() -> None:
    query = TokenVectors.of([QUERY])
    plain = FDEEncoder(12, k_sim=2, r_reps=4, d_proj=None)
    exact = plain.encode_documents(DOCUMENTS) @ plain.encode_queries(query)[0]
    found = []
    for seed in range(40):
        encoder = FDEEncoder(12, k_sim=2, r_reps=4, d_proj=None, final_dim=64, seed=seed)
        encoder.planes = plain.planes
        assert encoder.encode_documents(DOCUMENTS).shape == (8, 64)
        found.append(encoder.encode_documents(DOCUMENTS) @ encoder.encode_queries(query)[0])
    error = np.abs(np.mean(found, 0) - exact)
    assert (error < 4 * np.std(found, 0) / np.sqrt(40) + 1e-6).all()


def test_two_stages_give_the_exact_order_of_the_candidates() -> None:
    documents = ragged([8] * 60, seed=5)
    # The question's tokens are a document's, slightly moved: encodings must find that document.
    query = documents[17][:5] + 0.02
    index = MuveraIndex(FDEEncoder(12, k_sim=3, d_proj=8), documents)
    rows, scores = index.search(query, k=5, candidates=60)
    exact = maxsim(query, documents)
    assert rows.tolist() == np.argsort(-exact)[:5].tolist()
    np.testing.assert_allclose(scores, exact[rows], rtol=1e-6)
    assert index.search(query, k=1, candidates=5)[0].tolist() == [17]
    with pytest.raises(InputError, match="candidates"):
        index.search(query, k=5, candidates=2)


# In an index -------------------------------------------------------------------------------------------------------

WORDS = ["river", "iron", "bridge", "market", "lantern", "harvest", "copper", "violin", "meadow", "engine"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "docs"
    target.mkdir()
    for number, pair in enumerate(itertools.combinations(WORDS, 2)):
        (target / f"{number:02}.txt").write_text(f"the {pair[0]} and a {pair[1]}", encoding="utf-8")
    past = time.time_ns() - 10**10
    for path in target.iterdir():
        os.utime(path, ns=(past, past))
    return target


def test_late_search_finds_by_words_and_says_which_met(folder: Path, tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    encoder = FakeEncoder()
    index.update(folder, lambda: encoder)
    assert encoder.token_texts == []
    assert not index.tokens.exists()
    with pytest.raises(InputError, match=r"no token vectors.*--tokens"):
        search_index(index, "copper violin", encoder, by="late", update_tokens=False)
    result = search_index(index, "Violin copper", encoder, by="late", k=2)
    assert result.hits[0].text == "the copper and a violin"
    assert [(word.query, word.document) for word in result.hits[0].words][-1] == ("copper", "copper")
    assert result.hits[0].words[-1].similarity == pytest.approx(1.0, abs=2e-3)
    assert "45 candidates" in result.decision
    assert result.to_json()["hits"][0]["words"][-1]["document"] == "copper"
    narrow = search_index(index, "copper violin", encoder, by=Late(candidates=10), k=2)
    assert narrow.hits[0].text == "the copper and a violin"
    filtered = search_index(index, "copper violin", encoder, by="late", k=3, where="path <> '42.txt'")
    assert len({hit.path for hit in filtered.hits} - {"42.txt"}) == 3


def test_the_command_line_makes_them_once_and_tells_which_words_met(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FakeEncoder()
    monkeypatch.setattr("polyhead.embed.Encoder", lambda *_, **__: encoder)
    runner, where = CliRunner(), ["--index", str(tmp_path / "index")]
    first = runner.invoke(app, ["search", str(folder), "copper violin", "--strategy", "late", "--explain", *where])
    assert first.exit_code == 0, first.output
    assert "a vector of every token of 45 chunks, once" in " ".join(first.stderr.split())
    assert "copper → copper 1.00" in first.stdout
    again = runner.invoke(app, ["search", str(folder), "copper violin", "--strategy", "late", "--json", *where])
    assert "every token" not in again.stderr
    assert [word["document"] for word in json.loads(again.stdout)["hits"][0]["words"]] == ["copper", "violin"]
    done = runner.invoke(app, ["index", str(folder), "--tokens", "--json", *where])
    assert json.loads(done.stdout)["tokens"] == {"encoded": 0, "removed": 0, "total": 45}


def test_an_evaluation_takes_late_where_it_is_named() -> None:
    corpus = {"a": "the copper and a violin", "b": "an iron bridge", "c": "the violin alone"}
    data = RetrievalData("toy", corpus, {"1": "copper violin"}, {"1": {"a": 1}})
    runs = rank_all(data, FakeEncoder(), [strategy("late"), strategy("dense")])  # type: ignore[arg-type]
    assert runs["late"]["1"][0] == ("a", pytest.approx(2.0, abs=1e-3))
    assert [name for name, _ in runs["late"]["1"]] == ["a", "c", "b"]


def test_token_vectors_follow_the_files(folder: Path, tmp_path: Path) -> None:
    index, encoder = Index(tmp_path / "index"), FakeEncoder()
    index.update(folder, lambda: encoder)
    assert vars(index.update_tokens(encoder)) == {"encoded": 45, "removed": 0, "total": 45}
    encoder.token_texts.clear()
    assert index.update_tokens(encoder).encoded == 0
    (folder / "00.txt").write_text("a signal in the harbour", encoding="utf-8")
    (folder / "01.txt").unlink()
    (folder / "new.txt").write_text("an orchard in winter", encoding="utf-8")
    index.update(folder, lambda: encoder)
    stale = search_index(index, "orchard", encoder, by="late", update_tokens=False)
    assert "2 chunks have no token vectors" in stale.decision
    assert "new.txt" not in {hit.path for hit in stale.hits}
    encoder.token_texts.clear()
    report = Index.open(index.uri).update_tokens(encoder)
    assert (report.encoded, report.removed, report.total) == (2, 1, 45)
    assert sorted(text.splitlines()[-1] for text in encoder.token_texts) == [
        "a signal in the harbour",
        "an orchard in winter",
    ]
    assert search_index(index, "orchard", encoder, by="late", k=1).hits[0].path == "new.txt"
    with pytest.raises(IndexMismatchError, match="cannot be compared"):
        index.update_tokens(FakeEncoder(seed=4))
    # Rebuilt with another model, the old vectors do not count.
    other = FakeEncoder(seed=4)
    index.update(folder, lambda: other, rebuild=True)
    assert not index.tokens.exists()
    assert index.update_tokens(other).encoded == 45
    assert search_index(index, "orchard", other, by="late", k=1).hits[0].path == "new.txt"


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_kept_vectors_are_the_encoders(
    folder: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, encoder = Index(tmp_path / "index"), FakeEncoder()
    index.update(folder, lambda: encoder)
    with pytest.raises(InputError, match="expected 'float16' or 'int8'"):
        index.update_tokens(encoder, precision="int4")  # type: ignore[arg-type]
    index.update_tokens(encoder, precision=precision)  # type: ignore[arg-type]
    view = index.view()
    late = index.tokens.view(view)
    rows = np.array([7, 3, 3, 40])
    found = late.tokens(rows)
    texts = [token_text(row["title"], row["start"], row["text"]) for row in view.fetch(rows)]
    expected = encoder.encode_tokens(texts)
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert found.spans is not None
    assert found.spans.tolist() == expected.spans.tolist()  # type: ignore[union-attr]
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-3 if precision == "float16" else 5e-3)
    # In memory or batch by batch from disk, the same rows are nearest.
    encoding = late.encoder.encode_queries(encoder.encode_tokens(["copper violin"]))[0]
    in_memory = late.nearest(encoding, 6)
    monkeypatch.setattr(store, "MEMORY_BYTES", 0)
    on_disk = index.tokens.view(index.view("path > '10.txt'"))
    assert "on disk" in on_disk.plan
    assert set(index.tokens.view(index.view()).nearest(encoding, 6)[0]) == set(in_memory[0])
    others = index.view("path > '10.txt'").fetch(np.arange(34))
    everything = encoder.encode_tokens([token_text(row["title"], row["start"], row["text"]) for row in others])
    estimates = late.encoder.encode_documents(everything) @ encoding
    assert on_disk.nearest(encoding, 4)[1] == pytest.approx(np.sort(estimates)[::-1][:4], abs=0.05)


def test_a_killed_build_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    index, encoder = Index(tmp_path / "index"), FakeEncoder()
    index.update(folder, lambda: encoder)
    script = """
        import sys, time
        sys.path.insert(0, sys.argv[2])
        from search.fake_encoder import FakeEncoder
        from polyhead.search.index import Index
        from polyhead.search.late import store
        store.BATCH_ROWS = 5
        done = lambda done, total: (print(done, flush=True), time.sleep(0.05))
        Index.open(sys.argv[1]).update_tokens(FakeEncoder(), progress=done)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), index.uri, str(Path(__file__).parents[1])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    again = Index.open(index.uri)
    report = again.update_tokens(encoder)
    assert 0 < report.encoded <= 30
    assert report.total == 45
    assert search_index(again, "copper violin", encoder, by="late", k=1).hits[0].text == "the copper and a violin"
