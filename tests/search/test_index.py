"""The life of an index: only what changed is encoded, nothing foreign is overwritten, and a kill costs nothing done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search.fake_encoder import FakeEncoder

from polyhead.errors import IndexBusyError, IndexMismatchError, IndexStorageError, InputError
from polyhead.search.index import Index
from polyhead.search.store import Store

WORDS = "river iron bridge market lantern harvest copper violin meadow engine winter harbour signal orchard".split()  # noqa: SIM905


def write_folder(folder: Path, files: int, words: int = 45, seed: int = 0) -> Path:
    generator = random.Random(seed)
    for number in range(files):
        target = folder / f"part {number % 3}" / f"file {number}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"number {number} " + " ".join(generator.choices(WORDS, k=words)), encoding="utf-8")
    return folder


def later(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(time.time_ns() - 10**9, time.time_ns() - 10**9))


def settle(folder: Path) -> None:
    """Make files old enough that their time alone says whether they changed."""
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(time.time_ns() - 10**10, time.time_ns() - 10**10))


def never() -> FakeEncoder:
    raise AssertionError("a model was loaded though nothing had to be encoded")


def content(index: Index) -> dict[str, tuple[Any, ...]]:
    """Everything a search can see of an index: row id -> text, place and vectors."""
    rows = Index.open(index.uri).store.rows(["id", "doc_id", "path", "text", "start", "end", "dense"]).to_pylist()
    return {row["id"]: (row["path"], row["text"], row["start"], row["end"], tuple(row["dense"])) for row in rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "docs", 12)
    settle(folder)
    return folder


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Index:
    index = Index(tmp_path / "index")
    report = index.update(folder, FakeEncoder)
    assert (report.added, report.unchanged, report.chunks) == (12, 0, 12 * 3)
    return index


def test_unchanged_folder_loads_no_model_and_touched_files_are_not_encoded(index: Index, folder: Path) -> None:
    before = content(index)
    report = index.update(folder, never)
    assert (report.added, report.changed, report.removed, report.unchanged, report.chunks) == (0, 0, 0, 12, 0)
    for path in folder.rglob("*.txt"):
        os.utime(path, ns=(time.time_ns() - 5 * 10**9, time.time_ns() - 5 * 10**9))
    report = index.update(folder, never)
    assert (report.changed, report.unchanged, report.chunks) == (0, 12, 0)
    assert content(index) == before


def test_only_what_changed_is_encoded_and_what_is_gone_leaves(index: Index, folder: Path) -> None:
    before = content(index)
    later(folder / "part 0/file 3.txt", "quite other words than before")
    (folder / "part 1/file 4.txt").unlink()
    (folder / "part 2/file 5.txt").rename(folder / "part 2/renamed.txt")
    later(folder / "part 0/new.txt", "a new file")
    encoder = FakeEncoder()
    report = index.update(folder, lambda: encoder)
    assert (report.added, report.changed, report.removed, report.unchanged) == (2, 1, 2, 9)
    moved = (folder / "part 2/renamed.txt").read_text()
    assert sorted(encoder.texts) == sorted(
        ["file 3\nquite other words than before", "new\na new file", f"renamed\n{moved}"]
    )
    after = content(index)
    assert {row[0] for row in after.values()} == {str(p.relative_to(folder)) for p in folder.rglob("*.txt")}
    same = {one: row for one, row in before.items() if row[0] not in ("part 0/file 3.txt", "part 1/file 4.txt")}
    for one, row in same.items():
        assert after.get(one, row) == row
    texts = [row[1] for row in after.values() if row[0] == "part 0/file 3.txt"]
    assert texts == ["quite other words than before"]


def test_another_model_is_refused_with_the_way_out(index: Index, folder: Path) -> None:
    later(folder / "part 0/file 0.txt", "changed")
    before = content(index)
    with pytest.raises(IndexMismatchError, match=r"made with the model 'fake'.*--model other --rebuild"):
        index.update(folder, lambda: FakeEncoder("other", seed=1), model="other")
    assert content(index) == before
    report = index.update(folder, lambda: FakeEncoder("other", seed=1), model="other", rebuild=True)
    assert report.added == 12
    assert Index.open(index.uri).meta.model == "other"


def test_another_format_version_is_refused_with_the_way_out(index: Index, folder: Path, monkeypatch: Any) -> None:
    from polyhead.search import schema

    monkeypatch.setattr(schema, "FORMAT_VERSION", schema.FORMAT_VERSION + 1)
    with pytest.raises(IndexMismatchError, match=r"--rebuild"):
        Index.open(index.uri)


def test_foreign_and_damaged_folders_are_left_alone(tmp_path: Path, folder: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.jpg").write_bytes(b"jpg")
    with pytest.raises((InputError, IndexStorageError), match="photos"):
        Index(foreign).update(folder, FakeEncoder)
    assert [p.name for p in foreign.iterdir()] == ["holiday.jpg"]


def test_damaged_index_says_so(index: Index) -> None:
    for path in Path(index.uri).rglob("*.lance"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(IndexStorageError, match="--rebuild"):
        content(index)


def test_another_folder_does_not_empty_an_index(index: Index, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", 4, seed=9)
    for path in list(other.rglob("*.txt")):
        path.rename(path.with_name("x" + path.name))
    with pytest.raises(InputError, match="holds the files of"):
        index.update(other, FakeEncoder)
    assert len(content(index)) == 36


def test_unreadable_files_are_named_and_stop_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing of the kind")
    (folder / "table.json").write_text("{not json", encoding="utf-8")
    (folder / "song.mp3").write_bytes(b"\0\0")
    report = Index(tmp_path / "index").update(folder, FakeEncoder)
    assert (report.added, report.failed) == (12, 2)
    assert sorted(problem.path for problem in report.problems) == ["broken.pdf", "table.json"]
    assert report.skipped == {".mp3": 1}


def test_a_full_disk_is_told_and_costs_nothing_committed(index: Index, folder: Path, monkeypatch: Any) -> None:
    before = content(index)
    later(folder / "part 0/file 0.txt", "changed")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lancedb.merge.LanceMergeInsertBuilder.execute", full)
    with pytest.raises(IndexStorageError, match="disk is full: make room"):
        index.update(folder, FakeEncoder)
    monkeypatch.undo()
    assert content(index) == before
    assert index.update(folder, FakeEncoder).changed == 1


SLOW = """
    import sys
    sys.path[:0] = [{tests!r}]
    import polyhead.search.update as update
    from polyhead.search.index import Index
    from search.fake_encoder import FakeEncoder
    update.BATCH_PIECES = 4
    report = Index(sys.argv[2]).update(sys.argv[1], lambda: FakeEncoder(pause=float(sys.argv[3])))
    print(report.total_chunks)
"""


def start(folder: Path, uri: Path, pause: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(SLOW.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-c", code, str(folder), str(uri), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_the_next_run_goes_on(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "docs", 40)
    settle(folder)
    uri, generator = tmp_path / "index", random.Random(7)
    kills, seen = 0, 0
    while kills < 8:
        process = start(folder, uri, 0.05)
        committed = time.monotonic() + 20
        while not Store.exists(str(uri)) and process.poll() is None and time.monotonic() < committed:
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break  # it was done before the kill
        kills += 1
        if not Store.exists(str(uri)):
            continue
        rows = content(Index(uri))
        assert len(rows) >= seen, "what was committed stays"
        seen = len(rows)
        # Files that count as done are wholly there.
        store = Index.open(uri).store
        by_path: dict[str, int] = {}
        for row in rows.values():
            by_path[row[0]] = by_path.get(row[0], 0) + 1
        for record in store.files().to_pylist():
            assert by_path[record["path"]] == record["chunks"]
    assert kills >= 3
    Index(uri).update(folder, FakeEncoder)
    whole = Index(tmp_path / "whole")
    whole.update(folder, FakeEncoder)
    found, expected = content(Index(uri)), content(whole)
    assert found.keys() == expected.keys()
    for one, row in expected.items():
        assert found[one][:4] == row[:4]
        np.testing.assert_allclose(found[one][4], row[4])


def test_two_writers_both_end_well_or_one_is_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "docs", 30)
    settle(folder)
    uri = tmp_path / "index"
    processes = [start(folder, uri, 0.05) for _ in range(2)]
    ends = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert any(code == 0 for _, code in ends)
    for (_, stderr), code in ends:
        assert code == 0 or "IndexBusyError" in stderr, stderr
    rows = content(Index(uri))
    assert len(rows) == 30 * 3


def test_the_one_who_waits_is_told_who_writes(index: Index, folder: Path) -> None:
    from polyhead.search.lock import writing

    code = "import sys, time; from polyhead.search.lock import writing\n"
    code += "with writing(sys.argv[1]): print('on', flush=True); time.sleep(30)"
    holder = subprocess.Popen([sys.executable, "-c", code, index.uri], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "on"
    try:
        with pytest.raises(IndexBusyError, match=rf"process {holder.pid} .*--no-update"):
            index.update(folder, FakeEncoder)
        assert len(content(index)) == 36, "reading needs no lock"
    finally:
        holder.kill()
        holder.communicate()
    with writing(index.uri):  # the system gave the lock back
        assert json.loads(Path(index.uri, ".writer.json").read_text())["pid"] == os.getpid()
