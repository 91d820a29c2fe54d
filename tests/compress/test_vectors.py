"""Codes equal sentence-transformers' values, product quantisation FAISS's recall; rescoring by definition."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from polyhead.compress import BinaryQuantizer, Int8Quantizer, ProductQuantizer, Quantizer, compress_vectors
from polyhead.errors import InputError


def clustered(n: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors of length 1 around 60 directions, as texts of topics are."""
    generator = np.random.default_rng(seed)
    topics = np.random.default_rng(99).normal(size=(60, dim))
    vectors = topics[generator.integers(0, 60, n)] + 0.7 * generator.normal(size=(n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


DOCS, QUERIES = clustered(3000), clustered(100, seed=1)


def recall(rows: np.ndarray, k: int = 10) -> float:
    exact = np.argsort(-(QUERIES @ DOCS.T), axis=1)[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(rows, exact, strict=True)]))


def test_int8_and_binary_codes_are_those_of_sentence_transformers() -> None:
    ranges = np.stack([DOCS[:2000].min(0), DOCS[:2000].max(0)])
    theirs = quantize_embeddings(DOCS, precision="int8", ranges=ranges)
    assert np.array_equal(Int8Quantizer().fit(DOCS[:2000]).encode(DOCS), theirs)
    odd = DOCS[:, :13]
    for vectors in (DOCS, odd):
        theirs = quantize_embeddings(vectors, precision="ubinary")
        assert np.array_equal(BinaryQuantizer().fit(vectors).encode(vectors), theirs)


def test_int8_is_within_half_a_step_and_scores_are_those_of_decoded_vectors() -> None:
    constant = np.concatenate([DOCS, np.full((len(DOCS), 1), 0.25, np.float32)], 1)
    quantizer = Int8Quantizer().fit(constant)
    codes = quantizer.encode(constant)
    assert codes.dtype == np.int8
    error = np.abs(quantizer.decode(codes) - constant)[:, :-1]
    step = (constant.max(0) - constant.min(0))[:-1].astype(np.float64) / 255
    assert (error <= step * 0.501 + 1e-7).mean() > 0.999  # the greatest value itself has no step above it
    assert error.max() <= step.max() * 1.001
    asked = constant[:7].astype(np.float64)
    expected = asked @ quantizer.decode(codes).astype(np.float64).T
    np.testing.assert_allclose(quantizer.scores(constant[:7], codes), expected, atol=1e-4)
    outside = quantizer.encode(10 * constant[:3])
    assert outside.min() == -128
    assert outside.max() == 127


def test_binary_scores_are_signs_compared() -> None:
    signs = np.where(DOCS > 0, 1.0, -1.0)
    codes = BinaryQuantizer().fit(DOCS).encode(DOCS)
    assert np.array_equal(BinaryQuantizer().fit(DOCS).decode(codes), signs)
    expected = np.where(QUERIES > 0, 1.0, -1.0) @ signs.T
    assert np.array_equal(BinaryQuantizer().fit(DOCS).scores(QUERIES, codes), expected)
    asked = BinaryQuantizer("float").fit(DOCS).scores(QUERIES, codes)
    np.testing.assert_allclose(asked, QUERIES @ signs.T, atol=1e-5)
    hamming = faiss.IndexBinaryFlat(64)
    hamming.add(codes)
    distances, _ = hamming.search(BinaryQuantizer().fit(DOCS).encode(QUERIES), 10)
    ours = BinaryQuantizer().fit(DOCS).search(QUERIES, codes, 10).scores
    assert np.array_equal(64 - 2 * distances, ours)


def test_product_quantiser_finds_what_faiss_finds() -> None:
    index = faiss.IndexPQ(64, 16, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(DOCS)
    index.add(DOCS)
    theirs = recall(index.search(QUERIES, 10)[1])
    quantizer = ProductQuantizer(16).fit(DOCS)
    codes = quantizer.encode(DOCS)
    assert (codes.dtype, codes.shape, quantizer.bytes_per_vector) == (np.uint8, (3000, 16), 16)
    ours = recall(quantizer.search(QUERIES, codes, 10).rows)
    assert ours == pytest.approx(theirs, abs=0.03)
    error = np.square(quantizer.decode(codes) - DOCS).sum(1).mean()
    faiss_error = np.square(index.sa_decode(index.sa_encode(DOCS)) - DOCS).sum(1).mean()
    assert error == pytest.approx(faiss_error, rel=0.05)
    # FAISS's codes of our centres are ours
    faiss.copy_array_to_vector(quantizer.centres_.ravel(), index.pq.centroids)
    assert (index.sa_encode(DOCS[:500]) == codes[:500]).mean() > 0.999


def test_every_code_is_the_nearest_centre() -> None:
    quantizer = ProductQuantizer(8, 32, iterations=5).fit(DOCS)
    pieces = DOCS[:50].astype(np.float64).reshape(50, 8, 8)
    distances = np.square(pieces[:, :, None] - quantizer.centres_[None].astype(np.float64)).sum(-1)
    assert np.array_equal(quantizer.encode(DOCS[:50]), distances.argmin(2))
    few = np.repeat(DOCS[:40], 20, axis=0)  # 40 points for 64 centres: some must be empty
    assert (
        np.square(ProductQuantizer(1, 64).fit(few).decode(ProductQuantizer(1, 64).fit(few).encode(few)) - few).sum() < 1
    )


@pytest.mark.parametrize("quantizer", [Int8Quantizer(), BinaryQuantizer(), ProductQuantizer(8)], ids=lambda q: q.name)
def test_rescoring_with_the_vectors_finds_more(quantizer: Quantizer, tmp_path) -> None:
    codes, report = compress_vectors(DOCS, quantizer, QUERIES)
    better, rescored = compress_vectors(DOCS, quantizer, QUERIES, rescore=True, oversample=8)
    assert np.array_equal(codes, better)
    assert report.after.bytes_per_vector == codes[0].nbytes
    assert report.before.bytes_per_vector == DOCS[0].nbytes
    found = quantizer.search(QUERIES, codes, 10)
    assert report.quality == (1.0, pytest.approx(recall(found.rows)))
    assert report.interval[0] <= report.quality[1] <= report.interval[1]
    assert rescored.quality[1] >= report.quality[1]
    exact = quantizer.search(QUERIES, codes, 10, rescore=DOCS, oversample=300)
    assert recall(exact.rows) == 1.0
    np.testing.assert_allclose(exact.scores, np.take_along_axis(QUERIES @ DOCS.T, exact.rows, 1), atol=1e-6)
    np.save(tmp_path / "docs.npy", DOCS)
    mapped = np.load(tmp_path / "docs.npy", mmap_mode="r")
    assert np.array_equal(quantizer.search(QUERIES, codes, 10, rescore=mapped, oversample=300).rows, exact.rows)


def test_one_quantiser_rescored_by_another_and_blocks_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    bits, bytes_ = BinaryQuantizer().fit(DOCS), Int8Quantizer().fit(DOCS)
    signs, codes = bits.encode(DOCS), bytes_.encode(DOCS)
    plain = recall(bits.search(QUERIES, signs, 10).rows)
    rescored = bits.search(QUERIES, signs, 10, rescore=(bytes_, codes), oversample=8)
    assert recall(rescored.rows) > plain + 0.1
    np.testing.assert_allclose(
        rescored.scores, np.take_along_axis(bytes_.scores(QUERIES, codes), rescored.rows, 1), atol=1e-5
    )
    whole = bytes_.search(QUERIES, codes, 10)
    monkeypatch.setattr("polyhead.compress.vectors._BLOCK", 700)
    assert np.array_equal(bytes_.search(QUERIES, codes, 10).rows, whole.rows)
    assert bytes_.search(QUERIES, codes[:4], 10).rows.shape == (100, 4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="call fit"):
        Int8Quantizer().encode(DOCS)
    with pytest.raises(InputError, match=r"expected floats \[n, 64\]"):
        BinaryQuantizer().fit(DOCS).encode(DOCS[:, :8])
    with pytest.raises(InputError, match="parts that divide"):
        ProductQuantizer(7).fit(DOCS)
    with pytest.raises(InputError, match="2 to 256"):
        ProductQuantizer(8, 500)
    with pytest.raises(InputError, match="not finite"):
        Int8Quantizer().fit(np.full((2, 2), np.nan))
    with pytest.raises(InputError, match="one each"):
        Int8Quantizer().fit(DOCS).search(QUERIES, Int8Quantizer().fit(DOCS).encode(DOCS), rescore=DOCS[:5])
    with pytest.raises(InputError, match="'binary' or 'float'"):
        BinaryQuantizer("ternary")
    with pytest.raises(InputError, match="at least 1"):
        BinaryQuantizer().fit(DOCS).search(QUERIES, DOCS, 0)


@pytest.mark.real_model
def test_real_vectors_of_news_keep_their_neighbours(minilm_path: str, data_dir: object) -> None:
    from polyhead.data import load_texts
    from polyhead.embed import Encoder

    titles = [text.split(". ", 1)[0] for text in load_texts("ag-news", 700)]
    vectors = Encoder(minilm_path).encode(titles).dense
    documents, queries = vectors[60:], vectors[:60]
    found = {}
    for quantizer in (Int8Quantizer(), BinaryQuantizer(), ProductQuantizer(48)):
        for rescore in (False, True):
            _, report = compress_vectors(documents, quantizer, queries, rescore=rescore)
            found[quantizer.name, rescore] = report.quality[1]
    assert found["int8", False] > 0.98
    assert found["int8", False] > found["product", False] > found["binary", False] > 0.4
    assert min(found["binary", True], found["product", True]) > 0.85
    index = faiss.IndexPQ(384, 48, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(documents)
    index.add(documents)
    exact = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
    theirs = [len(set(a) & set(b)) / 10 for a, b in zip(index.search(queries, 10)[1], exact, strict=True)]
    assert found["product", False] == pytest.approx(np.mean(theirs), abs=0.04)
