"""The language of ``--where``: parsed, checked against the columns, and written again as SQL that is safe to run."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import NamedTuple

from polyhead.errors import InputError

__all__ = ["COLUMNS", "compile_filter", "is_one_of", "quoted"]

COLUMNS: dict[str, str] = {
    "id": "text",
    "doc_id": "text",
    "path": "text",
    "title": "text",
    "heading": "text",
    "kind": "text",
    "text": "text",
    "content_hash": "text",
    "size": "number",
    "start": "number",
    "end": "number",
    "modified": "time",
}
"""Column -> what its values are; beside these, ``attributes.NAME`` reads one attribute of a document."""

_MOST_CHARACTERS = 20_000
_DEEPEST = 12  # LanceDB reads about four times that
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
  | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<name>attributes\.(?:`[^`]+`|[^\W\d][\w-]*) | `[^`]+` | [^\W\d]\w*)
  | (?P<sign><=|>=|!=|<>|==|=|<|>|\(|\)|,)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_WORDS = {"and", "or", "not", "in", "like", "ilike", "between", "is", "null", "true", "false"}
_COMPARISONS = {"=": "=", "==": "=", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class _Token(NamedTuple):
    kind: str  # "text" | "number" | "name" | "word" | "sign" | "end"
    value: str
    at: int


def compile_filter(where: str | None) -> str | None:
    """Check a filter expression and write it as SQL for LanceDB; None and blanks mean no filter.

    Operators: ``= != < <= > >=``, ``IN (...)``, ``LIKE`` and ``ILIKE`` (``%`` any text, ``_`` any character; the second
    takes no notice of case), ``BETWEEN a AND b``, each also with ``NOT``, and ``IS [NOT] NULL``; joined by ``AND``,
    ``OR``, ``NOT`` and parentheses. Texts stand in single quotes, a quote inside is doubled; times
    are texts such as ``'2026-01-31'`` or ``'2026-01-31T12:00:00+02:00'`` (UTC without an offset). As in SQL, a
    comparison with a missing value is never true, so ``title != 'x'`` leaves out rows without a title.

    Raises:
        InputError: the expression cannot be read, or names an unknown column, or compares a column with a value of
            another type.

    Example:
        >>> compile_filter("kind = 'pdf' and size > 1000")
        "((`kind` = 'pdf') AND (`size` > 1000))"
    """
    if where is None or not where.strip():
        return None
    if len(where) > _MOST_CHARACTERS:
        raise InputError(f"The filter has {len(where):,} characters; at most {_MOST_CHARACTERS:,} are taken.")
    return _Parser(where).run()


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = self._split()
        self._next = 0
        self._depth = 0

    def run(self) -> str:
        sql = self._either()
        if self._peek.kind != "end":
            raise self._error("expected AND, OR or the end")
        return sql

    def _split(self) -> list[_Token]:
        tokens, at, source = [], 0, self._source.rstrip()
        while at < len(source):
            match = _TOKEN.match(source, at)
            if match is None:
                hint = (
                    "texts stand in single quotes: kind = 'pdf'" if '"' in source[at : at + 3] else "cannot read this"
                )
                raise self._error(hint, at)
            kind = str(match.lastgroup)
            value, start = match.group(kind), match.start(kind)
            if kind == "name" and value.lower() in _WORDS:
                kind, value = "word", value.lower()
            tokens.append(_Token(kind, value, start))
            at = match.end()
        return [*tokens, _Token("end", "", len(source))]

    @property
    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, kind: str, *values: str) -> _Token | None:
        token = self._peek
        if token.kind != kind or (values and token.value not in values):
            return None
        self._next += 1
        return token

    def _error(self, problem: str, at: int | None = None) -> InputError:
        at = self._peek.at if at is None else at
        return InputError(
            f"The filter cannot be used: {problem}, at character {at + 1}: "
            f"{self._source[:at]} >>> {self._source[at:] or 'end'}\n"
            "Expected something like: kind = 'pdf' AND (size > 1000 OR title LIKE '%report%')"
        )

    def _either(self) -> str:
        parts = [self._both()]
        while self._take("word", "or"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def _both(self) -> str:
        parts = [self._maybe_not()]
        while self._take("word", "and"):
            parts.append(self._maybe_not())
        return parts[0] if len(parts) == 1 else f"({' AND '.join(parts)})"

    def _maybe_not(self) -> str:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"nested deeper than {_DEEPEST} levels")
        if self._take("word", "not"):
            sql = f"(NOT {self._maybe_not()})"
        elif self._take("sign", "("):
            sql = self._either()
            if not self._take("sign", ")"):
                raise self._error("expected ')'")
        else:
            sql = self._comparison()
        self._depth -= 1
        return sql

    def _comparison(self) -> str:
        token = self._take("name")
        if token is None:
            raise self._error("expected a column name")
        column = self._column(token)
        if sign := self._take("sign", *_COMPARISONS):
            return column.compare(_COMPARISONS[sign.value], self._literal(column))
        if self._take("word", "is"):
            negated = self._take("word", "not") is not None
            if not self._take("word", "null"):
                raise self._error("expected NULL")
            return column.is_null(negated)
        negated = self._take("word", "not") is not None
        if like := self._take("word", "like", "ilike"):
            return column.like(like.value.upper(), self._literal(column), negated)
        if self._take("word", "between"):
            low = column.compare(">=", self._literal(column))
            if not self._take("word", "and"):
                raise self._error("expected AND between the two bounds of BETWEEN")
            both = f"({low} AND {column.compare('<=', self._literal(column))})"
            return f"(NOT {both})" if negated else both
        if self._take("word", "in"):
            return column.one_of(self._list(column), negated)
        raise self._error("expected =, !=, <, <=, >, >=, IN, LIKE, BETWEEN or IS NULL after the column")

    def _column(self, token: _Token) -> _Column:
        name = token.value
        if name.lower().startswith("attributes."):
            return _Attribute(name[len("attributes.") :].strip("`"), self, token.at)
        name = name.strip("`")
        known = {column.lower(): column for column in COLUMNS}
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            raise self._error(
                f"there is no column '{name}'" + (f", did you mean '{near[0]}'?" if near else "") + " The columns are "
                f"{', '.join(COLUMNS)}, and attributes.NAME for an attribute of the documents",
                token.at,
            )
        return _Column(known[name.lower()], self, token.at)

    def _list(self, column: _Column) -> list[_Token]:
        if not self._take("sign", "("):
            raise self._error("expected '(' after IN")
        values = [self._literal(column)]
        while self._take("sign", ","):
            values.append(self._literal(column))
        if not self._take("sign", ")"):
            raise self._error("expected ',' or ')'")
        return values

    def _literal(self, column: _Column) -> _Token:
        token = self._take("text") or self._take("number") or self._take("word", "true", "false")
        if token is None:
            hint = "; a text stands in single quotes" if self._peek.kind == "name" else ""
            raise self._error(f"expected a value to compare '{column.name}' with{hint}")
        return token


def _plain(token: _Token) -> str:
    return token.value[1:-1].replace("''", "'")


def _number(token: _Token) -> float:
    return float(token.value)


def quoted(text: str) -> str:
    """A text of the filter language, and of SQL; quotes in it are doubled, so that it ends where it should."""
    return "'" + text.replace("'", "''") + "'"


def is_one_of(column: str, values: Iterable[str]) -> str:
    """SQL for "``column`` is one of ``values``", of which there is at least one."""
    return f"`{column}` IN ({', '.join(map(quoted, values))})"


class _Column:
    """One column in an expression, and how comparisons with it are written."""

    def __init__(self, name: str, parser: _Parser, at: int) -> None:
        self.name = name
        self._parser = parser
        self._at = at

    def compare(self, sign: str, value: _Token) -> str:
        return f"({self._left(value)} {sign} {self._value(value)})"

    def one_of(self, values: list[_Token], negated: bool) -> str:
        listed = ", ".join(self._value(value) for value in values)
        return f"({self._left(*values)} {'NOT ' if negated else ''}IN ({listed}))"

    def like(self, sign: str, pattern: _Token, negated: bool) -> str:
        if COLUMNS[self.name] != "text":
            raise self._parser._error(
                f"LIKE needs a column of text, and '{self.name}' is a {COLUMNS[self.name]}", self._at
            )
        return f"(`{self.name}` {'NOT ' if negated else ''}{sign} {self._value(pattern)})"

    def is_null(self, negated: bool) -> str:
        return f"(`{self.name}` IS {'NOT ' if negated else ''}NULL)"

    def _left(self, *values: _Token) -> str:
        # Whole-number columns meet only whole numbers in LanceDB, and only those can use an index.
        if any(value.kind == "number" and not _number(value).is_integer() for value in values):
            return f"CAST(`{self.name}` AS DOUBLE)"
        return f"`{self.name}`"

    def _value(self, token: _Token) -> str:
        wanted = COLUMNS[self.name]
        if token.kind != ("number" if wanted == "number" else "text"):
            example = {"text": "'words'", "number": "1000", "time": "'2026-01-31'"}[wanted]
            raise self._parser._error(
                f"'{self.name}' is compared with {token.value}, expected a {wanted} such as {example}", token.at
            )
        if wanted == "number":
            return self._checked_number(token)
        if wanted == "text":
            return quoted(_plain(token))
        try:
            moment = datetime.fromisoformat(_plain(token).strip().replace("Z", "+00:00"))
            if moment.tzinfo is not None:
                moment = moment.astimezone(timezone.utc).replace(tzinfo=None)
        except (ValueError, OverflowError):
            raise self._parser._error(f"{token.value} is no time such as '2026-01-31 12:00'", token.at) from None
        return f"timestamp '{moment.isoformat(sep=' ', timespec='microseconds')}'"

    def _checked_number(self, token: _Token) -> str:
        number = _number(token)
        if not abs(number) < 2**63:
            raise self._parser._error(f"{token.value} is larger than any number stored", token.at)
        if not number.is_integer():
            return repr(number)
        return str(int(token.value)) if token.value.lstrip("+-").isdigit() else str(int(number))


class _Attribute(_Column):
    """One key of the JSON text in ``attributes``: no blanks, one level, so that a pattern finds its value."""

    def _token(self, value: str) -> str:
        key = re.escape(json.dumps(self.name, ensure_ascii=False))
        return f"regexp_match(attributes, {quoted(f'[{{,]{key}:({value})[,}}]')})[1]"

    @property
    def _any(self) -> str:
        return self._token(r'"(?:[^"\\]|\\.)*"|[^",}]+')

    def compare(self, sign: str, value: _Token) -> str:
        if value.kind == "number":
            return f"(CAST({self._token('-?[0-9][0-9.eE+-]*')} AS DOUBLE) {sign} {self._checked_number(value)})"
        if value.kind == "text" and sign not in ("=", "!="):
            text = self._token(r'"(?:[^"\\]|\\.)*"')
            return f"({text} {sign} {self._value(value)})"
        return f"({self._any} {sign} {self._value(value)})"

    def one_of(self, values: list[_Token], negated: bool) -> str:
        join, sign = (" AND ", "!=") if negated else (" OR ", "=")
        return f"({join.join(self.compare(sign, value) for value in values)})"

    def like(self, sign: str, pattern: _Token, negated: bool) -> str:
        return f"({self._any} {'NOT ' if negated else ''}{sign} {self._value(pattern)})"

    def is_null(self, negated: bool) -> str:
        return f"({self._any} IS {'NOT ' if negated else ''}NULL)"

    def _value(self, token: _Token) -> str:
        return quoted(json.dumps(_plain(token), ensure_ascii=False)) if token.kind == "text" else quoted(token.value)
