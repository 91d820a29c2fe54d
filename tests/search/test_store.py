"""The store on real LanceDB tables, against references in NumPy and Python."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from polyhead.errors import IndexMismatchError, IndexStorageError, InputError
from polyhead.search.planner import ExactView, IndexView, SearchLimits
from polyhead.search.schema import IndexMeta, chunk_schema, fixed_size_lists
from polyhead.search.store import Store

DIM, SHAPE = 16, (1, 2, 4)


def meta(**changes: Any) -> IndexMeta:
    generator = np.random.default_rng(9)
    mean = generator.standard_normal(SHAPE).astype(np.float32)
    importance = generator.random(SHAPE[:2]).astype(np.float32)
    return IndexMeta("model", "print", DIM, SHAPE, mean, importance, 64, **changes)


def table(n: int, *, first: int = 0, seed: int = 0) -> pa.Table:
    """Rows whose columns vary in known ways; three chunks a document."""
    generator = np.random.default_rng(seed)
    numbers = np.arange(first, first + n)
    dense = generator.standard_normal((n, DIM)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    heads = generator.standard_normal((n, 8)).astype(np.float16)
    schema = chunk_schema(meta())
    columns: dict[str, Any] = {
        "id": [f"d{i // 3}#{i % 3}" for i in numbers],
        "doc_id": [f"d{i // 3}" for i in numbers],
        "path": [f"folder/it's {i // 3}.txt" for i in numbers],
        "title": [None if i % 4 == 0 else f"Title {i}" for i in numbers],
        "heading": ["Ä%_" if i % 5 == 0 else None for i in numbers],
        "kind": [("pdf", "txt", "md")[i % 3] for i in numbers],
        "size": numbers * 10,
        "modified": pa.array([1_700_000_000_000_000 + int(i) * 3_600_000_000 for i in numbers]).cast(
            schema.field("modified").type
        ),
        "start": numbers % 3 * 100,
        "end": numbers % 3 * 100 + 100,
        "text": [f"text {i}" for i in numbers],
        "content_hash": ["x"] * n,
        "attributes": [
            json.dumps(attributes(int(i)), sort_keys=True, separators=(",", ":"), ensure_ascii=False) for i in numbers
        ],
        "dense": fixed_size_lists(dense),
        "heads": fixed_size_lists(heads),
        "head_norms": fixed_size_lists(np.ones((n, 2), np.float32)),
    }
    return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def attributes(i: int) -> dict[str, Any]:
    return (
        {"author": ("O'Neil", 'say "hi"\\', "Zoë")[i % 3], "year": 2000 + i % 7, "draft": i % 2 == 0} if i % 6 else {}
    )


def vectors(rows: pa.Table, column: str) -> np.ndarray:
    return rows[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, -1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path / "index"), meta(settings={"text_field": "body"}))
    made.upsert(table(60))
    return made


def test_what_was_stored_comes_back(store: Store) -> None:
    again = Store.open(store.uri)
    assert again.meta == store.meta == meta()
    assert again.meta.settings == {"text_field": "body"}
    np.testing.assert_array_equal(again.meta.head_mean, meta().head_mean)
    np.testing.assert_array_equal(again.meta.head_importance, meta().head_importance)
    view, rows = again.view(), table(60)
    assert view.n == again.count() == 60
    order = np.argsort(rows["id"].to_pylist())
    np.testing.assert_array_equal(view.vectors(np.arange(60), "dense"), vectors(rows, "dense")[order])
    np.testing.assert_array_equal(view.vectors(np.arange(60), "heads"), vectors(rows, "heads")[order])
    records = view.fetch(np.array([59, 3, 3]))
    expected = rows.take(order[[59, 3, 3]]).drop_columns(["dense", "heads", "head_norms"]).to_pylist()
    assert records == expected
    documents = np.array(rows["doc_id"].to_pylist())[order]
    assert [len(set(documents[view.documents == one])) for one in np.unique(view.documents)] == [1] * 20


def test_search_is_the_exact_inner_product(store: Store) -> None:
    view = store.view()
    assert isinstance(view, ExactView)
    queries = np.random.default_rng(1).standard_normal((5, DIM)).astype(np.float32)
    found, scores = view.nearest(queries, "dense", 7)
    everything = view.vectors(np.arange(60), "dense").astype(np.float64)
    expected = np.argsort(-(queries @ everything.T), axis=1)[:, :7]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ everything.T, expected, 1), rtol=1e-5)
    assert view.recall(queries) == 1.0


def test_upsert_replaces_and_amend_changes_some_columns(store: Store) -> None:
    store.upsert(table(30, first=45, seed=5))  # ids 45..74, of which 45..59 are there
    assert store.count() == 75
    assert len(set(store.rows(["id"])["id"].to_pylist())) == 75
    new = dict(
        zip(table(30, first=45, seed=5)["id"].to_pylist(), vectors(table(30, first=45, seed=5), "dense"), strict=True)
    )
    rows = store.rows(["id", "dense"])
    for one, vector in zip(rows["id"].to_pylist(), vectors(rows, "dense"), strict=True):
        if one in new:
            np.testing.assert_array_equal(vector, new[one])
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("size", pa.int64(), nullable=False)])
    store.amend(pa.table([["d0#0", "unknown"], [7, 8]], schema=schema))
    assert store.rows(["size"], "id = 'd0#0'")["size"].to_pylist() == [7]
    assert store.count() == 75


def test_delete_by_id_and_path(store: Store) -> None:
    store.delete_ids(["d0#1", "no such"])
    store.delete_paths(["folder/it's 5.txt", "folder/it's 6.txt"])
    assert store.count() == 60 - 1 - 6
    assert "folder/it's 5.txt" not in store.paths()


PARTS = [
    ("kind = 'pdf'", lambda r: r["kind"] == "pdf"),
    ("KIND != 'pdf' and size >= 100", lambda r: r["kind"] != "pdf" and r["size"] >= 100),
    ("size < 100 or size > 5e2", lambda r: r["size"] < 100 or r["size"] > 500),
    ("not (size <= 100 or kind in ('pdf', 'md'))", lambda r: not (r["size"] <= 100 or r["kind"] in ("pdf", "md"))),
    ("title is null", lambda r: r["title"] is None),
    ("title is not null and title like 'Title 1%'", lambda r: (r["title"] or "").startswith("Title 1")),
    ("title not like 'Title 1%'", lambda r: r["title"] is not None and not r["title"].startswith("Title 1")),
    ("title ilike 'tITLE _'", lambda r: r["title"] is not None and len(r["title"]) == 7),
    ("path = 'folder/it''s 3.txt'", lambda r: r["path"] == "folder/it's 3.txt"),
    ("`end` = 200 and start <> 0", lambda r: r["end"] == 200),
    ("size > 99.5 and size in (100, 200, 2.5)", lambda r: r["size"] in (100, 200)),
    ("size between 100 and 200", lambda r: 100 <= r["size"] <= 200),
    ("size not between 100 and 200", lambda r: not 100 <= r["size"] <= 200),
    ("heading = 'Ä%_'", lambda r: r["heading"] is not None),
    ("kind not in ('pdf')", lambda r: r["kind"] != "pdf"),
    (
        "modified >= '2023-11-15'",
        lambda r: r["modified"] >= datetime(2023, 11, 15, tzinfo=timezone.utc),
    ),
    (
        "modified < '2023-11-15T12:00:00+02:00'",
        lambda r: r["modified"] < datetime(2023, 11, 15, 10, tzinfo=timezone.utc),
    ),
    ("attributes.author = 'O''Neil'", lambda r: json.loads(r["attributes"]).get("author") == "O'Neil"),
    ("attributes.author = 'say \"hi\"\\'", lambda r: json.loads(r["attributes"]).get("author") == 'say "hi"\\'),
    ("attributes.author like 'Z%'", lambda r: json.loads(r["attributes"]).get("author", "").startswith("Z")),
    ("attributes.author in ('Zoë', 'x')", lambda r: json.loads(r["attributes"]).get("author") == "Zoë"),
    ("attributes.year > 2003.5", lambda r: json.loads(r["attributes"]).get("year", 0) > 2003.5),
    ("attributes.year != 2003", lambda r: json.loads(r["attributes"]).get("year", 2003) != 2003),
    ("attributes.draft = true", lambda r: json.loads(r["attributes"]).get("draft") is True),
    ("attributes.draft is null", lambda r: "draft" not in json.loads(r["attributes"])),
    ("attributes.year = '2003'", lambda r: False),
    ("not (kind = 'a' or " * 4 + "size >= 0" + ")" * 4, lambda r: True),
    ("size in (" + ", ".join(map(str, range(3_000))) + ")", lambda r: True),
    ("size < 0 " + "or size >= 0 " * 1_000, lambda r: True),
    ("text = ''' OR 1=1 --'", lambda r: False),
]


@pytest.mark.parametrize(("where", "passes"), PARTS, ids=[where[:40] for where, _ in PARTS])
def test_filters_pass_the_rows_that_python_passes(store_of_module: Store, where: str, passes: Any) -> None:
    rows = table(60).drop_columns(["dense", "heads", "head_norms"]).to_pylist()
    expected = sorted(row["id"] for row in rows if passes(row))
    view = store_of_module.view(where)
    assert [record["id"] for record in view.fetch(np.arange(view.n))] == expected
    assert store_of_module.count(where) == len(expected)
    assert where[:150] in view.plan
    # The same through the index instead of memory.
    disk = store_of_module.view(where, limits=SearchLimits(exact_rows=-1))
    assert isinstance(disk, IndexView)
    assert sorted(record["id"] for record in disk.fetch(np.arange(disk.n))) == expected
    if expected:
        queries = np.random.default_rng(3).standard_normal((2, DIM)).astype(np.float32)
        exact, scores = view.nearest(queries, "dense", 5)
        found, found_scores = disk.nearest(queries, "dense", 5)
        np.testing.assert_allclose(found_scores, scores, rtol=1e-4, atol=1e-5)
        for a, b in zip(exact, found, strict=True):
            assert [r["id"] for r in view.fetch(a[a >= 0])] == [r["id"] for r in disk.fetch(b[b >= 0])]


@pytest.fixture(scope="module")
def store_of_module(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store.create(str(tmp_path_factory.mktemp("filters") / "index"), meta())
    made.upsert(table(60))
    return made


def test_view_of_nothing(store: Store) -> None:
    view = store.view("kind = 'docx'")
    rows, scores = view.nearest(np.ones((2, DIM), np.float32), "dense", 3)
    assert view.n == 0
    assert (rows == -1).all()
    assert np.isneginf(scores).all()
    assert view.fetch(np.array([], np.int64)) == []
    assert view.spread == 0.0


def test_a_view_stays_while_others_write(store: Store) -> None:
    before = store.view()
    other = Store.open(store.uri)
    other.delete_ids(["d0#0"])
    other.upsert(table(6, first=60))
    other.tidy(exact_rows=100_000, force=True)
    assert before.n == 60
    assert {record["id"] for record in before.fetch(np.arange(60))} == set(table(60)["id"].to_pylist())
    assert before.vectors(np.array([0]), "heads").shape == (1, 8)
    assert store.view().n == store.count() == 65  # a handle opened earlier sees what others committed


def test_above_the_limit_the_index_answers(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "index"), meta())
    store.upsert(table(4_000))
    limits = SearchLimits(exact_rows=1_000)
    assert "no index" in store.view(limits=limits).plan
    done = " ".join(store.tidy(exact_rows=1_000))
    assert "IVF_SQ" in done
    assert store.tidy(exact_rows=1_000) == []
    view = store.view(limits=limits)
    assert isinstance(view, IndexView)
    assert "IVF_SQ" in view.plan
    queries = np.random.default_rng(2).standard_normal((20, DIM)).astype(np.float32)
    assert view.recall(queries, "dense", 10) >= 0.95
    assert view.recall(np.random.default_rng(2).standard_normal((20, 8)), "heads", 10) >= 0.9
    rows, scores = view.nearest(queries, "dense", 10)
    products = np.einsum("md,mkd->mk", queries, view.vectors(rows.ravel(), "dense").reshape(20, 10, DIM))
    np.testing.assert_allclose(scores, products, rtol=1e-4, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert view.spread == pytest.approx(store.view().spread, rel=0.1)
    half = store.view("kind != 'pdf'", limits=limits)
    assert isinstance(half, IndexView)
    found = half.fetch(half.nearest(queries, "dense", 10)[0].ravel())
    assert {record["kind"] for record in found} == {"txt", "md"}
    assert half.recall(queries) >= 0.9
    few = store.view("size < 1000", limits=limits)
    assert isinstance(few, ExactView)
    assert "100 of 4,000" in few.plan


def test_memory_is_a_limit_too(store: Store) -> None:
    row_bytes = 4 * (DIM + 8)
    assert isinstance(store.view(limits=SearchLimits(memory_bytes=60 * row_bytes)), ExactView)
    assert isinstance(store.view(limits=SearchLimits(memory_bytes=59 * row_bytes)), IndexView)


def test_head_vectors_may_be_missing(tmp_path: Path) -> None:
    bare = IndexMeta("model", "print", DIM, SHAPE)
    store = Store.create(str(tmp_path / "index"), bare)
    store.upsert(table(6).drop_columns(["heads", "head_norms"]).cast(chunk_schema(bare)))
    view = Store.open(store.uri).view()
    assert view.head_importance is None
    with pytest.raises(InputError, match="no vectors 'heads'"):
        view.nearest(np.ones((1, 8), np.float32), "heads", 1)


def test_an_object_store_address_takes_the_same_road(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/somewhere/index"  # what is no plain path goes to the object store layer as it is
    assert not Store.exists(uri)
    Store.create(uri, meta(settings={"a": 1})).upsert(table(9))
    again = Store.open(uri, storage_options={"timeout": "10s"})
    assert again.view("kind = 'pdf'").n == 3
    assert again.meta.settings == {"a": 1}


def test_missing_foreign_and_damaged_indexes_are_named(tmp_path: Path, store: Store) -> None:
    with pytest.raises(InputError, match=r"no index at .* polyhead index"):
        Store.open(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="already an index"):
        Store.create(store.uri, meta())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match=r"other things in it \(letter.txt"):
        Store.create(str(tmp_path / "mine"), meta())
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Store.create(str(tmp_path / "file"), meta())
    import lancedb

    lancedb.connect(str(tmp_path / "foreign")).create_table("chunks", pa.table({"x": [1]}))
    with pytest.raises(IndexStorageError, match="did not make"):
        Store.open(str(tmp_path / "foreign"))
    for manifest in Path(store.uri, "chunks.lance", "_versions").glob("*.manifest"):
        manifest.write_bytes(b"not a manifest")
    with pytest.raises(IndexStorageError, match="--rebuild"):
        Store.open(store.uri)


def test_another_format_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    import lancedb

    schema = chunk_schema(meta())
    newer = json.loads(schema.metadata[b"polyhead"]) | {"format_version": 99}
    schema = schema.with_metadata({b"polyhead": json.dumps(newer).encode()})
    lancedb.connect(str(tmp_path / "index")).create_table("chunks", schema=schema)
    with pytest.raises(IndexMismatchError, match=r"version 99.*polyhead index PATH --rebuild"):
        Store.open(str(tmp_path / "index"))


def test_a_first_commit_that_was_cut_off_is_no_index(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    (folder / "chunks.lance" / "data").mkdir(parents=True)
    (folder / "chunks.lance" / "data" / "part.lance").write_bytes(b"half")
    assert not Store.exists(str(folder))
    store = Store.create(str(folder), meta())
    store.upsert(table(3))
    assert Store.open(str(folder)).count() == 3


def test_a_lost_table_of_files_is_made_again(store: Store) -> None:
    import shutil

    shutil.rmtree(Path(store.uri, "files.lance"))
    again = Store.open(store.uri)
    assert again.files().num_rows == 0
    assert again.count() == 60


def test_versions_and_small_files_are_joined(store: Store) -> None:
    for number in range(25):
        store.upsert(table(3, first=60 + 3 * number))
    assert "joined" in " ".join(store.tidy(exact_rows=100_000))
    assert len(list(Path(store.uri, "chunks.lance", "data").glob("*"))) >= 1
    assert store.count() == 60 + 75
    assert store.tidy(exact_rows=100_000) == []
