"""The three views of a vision Transformer's heads on one page of their own (vit-attention-visual-analytics)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.pattern_codes import AttentionPatternAE, attention_maps
from polyhead.heads.ring_profile import ring_profile
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["vit_report"]

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Heads of $name</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222 }
main { display: flex; flex-wrap: wrap; gap: 2rem } section { max-width: 26rem }
h2 { font-size: 1rem; margin: 0 0 .5rem } svg { background: #fafafa; border: 1px solid #ddd }
.on { stroke: #d33; stroke-width: 2 } p { color: #555; font-size: .85rem }
</style></head><body><h1>Heads of $name</h1>
<p>$images images. Choose a head in the grid, or a map among the codes; every view follows.</p><main>
<section><h2>Importance <select id="metric" aria-label="score"></select></h2><svg id="grid"></svg>
<p id="chosen"></p></section>
<section><h2>Strength: attention by ring around a patch</h2><svg id="rings" width="320" height="200"></svg>
<p>Bars: the head. Ticks: mean of all heads. The last bar is attention on tokens that are no patches.</p></section>
<section><h2>Pattern: codes of attention maps</h2><svg id="codes" width="320" height="320"></svg></section>
<section><h2>Attention map</h2><svg id="map" width="320" height="320"></svg><p>Rows attend to columns.</p></section>
</main><script>
const data = $data;
const get = id => document.getElementById(id), ns = "http://www.w3.org/2000/svg";
const add = (to, kind, given, click) => {
  const one = document.createElementNS(ns, kind);
  for (const key in given) one.setAttribute(key, given[key]);
  if (click) { one.style.cursor = "pointer"; one.addEventListener("click", click); }
  to.appendChild(one); return one;
};
const shade = (value, low, high) => `hsl(215 70% $${95 - 60 * (high > low ? (value - low) / (high - low) : 0)}%)`;
let layer = 0, head = 0, image = 0;
function choose(l, h, i) { layer = l; head = h; image = i; draw(); }
function draw() {
  for (const id of ["grid", "rings", "codes", "map"]) get(id).replaceChildren();
  const values = data.scores[get("metric").value], flat = values.flat().filter(v => v !== null);
  const low = Math.min(...flat), high = Math.max(...flat), side = 40;
  get("grid").setAttribute("width", side * values[0].length);
  get("grid").setAttribute("height", side * values.length);
  values.forEach((row, l) => row.forEach((value, h) => { if (value !== null) {
    const cell = add(get("grid"), "rect", {x: side * h + 1, y: side * l + 1, width: side - 2, height: side - 2,
      fill: shade(value, low, high), class: l === layer && h === head ? "on" : ""}, () => choose(l, h, image));
    add(cell, "title", {}).textContent = `layer $${l} head $${h}: $${value}`; } }));
  get("chosen").textContent = `Layer $${layer}, head $${head}: $${values[layer][head]} (layers downwards, from 0)`;
  const bars = data.rings[layer][head], width = 320 / bars.length;
  bars.forEach((value, r) => {
    const bar = add(get("rings"), "rect", {x: r * width + 4, y: 190 - 180 * value, width: width - 8,
      height: 180 * value, fill: "#48a"});
    add(bar, "title", {}).textContent = `$${r + 1 < bars.length ? "ring " + r : "other tokens"}: $${value}`;
    const y = 190 - 180 * data.mean[r];
    add(get("rings"), "line", {x1: r * width, x2: (r + 1) * width, y1: y, y2: y, stroke: "#333"});
  });
  data.codes.forEach((heads, l) => heads.forEach((points, h) => points.forEach(([x, y, kind], i) => {
    const mine = l === layer && h === head;
    add(get("codes"), "circle", {cx: 10 + 300 * x, cy: 310 - 300 * y, r: mine ? 6 : 3,
      fill: `hsl($${kind * 77} 60% 50%)`, opacity: mine ? 1 : .4,
      class: mine && i === image ? "on" : ""}, () => choose(l, h, i));
  })));
  const map = data.maps[layer][head][image], step = 320 / map.length, top = Math.max(...map.flat());
  map.forEach((row, q) => row.forEach((value, k) => add(get("map"), "rect", {x: k * step, y: q * step, width: step,
    height: step, fill: shade(value, 0, top)})));
}
for (const name in data.scores) get("metric").add(new Option(name));
get("metric").addEventListener("change", draw);
draw();
</script></body></html>
""")


@paper("vit-attention-visual-analytics")
def vit_report(
    model: HeadedModel,
    images: torch.Tensor,
    scores: Mapping[str, HeadMap],
    path: str | Path,
    *,
    patterns: int = 4,
    shown: int = 8,
) -> Path:
    """Write one HTML file with the three views linked: importance, strength by ring, pattern. It loads nothing else.

    Args:
        model: a vision tower or image classifier.
        images: pixel values ``[n, channels, height, width]``.
        scores: name -> map for the grid, such as those of :class:`~polyhead.heads.output_change.OutputChange`.
        path: of the file.
        patterns: clusters of codes.
        shown: images of which attention maps are coded and shown; the ring profile takes all.

    Raises:
        InputError: no scores, scores of another model's shape, or what ``ring_profile`` refuses.
    """
    if not scores or any(each.shape != (model.layers, model.heads) for each in scores.values()):
        given = [each.shape for each in scores.values()]
        raise InputError(f"Maps of {given} were given; expected one or more of {model.layers} x {model.heads} heads.")
    profile = ring_profile(model, images)
    rings = np.concatenate([profile.rings, profile.other[..., None]], axis=-1)
    maps = attention_maps(model, {"pixel_values": images[:shown].to(model.device)})
    flat = maps.flatten(0, 2)
    coder = AttentionPatternAE().fit(flat)
    codes, kinds = coder.codes(flat), coder.cluster(flat, min(patterns, len(flat)))
    low, high = codes.min(0), codes.max(0)
    placed = np.concatenate([(codes - low) / np.maximum(high - low, 1e-30), kinds[:, None]], axis=1)
    data = {
        "scores": {name: _plain(each.values) for name, each in scores.items()},
        "rings": _plain(rings),
        "mean": _plain(np.nanmean(rings, axis=(0, 1))),
        "codes": _plain(placed.reshape(*maps.shape[:3], 3)),
        "maps": _plain(maps.numpy()),
    }
    page = _PAGE.substitute(
        name=html.escape(model.name), images=len(images), data=json.dumps(data).replace("</", "<\\/")
    )
    file = Path(path)
    file.write_text(page, encoding="utf-8")
    return file


def _plain(values: np.ndarray) -> object:
    """Nested lists with four digits, None for NaN."""
    if values.ndim == 0:
        return None if np.isnan(values) else float(f"{float(values):.4g}")
    return [_plain(each) for each in values]
