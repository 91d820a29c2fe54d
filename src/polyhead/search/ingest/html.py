"""HTML to readable text, by lxml (which repairs what browsers repair)."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any

from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar, TextBuilder, one_line
from polyhead.search.ingest.encoding import Encoding, decode, read_bytes
from polyhead.search.ingest.plain import encoding_attributes, file_title

__all__ = ["fragment_blocks", "read_html"]

_SKIPPED = {"script", "style", "noscript", "template", "svg", "nav", "iframe", "object", "canvas", "head", "select"}
_SKIPPED |= {"button", "datalist"}
_HEADINGS = {f"h{level}" for level in range(1, 7)}
_BLOCKS = {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl"}
_BLOCKS |= {"dt", "fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "html", "legend", "li"}
_BLOCKS |= {"main", "menu", "ol", "option", "p", "pre", "search", "section", "summary", "table", "tbody", "tfoot"}
_BLOCKS |= {"thead", "tr", "ul"}
_BLOCKS |= _HEADINGS
_TIGHT = {"li", "tr", "dd"}
_LINE, _CELL = "\x00", "\x01"  # stand for <br> and the border of a table cell; HTML text cannot hold them
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META = {"author", "description", "keywords"}


def read_html(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document, without scripts, styles, navigation and hidden parts. Title: <title>, else the first heading."""
    source, encoding = _decode(read_bytes(stamp), stamp.path, log)
    root, broken_off = _parse(source)
    if broken_off:
        log.lost(f"part of the page could not be parsed: {broken_off}")
    if root is None:
        return
    builder = TextBuilder()
    _Walk(builder).run(root)
    if not builder.text:
        return
    title = one_line(root.findtext(".//head/title") or "")
    title = title or (builder.headings[0][1] if builder.headings else file_title(stamp))
    attributes: dict[str, Scalar] = encoding_attributes(encoding)
    if language := (root.get("lang") or root.get("{http://www.w3.org/XML/1998/namespace}lang")):
        attributes["language"] = language
    for meta in root.iterfind(".//meta[@name]"):
        name, content = meta.get("name").lower(), one_line(meta.get("content") or "")
        if name in _META and content:
            attributes[name] = content
    yield Document(stamp.path, builder.text, stamp.path, title, stamp.kind, attributes, builder.headings)


def fragment_blocks(source: str) -> list[str]:
    """The readable blocks of a piece of HTML (inside Markdown)."""
    root, _ = _parse(source)
    if root is None:
        return []
    builder = TextBuilder()
    _Walk(builder).run(root)
    return [builder.text] if builder.text else []


def _decode(data: bytes, path: str, log: ProblemLog) -> tuple[str, Encoding]:
    """A declared encoding is believed where it fits the bytes; else as for plain text."""
    declared = _CHARSET.search(data[:4096])
    if declared and not data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            name = codecs.lookup(declared[1].decode("ascii")).name
            name = "cp1252" if name in ("iso8859-1", "ascii") else name  # as browsers do
            if name != "utf-8" and not name.startswith("utf-16"):
                return data.decode(name), Encoding(name)
        except (LookupError, UnicodeError):
            pass
    return decode(data, path, log)


def _parse(source: str) -> tuple[Any | None, str]:
    """The tree, and what made the parser break off (only nesting deeper than 2,048 is known to)."""
    from lxml import etree, html

    if not source.strip():
        return None, ""
    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = html.document_fromstring(source.encode("utf-8", "replace"), parser=parser)
    except etree.ParserError:  # nothing but comments
        return None, ""
    fatal = [entry for entry in parser.error_log if entry.level == etree.ErrorLevels.FATAL]
    return root, f"line {fatal[0].line}: {fatal[0].message}" if fatal else ""


class _Walk:
    """One pass over the tree, without recursion, collecting inline text until a block begins or ends."""

    def __init__(self, builder: TextBuilder) -> None:
        self._builder = builder
        self._inline: list[str] = []
        self._prefix = ""
        self._tight = False
        self._preformatted = 0

    def run(self, root: Any) -> None:
        from lxml import etree

        events = etree.iterwalk(root, events=("start", "end"))
        for event, element in events:
            tag = element.tag
            if event == "start":
                if _is_skipped(element):
                    events.skip_subtree()
                    continue
                self._start(tag, element)
                self._inline.append(element.text or "")
            else:
                if not _is_skipped(element):
                    self._end(tag)
                self._inline.append(element.tail or "")
        self._flush()

    def _start(self, tag: str, element: Any) -> None:
        if tag in _BLOCKS:
            self._flush()
            self._tight = self._tight or tag in _TIGHT
        if tag == "pre":
            self._preformatted += 1
        elif tag == "li":
            self._prefix = "- "
        elif tag == "br":
            self._inline.append(_LINE)
        elif tag == "img":
            self._inline.append(f" {element.get('alt') or ''} ")

    def _end(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._flush(heading=True)
        elif tag in ("td", "th"):
            self._inline.append(_CELL)
        elif tag in _BLOCKS:
            self._flush()
            self._prefix = "" if tag == "li" else self._prefix
            self._tight = self._tight and tag not in _TIGHT
        if tag == "pre":
            self._preformatted -= 1

    def _flush(self, *, heading: bool = False) -> None:
        raw, self._inline = "".join(self._inline), []
        if self._preformatted:
            text = raw.replace(_LINE, "\n").replace(_CELL, " ")
        else:
            cells = ["\n".join(line for line in map(one_line, cell.split(_LINE)) if line) for cell in raw.split(_CELL)]
            text = " | ".join(cells).strip(" |") if len(cells) > 1 else cells[0]
        if not text.strip():
            return
        if heading:
            self._builder.heading(text)
        else:
            self._builder.block(self._prefix + text, tight=self._tight)
            self._prefix = ""
        self._tight = False


def _is_skipped(element: Any) -> bool:
    if element.tag in _SKIPPED:
        return True
    attributes = element.attrib
    if not attributes:
        return False
    style = attributes.get("style", "")
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
        or (element.tag == "a" and "headerlink" in attributes.get("class", ""))
        or (bool(style) and "display:none" in style.replace(" ", "").lower())
    )
