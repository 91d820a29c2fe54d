"""Every strategy against its definition in float64, and the properties all of them share."""

from __future__ import annotations

import numpy as np
import pytest

from polyhead.embed.parts import Part
from polyhead.errors import InputError
from polyhead.search.heads import head_statistics, prepare_heads
from polyhead.search.query import EncodedQuery, query_parts
from polyhead.search.strategies import STRATEGIES, Aspects, Dense, Heads, Parts, Vote, strategy
from polyhead.search.view import ArrayView

# Those that read token vectors have their own tests (test_late.py): this world has none.
ON_CHUNKS = [name for name, kind in STRATEGIES.items() if not kind.uses_tokens]
SHAPE = (2, 3, 4)
WIDTH = 24


def unit(generator, n, d):
    vectors = generator.normal(size=(n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def prepared(generator, n):
    raw = generator.normal(size=(n, *SHAPE)).astype(np.float32)
    return prepare_heads(raw, np.zeros(SHAPE, np.float32))


@pytest.fixture
def world():
    generator = np.random.default_rng(0)
    n = 300
    view = ArrayView(
        unit(generator, n, 16),
        prepared(generator, n),
        documents=np.arange(n) // 2,
        head_importance=generator.random(SHAPE[:2]).astype(np.float32),
    )
    words = "alpha beta gamma delta epsilon"
    parts = (Part(words, 0, 30, "whole"), Part("alpha beta", 0, 10, "window"), Part("delta", 17, 22, "window"))
    coverage = np.array([1.0, 0.4, 0.2], np.float32)
    query = EncodedQuery(words, parts, coverage, unit(generator, 3, 16), prepared(generator, 3), SHAPE)
    return query, view


@pytest.mark.parametrize("name", ON_CHUNKS)
def test_rankings_are_whole(world, name):
    query, view = world
    ranking = strategy(name).rank(query, view, 7)
    assert len(ranking.rows) == len(ranking.scores) == len(ranking.reasons) == 7
    assert (np.diff(ranking.scores) <= 0).all()
    assert len(set(view.documents[ranking.rows])) == 7, "a document stands in a ranking once"
    assert all(0 <= reason.part < 3 for reason in ranking.reasons)
    for row, reason in zip(ranking.rows, ranking.reasons, strict=True):
        cosine = float(view.vectors(np.array([row]), "dense")[0] @ query.dense[reason.part])
        assert reason.similarity == pytest.approx(cosine, abs=1e-5)
        assert [h.cosine for h in reason.heads] == sorted((h.cosine for h in reason.heads), reverse=True)
    assert bool(ranking.reasons[0].heads) == STRATEGIES[name].uses_heads


@pytest.mark.parametrize("name", ON_CHUNKS)
def test_asking_for_more_than_there_is_gives_all_documents(world, name):
    query, view = world
    small = ArrayView(
        view.vectors(np.arange(6), "dense"), view.vectors(np.arange(6), "heads"), documents=np.array([0, 0, 0, 1, 1, 2])
    )
    small.head_importance = view.head_importance
    assert len(strategy(name).rank(query, small, 50).rows) == 3


def best_rows(scores, documents, k):
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))
    seen, rows = set(), []
    for row in order:
        if documents[row] not in seen:
            seen.add(documents[row])
            rows.append(row)
    return rows[:k]


def test_dense_is_the_cosine_with_the_whole(world):
    query, view = world
    scores = view.vectors(np.arange(view.n), "dense").astype(np.float64) @ query.dense[0].astype(np.float64)
    assert Dense().rank(query, view, 20).rows.tolist() == best_rows(scores, view.documents, 20)


@pytest.mark.parametrize("weighted", [False, True])
def test_heads_is_the_weighted_mean_of_head_cosines(world, weighted):
    query, view = world
    weights = np.random.default_rng(5).random(SHAPE[:2]) if weighted else np.ones(SHAPE[:2])
    rows = view.vectors(np.arange(view.n), "heads").astype(np.float64).reshape(-1, 6, 4)
    asked = query.heads[0].astype(np.float64).reshape(6, 4)
    cosine = (rows * asked).sum(-1) / np.linalg.norm(rows, axis=-1) / np.linalg.norm(asked, axis=-1)
    scores = cosine @ weights.ravel() / weights.sum()
    ranking = Heads(weights if weighted else None).rank(query, view, 20)
    assert ranking.rows.tolist() == best_rows(scores, view.documents, 20)
    assert ranking.scores == pytest.approx(scores[ranking.rows], abs=1e-5)
    share = ranking.reasons[0].heads[0]
    assert share.cosine == pytest.approx(cosine[ranking.rows[0], share.layer * 3 + share.head], abs=1e-5)


def test_vote_counts_ranks_by_importance(world):
    query, view = world
    rows = view.vectors(np.arange(view.n), "heads").astype(np.float64).reshape(-1, 6, 4)
    cosine = (rows * query.heads[0].astype(np.float64).reshape(6, 4)).sum(-1)
    totals = np.zeros(view.n)
    for head in range(6):
        for rank, row in enumerate(np.argsort(-cosine[:, head], kind="stable")[:50]):
            totals[row] += view.head_importance.ravel()[head] * 2.0**-rank
    ranking = Vote().rank(query, view, 10)
    assert ranking.rows.tolist() == best_rows(totals, view.documents, 10)
    assert ranking.scores == pytest.approx(totals[ranking.rows], rel=1e-5)


def test_parts_takes_the_best_corrected_part(world):
    query, view = world
    similarity = query.dense.astype(np.float64) @ view.vectors(np.arange(view.n), "dense").astype(np.float64).T
    corrected = similarity - 0.8 * np.sort(similarity, axis=1)[:, -10:].mean(1, keepdims=True)
    ranking = Parts(depth=view.n).rank(query, view, 15)
    assert ranking.rows.tolist() == best_rows(corrected.max(0), view.documents, 15)
    assert [r.part for r in ranking.reasons] == corrected.argmax(0)[ranking.rows].tolist()


def test_aspects_is_what_the_docs_say(world):
    query, view = world
    every = np.arange(view.n)
    dense = query.dense.astype(np.float64) @ view.vectors(every, "dense").astype(np.float64).T
    heads = query.heads.astype(np.float64) @ view.vectors(every, "heads").astype(np.float64).T / 6
    s = (dense + 0.15 * heads) / 1.15
    temperature = 0.5 * view.spread
    per_document = s.reshape(3, -1, 2).max(2)
    evidence = s / temperature - np.log(np.exp(per_document / temperature).sum(1))[:, None]
    top = s.max(1)
    charge = np.maximum(0, top[0] + 2 * view.spread * query.coverage - top) / temperature
    charge[0] = 0
    scores = (evidence - charge[:, None]).max(0)
    ranking = Aspects(depth=view.n).rank(query, view, 12)
    assert ranking.rows.tolist() == best_rows(scores, view.documents, 12)
    assert ranking.scores == pytest.approx(scores[ranking.rows], abs=1e-4)
    assert Aspects(depth=100).rank(query, view, 12).scores == pytest.approx(ranking.scores, abs=0.5)


def test_a_question_of_one_part_is_dense_search(world):
    query, view = world
    whole = query.whole
    assert Aspects(head_weight=0).rank(whole, view, 10).rows.tolist() == Dense().rank(whole, view, 10).rows.tolist()
    assert "one thing" in Aspects().rank(whole, view, 10).decision


def test_aspects_lets_each_part_find_its_own_document():
    """Two documents each answer one part exactly; the whole lies between them and is nearest to a third."""
    basis = np.eye(40, dtype=np.float32)
    first, second = basis[0], basis[1]
    whole = (first + second) / np.sqrt(2)
    between = 0.72 * whole + np.sqrt(1 - 0.72**2) * basis[2]
    noise = unit(np.random.default_rng(1), 60, 40) * np.float32(0.5)
    view = ArrayView(np.vstack([noise, first, second, between]).astype(np.float32))
    parts = tuple(Part(text, 0, 1, "clause") for text in ("whole", "first", "second"))
    query = EncodedQuery("?", parts, np.array([1, 0.2, 0.2], np.float32), np.stack([whole, first, second]), None, SHAPE)
    ranking = Aspects().rank(query, view, 3)
    assert set(ranking.rows[:2].tolist()) == {60, 61}
    assert [r.part for r in ranking.reasons[:2]] == [1 if row == 60 else 2 for row in ranking.rows[:2].tolist()]
    assert Dense().rank(query, view, 1).rows.tolist() == [62]
    assert "several things" in ranking.decision


def test_head_statistics_by_definition():
    raw = np.random.default_rng(2).normal(1.0, 1.0, size=(400, *SHAPE)).astype(np.float32)
    mean, importance = head_statistics(raw, pairs=200_000)
    assert mean == pytest.approx(raw.mean(0), abs=1e-5)
    unit_raw = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    cosine = np.einsum("alhd,blhd->lhab", unit_raw, unit_raw)
    distance = 1 - (cosine.sum((-1, -2)) - 400) / (400 * 399)
    assert importance == pytest.approx(np.linalg.norm(raw, axis=-1).mean(0) * distance, rel=0.02)
    with pytest.raises(InputError, match="layers the index was made with"):
        prepare_heads(raw, np.zeros((1, 3, 4), np.float32))


def test_prepared_heads_give_the_sum_of_centred_cosines():
    generator = np.random.default_rng(3)
    raw, mean = generator.normal(size=(2, *SHAPE)), generator.normal(size=SHAPE)
    a, b = raw - mean
    expected = ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).sum()
    first, second = prepare_heads(raw, mean)
    assert float(first @ second) == pytest.approx(expected, abs=1e-5)


def test_bad_choices_are_refused(world):
    query, view = world
    with pytest.raises(InputError, match="Unknown strategy 'magic'"):
        strategy("magic")
    with pytest.raises(InputError, match="2 layers x 3 heads"):
        Heads(np.ones((6, 12))).rank(query, view, 3)
    with pytest.raises(InputError, match="not negative"):
        Heads(-np.ones((2, 3))).rank(query, view, 3)
    bare = EncodedQuery("?", query.parts, query.coverage, query.dense, None, SHAPE)
    with pytest.raises(InputError, match="needs head vectors"):
        Heads().rank(bare, view, 3)


def test_query_parts_begin_with_the_whole_and_get_finer_when_long():
    short = query_parts("  who founded Rome, and when did the last emperor fall?  ")
    assert short[0].kind == "whole"
    assert short[0].text == "who founded Rome, and when did the last emperor fall?"
    assert "who founded Rome" in [p.text for p in short]
    assert max(len(p.text.split()) for p in short[1:]) <= 9
    long = query_parts(" ".join(f"word{i}" for i in range(60)))
    assert {len(p.text.split()) for p in long if p.kind == "window"} == {5, 8}
    assert len({(p.start, p.end) for p in long}) == len(long)
    with pytest.raises(InputError, match="query is empty"):
        query_parts("  ")
