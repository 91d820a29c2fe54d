"""Find the readable files below a folder: fast (no file is opened), sorted, safe from link loops."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from polyhead.errors import InputError
from polyhead.search.ingest.document import FileStamp, ReadProblem

__all__ = ["SUPPORTED", "ScanResult", "scan"]

SUPPORTED: dict[str, str] = {
    ".txt": "txt",
    ".md": "md",
    ".markdown": "md",
    ".rst": "rst",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
    ".docx": "docx",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".py": "py",
    ".json.gz": "json",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".csv.gz": "csv",
    ".tsv.gz": "tsv",
}
"""Suffix (lower case) -> kind."""

_JUNK_FOLDERS = {"__pycache__", "node_modules", "bower_components", "__MACOSX"}
_JUNK_ENDINGS = (".egg-info", ".dist-info")
_REPORT_EVERY = 1000


@dataclass
class ScanResult:
    """What a scan found. Iterating or ``len()`` goes over ``files``.

    ``skipped`` counts files by why they are not in ``files``: an unsupported suffix (``".png"``, ``"(no suffix)"``),
    ``"broken link"``, ``"second link to the same file"``, ``"special file"``. Hidden files, junk folders and what the
    caller's globs leave out are not counted. ``unreadable`` names folders that could not be listed.
    """

    root: str
    files: list[FileStamp] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[ReadProblem] = field(default_factory=list)

    def __iter__(self) -> Iterator[FileStamp]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def scan(
    path: str | os.PathLike[str],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> ScanResult:
    """The supported files at ``path`` (a file, or a folder with all below it), sorted by relative path.

    Skipped are hidden files and folders (``.git`` ...), ``node_modules``, ``__pycache__``, package metadata, virtual
    environments (folders with a ``pyvenv.cfg``) and Office lock files (``~$...``); ``path`` itself may be any of
    these. Links are followed, but nothing is listed twice and a loop ends.

    Args:
        path: file or folder; ``~`` is expanded.
        include: globs; only files that match one are listed.
        exclude: globs; files and folders that match one are left out.
            A glob without ``/`` is compared with every component of the relative path (``"test"``, ``"*.md"``); one
            with ``/`` with the relative path from its start (``"docs/*.md"``), where ``**`` spans folders.
        progress: called with (files listed so far, None) every thousand files.

    Returns:
        A ``ScanResult``; a folder with nothing readable gives an empty one.

    Raises:
        InputError: ``path`` does not exist (near matches are named), or is a file of an unsupported kind.
    """
    absolute = os.path.abspath(os.path.expanduser(os.fspath(path)))
    try:
        info = os.stat(absolute)
    except OSError as error:
        raise InputError(_missing(os.fspath(path), absolute, error)) from None
    if not stat.S_ISDIR(info.st_mode):
        return _single_file(absolute, info)
    walk = _Walk(absolute, include or (), exclude or (), progress)
    walk.run()
    walk.result.files.sort(key=lambda stamp: stamp.path)
    return walk.result


class _Walk:
    """One scan of a folder. Links wait until all real files are known, so that a real path wins over a link."""

    def __init__(
        self,
        root: str,
        include: Sequence[str],
        exclude: Sequence[str],
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self.result = ScanResult(root)
        self._include = _matcher(tuple(include)) if include else None
        self._exclude = _matcher(tuple(exclude)) if exclude else None
        self._progress = progress
        self._seen: set[tuple[int, int]] = set()
        self._links: list[tuple[str, str]] = []

    def run(self) -> None:
        self._folders(self.result.root, "")
        while self._links:
            links, self._links = sorted(self._links), []
            for absolute, relative in links:
                self._link(absolute, relative)

    def _folders(self, absolute: str, relative: str) -> None:
        pending = [(absolute, relative)]
        while pending:
            folder, prefix = pending.pop()
            try:
                info = os.stat(folder)
                with os.scandir(folder) as listing:
                    entries = list(listing)
            except OSError as error:
                self.result.unreadable.append(ReadProblem(_printable(prefix.rstrip("/")) or ".", _why(error)))
                continue
            self._seen.add((info.st_dev, info.st_ino))
            if prefix and any(entry.name == "pyvenv.cfg" for entry in entries):
                continue
            for entry in entries:
                self._entry(entry, prefix, pending)

    def _entry(self, entry: os.DirEntry[str], prefix: str, pending: list[tuple[str, str]]) -> None:
        name = entry.name
        if name.startswith((".", "~$")):
            return
        relative = prefix + name
        if self._exclude is not None and self._exclude(relative):
            return
        try:
            if entry.is_symlink():
                self._links.append((entry.path, relative))
            elif entry.is_dir(follow_symlinks=False):
                if not _is_junk(name):
                    pending.append((entry.path, relative + "/"))
            else:
                self._file(entry.path, relative, lambda: entry.stat(follow_symlinks=False))
        except OSError as error:
            self.result.unreadable.append(ReadProblem(_printable(relative), _why(error)))

    def _file(self, absolute: str, relative: str, get_info: Callable[[], os.stat_result]) -> None:
        if self._include is not None and not self._include(relative):
            return
        suffix, kind = _kind(relative)
        if kind is None:
            self.result.skipped[suffix] += 1
            return
        info = get_info()
        if not stat.S_ISREG(info.st_mode):
            self.result.skipped["special file"] += 1
            return
        self._seen.add((info.st_dev, info.st_ino))
        self.result.files.append(FileStamp(_printable(relative), absolute, kind, info.st_size, info.st_mtime_ns))
        if self._progress is not None and len(self.result.files) % _REPORT_EVERY == 0:
            self._progress(len(self.result.files), None)

    def _link(self, absolute: str, relative: str) -> None:
        try:
            info = os.stat(absolute)
        except OSError:  # the target is missing, or the link points at itself
            self.result.skipped["broken link"] += 1
            return
        if stat.S_ISDIR(info.st_mode):
            if (info.st_dev, info.st_ino) not in self._seen and not _is_junk(os.path.basename(absolute)):
                self._folders(absolute, relative + "/")
        elif _kind(relative)[1] is not None and (info.st_dev, info.st_ino) in self._seen:
            self.result.skipped["second link to the same file"] += 1
        else:
            self._file(absolute, relative, lambda: info)


def _single_file(absolute: str, info: os.stat_result) -> ScanResult:
    name = os.path.basename(absolute)
    suffix, kind = _kind(name)
    if kind is None or not stat.S_ISREG(info.st_mode):
        what = f"a file of kind {suffix}" if stat.S_ISREG(info.st_mode) else "no regular file"
        known = " ".join(suffix for suffix in SUPPORTED if not suffix.endswith(".gz"))
        raise InputError(f"{absolute} is {what}: can read a folder, or a file of {known} (data files also with .gz)")
    stamp = FileStamp(_printable(name), absolute, kind, info.st_size, info.st_mtime_ns)
    return ScanResult(os.path.dirname(absolute), [stamp])


def _kind(name: str) -> tuple[str, str | None]:
    """Suffix, and the kind read for it or None."""
    stem, suffix = os.path.splitext(name)
    suffix = suffix.lower()
    if suffix == ".gz":
        suffix = os.path.splitext(stem)[1].lower() + suffix
    return suffix or "(no suffix)", SUPPORTED.get(suffix)


def _is_junk(name: str) -> bool:
    return name in _JUNK_FOLDERS or name.endswith(_JUNK_ENDINGS)


def _printable(path: str) -> str:
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _missing(given: str, absolute: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{given}: {_why(error)}"
    parent, wanted = Path(absolute).parent, Path(absolute).name
    while not parent.is_dir():
        parent, wanted = parent.parent, parent.name
    try:
        near = difflib.get_close_matches(wanted, sorted(os.listdir(parent)), n=3, cutoff=0.6)
    except OSError:
        near = []
    hint = "did you mean " + " or ".join(str(parent / name) for name in near) + "?" if near else "check the path"
    return f"{given}: no such file or folder ({wanted!r} is not in {parent}); {hint}"


@lru_cache(maxsize=64)
def _matcher(globs: tuple[str, ...]) -> Callable[[str], bool]:
    anywhere = [_glob_pattern(glob.rstrip("/")) for glob in globs if "/" not in glob.rstrip("/")]
    from_start = [_glob_pattern(glob.strip("/")) for glob in globs if "/" in glob.rstrip("/")]
    component = re.compile("|".join(f"(?:{one})" for one in anywhere) or r"(?!)")
    whole = re.compile("|".join(f"(?:{one})" for one in from_start) or r"(?!)")

    def matches(relative: str) -> bool:
        if any(component.fullmatch(name) for name in relative.split("/")):
            return True
        ends = [at for at, character in enumerate(relative) if character == "/"] if from_start else []
        return bool(from_start) and any(whole.fullmatch(relative[:end]) for end in [*ends, len(relative)])

    return matches


def _glob_pattern(glob: str) -> str:
    pattern = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|[\s\S]", glob):
        if token == "**/":
            pattern += "(?:.*/)?"
        elif token == "**":
            pattern += ".*"
        elif token in "*?":
            pattern += "[^/]*" if token == "*" else "[^/]"
        elif len(token) > 1:
            inside = token[1:-1].replace("\\", r"\\")
            pattern += "[" + ("^" + inside[1:] if inside.startswith("!") else inside) + "]"
        else:
            pattern += re.escape(token)
    return pattern
