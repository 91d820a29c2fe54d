"""Cards for people (a table, a page) and for machines (JSON). Nothing is printed here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from polyhead.papers.cards import STATES, Paper, evidence

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["explain", "table", "to_json"]

_COLOURS = {"planned": "dim", "partial": "yellow", "works": "green"}


def table(papers: Iterable[Paper]) -> Table:
    """A Rich table, one row a paper, with the number of papers in each state below it.

    Example:
        >>> from polyhead.papers import find, table
        >>> table([find("mrag")]).row_count
        1
    """
    from rich.table import Table
    from rich.text import Text

    papers = list(papers)
    states = Counter(card.state for card in papers)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    papers_word = "paper" if len(papers) == 1 else "papers"
    result = Table(caption=f"{len(papers)} {papers_word}" + (f": {counts}" if counts else ""), caption_justify="left")
    result.add_column("id", no_wrap=True)
    for name in ("family", "kind", "state"):
        result.add_column(name, no_wrap=True)
    result.add_column("title", ratio=1)
    for card in papers:
        state = Text(card.state, style=_COLOURS[card.state])
        # Text, not str: a title with square brackets is no markup.
        result.add_row(card.id, card.family, card.kind, state, Text(card.title))
    return result


def explain(paper: Paper) -> RenderableType:
    """One paper for a person: what it is, what it claims, the code that has it, and our latest evidence.

    The claim is marked as the paper's word; where no claim of ours has run, the page says so.

    Example:
        >>> from rich.console import Console
        >>> from polyhead.papers import explain, find
        >>> Console().print(explain(find("mrag")))  # doctest: +SKIP
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    blocks: list[RenderableType] = [
        Text.assemble((paper.title, "bold")),
        Text(f"{paper.id} · {paper.family} · {paper.kind} · {_arxiv(paper)}", style="dim"),
    ]

    def section(heading: str, lines: Iterable[str]) -> None:
        blocks.append(Text(f"\n{heading}", style="bold"))
        blocks.extend(Padding(Text(line), (0, 0, 0, 2)) for line in lines)

    section("What it is", [paper.summary])
    section("What the paper claims (its word, not our result)", [paper.claim])
    code = list(paper.code) or ["none yet"]
    section(f"In Polyhead: {paper.state}", code + ([f"documentation: {paper.docs}"] if paper.docs else []))
    section("Our evidence", _evidence_lines(paper))
    return Group(*blocks)


def _arxiv(paper: Paper) -> str:
    if paper.arxiv is None:
        return "not on arXiv as far as we know"
    return f"arXiv:{paper.arxiv}" + ("" if paper.arxiv_checked else " (id not checked)")


def _evidence_lines(paper: Paper) -> list[str]:
    found = evidence(paper.id)
    if found is None:
        reason = f"{paper.claim_file} has not run" if paper.claim_file else "the claim has no experiment"
        return [f"no evidence yet: {reason}"]
    return [f"{key}: {value}" for key, value in found.items()]


def to_json(papers: Paper | Iterable[Paper]) -> str:
    """Cards as JSON: an object for one paper, a list for several; each with its ``evidence``, ``null`` where none.

    Example:
        >>> import json
        >>> from polyhead.papers import find, to_json
        >>> json.loads(to_json(find("mqa")))["family"]
        'attention'
    """

    def card(paper: Paper) -> dict[str, Any]:
        return {**asdict(paper), "evidence": evidence(paper.id)}

    content = card(papers) if isinstance(papers, Paper) else [card(paper) for paper in papers]
    return json.dumps(content, indent=2, ensure_ascii=False)
