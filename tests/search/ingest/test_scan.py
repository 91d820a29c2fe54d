"""The scan: what is listed, what is skipped and counted, and that links and missing paths do no harm."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from polyhead.errors import InputError
from polyhead.search.ingest import SUPPORTED, scan


def build(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")


def paths(folder: Path, **globs: Sequence[str]) -> list[str]:
    return [stamp.path for stamp in scan(folder, **globs).files]


def test_stamps_say_what_the_file_system_says(tmp_path: Path) -> None:
    build(tmp_path, ["b/Über uns.TXT", "a.md", "b.txt"])
    result = scan(tmp_path)
    assert [(one.path, one.kind) for one in result] == [("a.md", "md"), ("b.txt", "txt"), ("b/Über uns.TXT", "txt")]
    stamp = result.files[2]
    info = os.stat(stamp.absolute)
    assert (stamp.size, stamp.mtime_ns) == (info.st_size, info.st_mtime_ns)
    assert Path(stamp.absolute).read_text() == "text"
    assert len(result) == 3
    assert result.skipped.total() == 0


def test_every_supported_suffix_is_listed_and_others_are_counted(tmp_path: Path) -> None:
    build(tmp_path, [f"file{suffix}" for suffix in SUPPORTED])
    build(tmp_path, ["a.png", "b.PNG", "Makefile", "x.tar.gz", "logs.txt.gz"])
    result = scan(tmp_path)
    assert {stamp.path.removeprefix("file"): stamp.kind for stamp in result} == SUPPORTED
    assert dict(result.skipped) == {".png": 2, "(no suffix)": 1, ".tar.gz": 1, ".txt.gz": 1}


def test_hidden_and_junk_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    build(tmp_path, ["keep/a.txt", ".git/b.txt", ".hidden.txt", "node_modules/c.md", "x/__pycache__/d.txt"])
    build(tmp_path, ["myenv/pyvenv.cfg", "myenv/lib/e.py", "p.egg-info/f.txt", "~$report.docx", "site-packages/g.py"])
    assert paths(tmp_path) == ["keep/a.txt", "site-packages/g.py"]
    assert paths(tmp_path / ".git") == ["b.txt"]
    assert paths(tmp_path / "myenv") == ["lib/e.py"]
    assert paths(tmp_path / ".hidden.txt") == [".hidden.txt"]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ["*.md"]}, ["a.md", "docs/b.md", "docs/deep/c.md"]),
        ({"include": ["docs"]}, ["docs/b.md", "docs/deep/c.md", "docs/t.txt"]),
        ({"include": ["docs/*.md"]}, ["docs/b.md"]),
        ({"include": ["docs/**/*.md"]}, ["docs/b.md", "docs/deep/c.md"]),
        ({"include": ["**/?.[mp]?"]}, ["a.md", "docs/b.md", "docs/deep/c.md", "test/x.py"]),
        ({"include": ["[!a].*"], "exclude": ["docs/deep/"]}, ["docs/b.md", "docs/t.txt", "test/x.py"]),
        ({"exclude": ["docs", "tes?"]}, ["a.md", "latest.txt"]),
        ({"exclude": ["docs/deep", "*.py"]}, ["a.md", "docs/b.md", "docs/t.txt", "latest.txt"]),
        ({"exclude": ["*"]}, []),
    ],
)
def test_globs(tmp_path: Path, globs: dict[str, list[str]], expected: list[str]) -> None:
    build(tmp_path, ["a.md", "docs/b.md", "docs/deep/c.md", "docs/t.txt", "latest.txt", "test/x.py"])
    assert paths(tmp_path, **globs) == expected


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    build(outside, ["far.txt", "deep/more.txt"])
    build(root, ["z/real.txt"])
    (root / "a_link").symlink_to(root / "z")  # sorts before the real folder, which must win
    (root / "z" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "gone.txt").symlink_to(root / "nowhere.txt")
    (root / "out").symlink_to(outside)
    (root / "out" / "back").symlink_to(root)
    (root / "twin.txt").symlink_to(root / "z" / "real.txt")
    (root / "picture.png").symlink_to(root / "z" / "real.txt")
    result = scan(root)
    assert [one.path for one in result] == ["out/deep/more.txt", "out/far.txt", "z/real.txt"]
    assert dict(result.skipped) == {"broken link": 2, "second link to the same file": 1, ".png": 1}
    (tmp_path / "entry").symlink_to(root)
    assert len(scan(tmp_path / "entry")) == 3


def test_special_files_are_never_listed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.md"))
    assert scan(tmp_path).files == []
    assert scan(tmp_path).skipped["special file"] == 2
    with pytest.raises(InputError, match="no regular file"):
        scan(tmp_path / "pipe.txt")


@pytest.mark.skipif(sys.platform != "linux", reason="file names of arbitrary bytes")
def test_names_that_are_no_unicode_stay_openable(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "w") as out:
        out.write("text")
    (stamp,) = scan(tmp_path).files
    assert stamp.path == "caf\\xe9.txt"
    stamp.path.encode()
    assert Path(stamp.absolute).read_text() == "text"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, ["open/a.txt", "shut/b.txt"])
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("shut"):  # not chmod: tests may run as root
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    result = scan(tmp_path)
    assert [one.path for one in result] == ["open/a.txt"]
    assert [str(one) for one in result.unreadable] == ["shut: permission denied"]


def test_a_missing_path_names_near_matches(tmp_path: Path) -> None:
    build(tmp_path, ["reports/may.txt"])
    with pytest.raises(InputError, match=r"report.*did you mean .*reports\?"):
        scan(tmp_path / "report")
    with pytest.raises(InputError, match=r"did you mean .*reports\?"):
        scan(tmp_path / "repots" / "may.txt")
    with pytest.raises(InputError, match=r"no such file.*check the path"):
        scan(tmp_path / "qqqq")
    with pytest.raises(InputError, match=r"no such file"):
        scan(tmp_path / "reports" / "may.txt" / "below")


def test_a_single_file_of_unsupported_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.png: can read .*\.docx"):
        scan(tmp_path / "a.png")
    assert scan(tmp_path).files == []


def test_no_file_is_opened_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(50):
        (tmp_path / f"{folder}").mkdir()
        for file in range(100):
            os.close(os.open(tmp_path / f"{folder}" / f"{file}.txt", os.O_CREAT))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the scan opened a file")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    told: list[tuple[int, int | None]] = []
    began = time.perf_counter()
    result = scan(tmp_path, progress=lambda done, total: told.append((done, total)))
    print(f"5,000 files in {time.perf_counter() - began:.3f} s")
    assert len(result) == 5000
    assert [one.path for one in result] == sorted(one.path for one in result)
    assert told == [(1000 * i, None) for i in range(1, 6)]
