"""The page of heads: a score as a heatmap, a head with what it attends to, and what changes when it is acted on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from polyhead.errors import InputError
from polyhead.serve.pages.bench import IMPORTANCE, MEASURES, Attention, Bench, Map
from polyhead.serve.pages.headacts import change, gain_of

if TYPE_CHECKING:
    from polyhead.serve.pages.site import Site

__all__ = ["Look", "add_heads"]

MOST_TEXTS, MOST_CHARACTERS = 32, 4_000
TEXT = "The river rises in the hills, and it meets the sea in the west."
TEXTS = f"{TEXT}\nEvery head of a Transformer looks at the tokens in its own way.\nWho wrote the letter that she read?"


@dataclass(frozen=True)
class Look:
    """What the page shows, as it was typed; each field is a parameter of the address.

    Attributes:
        score: of :data:`polyhead.serve.pages.bench.MEASURES`; "" takes the importance where the index has it.
        texts: one a line, that scores of attention are measured on.
        layer, head: the head that is looked at; "" for none.
        text: whose attention is shown.
    """

    score: str = ""
    texts: str = TEXTS
    layer: str = ""
    head: str = ""
    text: str = TEXT

    @classmethod
    def read(cls, given: Mapping[str, str], **more: str) -> Look:
        """From the parameters of a request; what is blank has its default.

        Raises:
            InputError: more text than is measured here.
        """
        known = {field.name: given.get(field.name, "").replace("\r\n", "\n").strip() for field in fields(cls)}
        look = cls(**{**{name: value for name, value in known.items() if value}, **more})
        longest = max(len(look.texts), len(look.text))
        if longest > MOST_CHARACTERS or len(look.lines) > MOST_TEXTS:
            raise InputError(
                f"{len(look.lines)} texts with {longest:,} characters were given; at most {MOST_TEXTS} texts and "
                f"{MOST_CHARACTERS:,} characters are measured here. `polyhead heads measure` takes any number."
            )
        return look

    @property
    def lines(self) -> tuple[str, ...]:
        """The texts."""
        return tuple(line.strip() for line in self.texts.splitlines() if line.strip())

    @property
    def place(self) -> tuple[int, int] | None:
        """Layer and head; None where none was chosen.

        Raises:
            InputError: they are no numbers.
        """
        if not self.layer and not self.head:
            return None
        if not all(one.isascii() and one.isdigit() for one in (self.layer, self.head)):
            raise InputError(f"Layer {self.layer!r}, head {self.head!r} names no head; give two numbers, from 0.")
        return int(self.layer[:9]), int(self.head[:9])

    @property
    def address(self) -> str:
        """Of the page that shows this; defaults are left out."""
        plain = asdict(Look())
        given = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return "/app/heads?" + urlencode(given) if given else "/app/heads"

    def at(self, layer: int, head: int) -> str:
        """The address with a head chosen."""
        return Look(self.score, self.texts, str(layer), str(head), self.text).address + "#head"


def add_heads(app: FastAPI, site: Site) -> None:
    """Add the page ``/app/heads`` and the parts of it that htmx asks for."""
    bench = Bench(site.service)
    _add_one_head(app, site, bench)

    @app.get("/app/heads", include_in_schema=False)
    async def heads_page(request: Request) -> HTMLResponse:
        """The heatmap of a score and, where one is chosen, a head; what takes the model alone is asked for after."""
        look, trouble = Look(), None
        values: dict[str, Any] = {"map": None, "shown": None}
        importance = await site.run(bench.importance)
        try:
            look = Look.read(request.query_params)
            key = look.score or (IMPORTANCE if importance is not None else "")
            values["map"] = await site.run(_drawn, bench, look, key) if key else None
            values["shown"] = await site.run(_head, bench, look) if look.place else None
        except InputError as error:  # the form stays, so that another score can be chosen
            trouble = str(error)
        measures = {key: said for key, said in MEASURES.items() if key != IMPORTANCE or importance is not None}
        return site.page(
            "heads.html",
            status=422 if trouble else 200,
            here="Heads",
            look=look,
            measures=measures,
            trouble=trouble,
            **values,
        )

    @app.get("/app/heads/map", include_in_schema=False)
    async def heads_map(request: Request) -> HTMLResponse:
        """The heatmap alone."""
        look = Look.read(request.query_params)
        drawn = await site.run(_drawn, bench, look, look.score or "attention-entropy")
        page = site.page("_headmap.html", look=look, map=drawn)
        page.headers["HX-Replace-Url"] = look.address
        return page


def _add_one_head(app: FastAPI, site: Site, bench: Bench) -> None:
    @app.get("/app/heads/{layer}/{head}", include_in_schema=False)
    async def head_part(request: Request, layer: int, head: int) -> HTMLResponse:
        """A head: its ranks, and its attention on a text."""
        look = Look.read(request.query_params, layer=str(layer), head=str(head))
        page = site.page("_head.html", look=look, shown=await site.run(_head, bench, look))
        page.headers["HX-Replace-Url"] = look.address
        return page

    @app.get("/app/heads/{layer}/{head}/change", include_in_schema=False)
    async def head_change(request: Request, layer: int, head: int) -> HTMLResponse:
        """What changes when the head is masked or scaled."""
        given = request.query_params
        gain = 0.0 if given.get("mask") else gain_of(given.get("gain", "0"))
        text, other = (given.get(name, "").strip() for name in ("question", "other"))
        if max(len(text), len(other)) > MOST_CHARACTERS:
            raise InputError(
                f"At most {MOST_CHARACTERS:,} characters are run here, got {max(len(text), len(other)):,}."
            )
        found = await site.run(change, bench, site.service.index, (layer, head), gain, text, other)
        return site.page("_change.html", change=found, layer=layer, head=head, gain=gain)


def _drawn(bench: Bench, look: Look, key: str) -> dict[str, Any]:
    """A map as the template and Plotly take it."""
    found = bench.map(key, look.lines)
    plain = [[round(value, 6) if np.isfinite(value) else None for value in row] for row in found.values.tolist()]
    known = found.values[np.isfinite(found.values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    figure = {
        "kind": "heatmap",
        "x": [str(head) for head in range(found.values.shape[1])],
        "y": [str(layer) for layer in found.layers],
        "z": plain,
        "name": found.title,
    }
    # Never so strong that the number in the cell cannot be read.
    shades = [[0.0 if v is None else round(0.4 * (v - low) / ((high - low) or 1.0), 3) for v in row] for row in plain]
    return {"map": found, "rows": plain, "shades": shades, "figure": json.dumps(figure)}


def _head(bench: Bench, look: Look) -> dict[str, Any]:
    """All that is known of a head; where the model cannot be looked into, its ranks and why."""
    assert look.place is not None
    layer, head = look.place
    attention: Attention | None = None
    told = ""
    try:
        attention = bench.attention(layer, head, look.text)
        bench.map("attention-entropy", look.lines)  # all statistics of attention, from one pass
        with bench.model() as model:
            decoder = getattr(model.module, "lm_head", None) is not None
    except InputError as error:
        told, decoder = str(error), False
    maps: list[Map] = bench.at_hand(look.lines)
    places = [(one, one.place(layer, head)) for one in maps]
    if told and all(place is None for _, place in places):
        raise InputError(told)
    return {"layer": layer, "head": head, "attention": attention, "told": told, "places": places, "decoder": decoder}
