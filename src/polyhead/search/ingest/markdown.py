"""Markdown (CommonMark with tables) to readable text, by markdown-it-py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import yaml

from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar, TextBuilder
from polyhead.search.ingest.encoding import read_text
from polyhead.search.ingest.plain import encoding_attributes, file_title

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["read_markdown"]

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)


def read_markdown(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document. Title: of the YAML front matter, else the first heading, else the file's name."""
    from markdown_it import MarkdownIt

    source, encoding = read_text(stamp, log)
    source, front = _front_matter(source)
    builder = TextBuilder()
    _render(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(source), builder)
    if not builder.text:
        return
    title = str(front.pop("title", "")) or (builder.headings[0][1] if builder.headings else file_title(stamp))
    attributes = {**front, **encoding_attributes(encoding)}
    yield Document(stamp.path, builder.text, stamp.path, title, stamp.kind, attributes, builder.headings)


def _front_matter(source: str) -> tuple[str, dict[str, Scalar]]:
    """The text below the YAML block at the top, and the scalars (dates as ISO text, lists joined) of that block."""
    found = _FRONT_MATTER.match(source)
    if found is None:
        return source, {}
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return source, {}  # a rule and a paragraph that looked like one
    if not isinstance(fields, dict):
        return source, {}
    scalars: dict[str, Scalar] = {}
    for name, value in fields.items():
        if isinstance(value, str | int | float | bool):
            scalars[str(name)] = value
        elif isinstance(value, list) and value and all(isinstance(one, str | int | float) for one in value):
            scalars[str(name)] = ", ".join(map(str, value))
        elif hasattr(value, "isoformat"):
            scalars[str(name)] = value.isoformat()
    return source[found.end() :], scalars


def _render(tokens: list[Token], builder: TextBuilder) -> None:
    heading, item, row_of_table = False, "", False
    cells: list[str] = []
    for token in tokens:
        match token.type:
            case "heading_open" | "heading_close":
                heading = token.type == "heading_open"
            case "list_item_open":
                item = f"{token.info}{token.markup} " if token.info else "- "
            case "list_item_close":
                item = ""
            case "tr_open":
                cells = []
            case "td_open" | "th_open":
                row_of_table = True
            case "tr_close":
                row_of_table = False
                builder.block(" | ".join(cells), tight=True)
            case "inline":
                text = _inline(token)
                if heading:
                    builder.heading(text)
                elif row_of_table:
                    cells.append(text)
                else:
                    builder.block(item + text if text.strip() else "", tight=bool(item))
                    item = ""
            case "fence" | "code_block":
                builder.block(token.content)
            case "html_block":
                from polyhead.search.ingest.html import fragment_blocks

                for block in fragment_blocks(token.content):
                    builder.block(block)


def _inline(token: Token) -> str:
    pieces: list[str] = []
    for child in token.children or []:
        match child.type:
            case "softbreak":
                pieces.append(" ")
            case "hardbreak":
                pieces.append("\n")
            case "text" | "code_inline" | "image" | "text_special":  # of an image, the content is its alternative text
                pieces.append(child.content)
            case "html_inline" if child.content.lower().startswith("<br"):
                pieces.append("\n")
    return "".join(pieces)
