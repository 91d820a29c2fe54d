"""What the search page asks: the fields of its form, as they stand in the address, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlencode

from polyhead.errors import InputError
from polyhead.search.filters import quoted
from polyhead.search.strategies import DEFAULT_STRATEGY
from polyhead.search.update import POSTED

if TYPE_CHECKING:
    from polyhead.search.index import Index

__all__ = ["Ask", "Choices", "choices_of", "from_address"]

_T = TypeVar("_T")
MOST_HITS = 100
MOST_FOLDERS = 200


def from_address(kind: type[_T], given: Mapping[str, str]) -> _T:
    """A dataclass of strings from the parameters of an address; what is blank or missing has its default."""
    known = {field.name: given.get(field.name, "").strip() for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in known.items() if value})


@dataclass(frozen=True)
class Ask:
    """A question with its settings, all as they were typed; each field is a parameter of the address.

    Attributes:
        q: the question.
        strategy, beside: how it is answered, and a second way beside it; "" for none.
        kind, folder: of the documents; "" for all.
        since, until: days such as 2026-01-31, both included; "" for no bound.
        k: documents wanted.
    """

    q: str = ""
    strategy: str = DEFAULT_STRATEGY
    beside: str = ""
    kind: str = ""
    since: str = ""
    until: str = ""
    folder: str = ""
    k: str = "10"

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Ask:
        """From the parameters of a request; what is blank has its default."""
        return from_address(cls, given)

    @property
    def strategies(self) -> list[str]:
        """One, or two to stand side by side."""
        return [self.strategy] if self.beside in ("", self.strategy) else [self.strategy, self.beside]

    @property
    def filtered(self) -> bool:
        """Whether any filter is set."""
        return any((self.kind, self.since, self.until, self.folder))

    @property
    def address(self) -> str:
        """Of the page that shows this; defaults are left out."""
        plain = asdict(Ask())
        given = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return "/?" + urlencode(given) if given else "/"

    def without_filters(self) -> Ask:
        """The same question to all documents."""
        return Ask(self.q, self.strategy, self.beside, k=self.k)

    def count(self, most: int) -> int:
        """``k`` as a number.

        Raises:
            InputError: it is none, or not from 1 to ``most``.
        """
        most = min(most, MOST_HITS)
        if not self.k.isascii() or not self.k.isdigit() or not 1 <= int(self.k[:9]) <= most:
            raise InputError(f"The number of results is {self.k!r}; give a whole number from 1 to {most}.")
        return int(self.k)

    def where(self) -> str | None:
        """The filters in the language of :func:`polyhead.search.filters.compile_filter`; None without any.

        Raises:
            InputError: a day that cannot be read.
        """
        tests = []
        if self.kind:
            tests.append(f"kind = {quoted(self.kind)}")
        if self.since:
            tests.append(f"modified >= {quoted(_day(self.since).isoformat())}")
        if self.until:
            tests.append(f"modified < {quoted(_day(self.until, 1).isoformat())}")
        folder = self.folder.strip("/")
        if folder:
            # From "docs/" up to "docs0", the character after "/": a prefix, in which % and _ stand for themselves.
            below = [
                f"path >= {quoted(f'{root}{folder}/')} AND path < {quoted(f'{root}{folder}0')}" for root in ("", POSTED)
            ]
            tests.append(f"({below[0]} OR {below[1]})")
        return " AND ".join(tests) or None


def _day(text: str, later: int = 0) -> date:
    try:
        return date.fromisoformat(text) + timedelta(later)
    except (ValueError, OverflowError):
        raise InputError(f"The date {text!r} cannot be read; give one such as 2026-01-31.") from None


class Choices(NamedTuple):
    """What an index holds to filter by, for one of its versions."""

    version: int
    kinds: list[str]
    folders: list[str]


def choices_of(index: Index, known: Choices | None = None) -> Choices:
    """The kinds and folders of an index; ``known`` where the index has not changed since."""
    version = index.store.version
    if known is not None and known.version == version:
        return known
    kinds = sorted(set(index.store.rows(["kind"])["kind"].unique().to_pylist()))
    folders: set[str] = set()
    for path in index.store.files()["path"].to_pylist():
        folders.update(str(one) for one in PurePosixPath(path.removeprefix(POSTED)).parents)
    folders -= {".", "/"}
    return Choices(version, kinds, sorted(folders)[:MOST_FOLDERS])
