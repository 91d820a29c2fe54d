"""Filter expressions: parsed and written again, never pasted into SQL."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polyhead.errors import InputError

__all__ = ["FILTER_COLUMNS", "parse_filter", "quote"]

FILTER_COLUMNS = ("id", "doc_id", "path", "title", "heading", "kind", "size", "modified", "start", "end", "text")

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>'(?:[^']|'')*') | (?P<number>-?\d+(?:\.\d+)?) | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<operator><=|>=|!=|<>|=|<|>) | (?P<mark>[(),])
    )""",
    re.VERBOSE,
)
_KEYWORDS = {"and", "or", "not", "in", "like", "is", "null", "true", "false", "between", "ilike"}
_OPERATORS = {"=", "!=", "<>", "<", "<=", ">", ">="}


def quote(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def parse_filter(expression: str, columns: Sequence[str] = FILTER_COLUMNS) -> str:
    """Check a filter expression and write it again as safe SQL.

    Understood: comparisons (``=  !=  <  <=  >  >=``), ``[NOT] IN (...)``, ``[NOT] LIKE``, ``[NOT] BETWEEN a AND b``,
    ``IS [NOT] NULL``, ``AND``, ``OR``, ``NOT`` and parentheses, over the columns of the index. ``modified`` is
    compared with a date: ``modified >= '2026-01-31'``.

    Raises:
        InputError: says what was expected where.

    Example:
        >>> parse_filter("kind='pdf' and size > 1000")
        "(kind = 'pdf' AND size > 1000)"
    """
    parser = _Parser(expression, columns)
    return parser.parse()


class _Parser:
    def __init__(self, expression: str, columns: Sequence[str]) -> None:
        self.expression = expression
        self.columns = tuple(columns)
        self.tokens = self._tokens()
        self.at = 0

    def parse(self) -> str:
        if not self.tokens:
            raise InputError("The filter is empty. Expected an expression such as: kind = 'pdf' AND size > 1000")
        result = self._or()
        if self.at < len(self.tokens):
            raise self._error("AND, OR or the end")
        return result

    def _tokens(self) -> list[tuple[str, str]]:
        tokens, position = [], 0
        text = self.expression.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise InputError(
                    f"The filter {self.expression!r} cannot be read at {text[position:].strip()[:20]!r}. "
                    "Strings stand in single quotes: kind = 'pdf'"
                )
            kind = str(match.lastgroup)
            tokens.append((kind, match.group(kind)))
            position = match.end()
        return tokens

    def _error(self, expected: str) -> InputError:
        found = self.tokens[self.at][1] if self.at < len(self.tokens) else "the end"
        return InputError(
            f"The filter {self.expression!r} has {found!r} where {expected} was expected. "
            f"Columns: {', '.join(self.columns)}. Example: kind = 'pdf' AND size > 1000"
        )

    def _word(self, *words: str) -> bool:
        if self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if kind == "word" and text.lower() in words:
                self.at += 1
                return True
        return False

    def _mark(self, mark: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at] == ("mark", mark):
            self.at += 1
            return True
        return False

    def _expect(self, done: bool, expected: str) -> None:
        if not done:
            raise self._error(expected)

    def _or(self) -> str:
        terms = [self._and()]
        while self._word("or"):
            terms.append(self._and())
        return terms[0] if len(terms) == 1 else "(" + " OR ".join(terms) + ")"

    def _and(self) -> str:
        terms = [self._not()]
        while self._word("and"):
            terms.append(self._not())
        return terms[0] if len(terms) == 1 else "(" + " AND ".join(terms) + ")"

    def _not(self) -> str:
        if self._word("not"):
            return f"(NOT {self._not()})"
        if self._mark("("):
            inner = self._or()
            self._expect(self._mark(")"), "a closing parenthesis")
            return f"({inner})"
        return self._comparison()

    def _comparison(self) -> str:
        column = self._column()
        if self._word("is"):
            negated = "NOT " if self._word("not") else ""
            self._expect(self._word("null"), "NULL")
            return f"{column} IS {negated}NULL"
        negated = "NOT " if self._word("not") else ""
        if self._word("in"):
            self._expect(self._mark("("), "an opening parenthesis")
            values = [self._value(column)]
            while self._mark(","):
                values.append(self._value(column))
            self._expect(self._mark(")"), "a comma or a closing parenthesis")
            return f"{column} {negated}IN ({', '.join(values)})"
        if self._word("like"):
            return f"{column} {negated}LIKE {self._value(column)}"
        if self._word("between"):
            low = self._value(column)
            self._expect(self._word("and"), "AND")
            return f"{column} {negated}BETWEEN {low} AND {self._value(column)}"
        if negated:
            raise self._error("IN, LIKE or BETWEEN")
        if self.at < len(self.tokens) and self.tokens[self.at][1] in _OPERATORS:
            operator = self.tokens[self.at][1]
            self.at += 1
            return f"{column} {operator} {self._value(column)}"
        raise self._error("a comparison")

    def _column(self) -> str:
        if self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if kind == "word" and text.lower() not in _KEYWORDS:
                if text not in self.columns:
                    raise InputError(
                        f"The filter {self.expression!r} names the column {text!r}, which an index does not have. "
                        f"Columns: {', '.join(self.columns)}."
                    )
                self.at += 1
                return f'"{text}"' if text == "end" else text  # END is a word of SQL itself
        raise self._error("a column")

    def _value(self, column: str) -> str:
        if self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if kind in ("string", "number") or (kind == "word" and text.lower() in ("true", "false")):
                self.at += 1
                if column == "modified":
                    return f"timestamp {text if kind == 'string' else quote(text)}"
                return text
        raise self._error("a value: a number, or a string in single quotes")
