"""The catalogue of papers: a card for each, and the mark that ties code to its paper.

``@paper("mrag")`` on a function or class says which paper it implements; ``find("mrag")`` gives the card.
Importing this room reads no file, so a mechanism may use the mark at no cost.

Example:
    >>> from polyhead.papers import find, search_papers
    >>> find("mqa").title
    'Fast Transformer Decoding: One Write-Head is All You Need'
    >>> [card.id for card in search_papers("landmark", family="pooling")]
    ['lmk-pooling']
"""

from __future__ import annotations

from polyhead.papers.cards import Paper, catalogue, evidence, find, search_papers
from polyhead.papers.marks import implementations, paper
from polyhead.papers.render import explain, table, to_json

__all__ = [
    "Paper",
    "catalogue",
    "evidence",
    "explain",
    "find",
    "implementations",
    "paper",
    "search_papers",
    "table",
    "to_json",
]
