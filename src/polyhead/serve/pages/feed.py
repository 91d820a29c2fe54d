"""The Atom feed of what became true last."""

from __future__ import annotations

import uuid
from xml.etree import ElementTree

from polyhead.papers import catalogue, evidence
from polyhead.serve.pages.evidenceview import found_on, said_of

__all__ = ["atom"]

NAMESPACE = "http://www.w3.org/2005/Atom"
HOME = "https://github.com/polyhead/polyhead/papers/"
MOST = 50
_UNWRITABLE = {code: None for code in range(32) if chr(code) not in "\t\n\r"}


def atom(base: str) -> bytes:
    """The evidence found last, newest first, as an Atom feed.

    Args:
        base: address of this service, without a slash at its end.
    """
    known = [(card, found) for card in catalogue().values() if (found := evidence(card.id)) is not None]
    dated = sorted(((*found_on(card.id, found), card, found) for card, found in known), key=lambda one: one[2].id)
    dated.sort(key=lambda one: one[0], reverse=True)
    feed = ElementTree.Element("feed", {"xmlns": NAMESPACE, "xml:lang": "en"})
    _add(feed, "title", "Polyhead: what became true last")
    _add(feed, "subtitle", "What papers report, tried here. Evidence without a date has the time it came here.")
    _add(feed, "id", uuid.uuid5(uuid.NAMESPACE_URL, HOME).urn)
    _add(feed, "updated", dated[0][0].isoformat() if dated else "1970-01-01T00:00:00+00:00")
    _add(_add(feed, "author"), "name", "Polyhead")
    _add(feed, "link", rel="self", href=f"{base}/app/papers.atom", type="application/atom+xml")
    _add(feed, "link", rel="alternate", href=f"{base}/app/papers", type="text/html")
    for when, says, card, found in dated[:MOST]:
        entry = _add(feed, "entry")
        _add(entry, "title", f"{found.get('verdict', 'evidence')}: {card.title}")
        _add(entry, "id", uuid.uuid5(uuid.NAMESPACE_URL, HOME + card.id).urn)
        _add(entry, "updated", when.isoformat())
        _add(entry, "link", rel="alternate", href=f"{base}/app/papers/{card.id}", type="text/html")
        _add(entry, "category", term=card.family)
        _add(entry, "summary", said_of(found) + ("" if says else " (When it was found was not kept.)"))
    return ElementTree.tostring(feed, encoding="utf-8", xml_declaration=True)


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    child = ElementTree.SubElement(parent, tag, attributes)
    child.text = None if text is None else text.translate(_UNWRITABLE)
    return child
