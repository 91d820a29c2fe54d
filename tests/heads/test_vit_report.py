"""The page holds what was measured, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

from polyhead import HeadMap
from polyhead.errors import InputError
from polyhead.heads.ring_profile import ring_profile
from polyhead.heads.vit_report import vit_report
from polyhead.model import load


def test_the_page_holds_the_three_views(tmp_path: Path) -> None:
    model, images = load(tiny("vit")), inputs_for("vit")["pixel_values"]
    model.name = "a <tower>"
    values = np.arange(8.0).reshape(2, 4)
    values[1, 3] = np.nan
    maps = {"jsd </script>": HeadMap(values, "output-change", "vit", "", "")}
    page = vit_report(model, images, maps, tmp_path / "page.html").read_text()
    assert "Heads of a &lt;tower&gt;" in page
    assert page.count("</script>") == 1
    assert re.findall(r"""(?:src|href)=|url\(|@import""", page) == []
    data = json.loads(re.search(r"const data = (.*);\n", page).group(1))  # type: ignore[union-attr]
    assert data["scores"] == {"jsd </script>": [[0, 1, 2, 3], [4, 5, 6, None]]}
    profile = ring_profile(model, images)
    np.testing.assert_allclose(np.array(data["rings"])[..., :-1], profile.rings, rtol=1e-3)
    np.testing.assert_allclose(np.array(data["rings"]).sum(-1), 1, atol=2e-3)
    with model.record("attention") as recording, torch.no_grad():
        model(pixel_values=images)
    np.testing.assert_allclose(data["maps"][1][2], recording.layer_attention(1)[:, 2].numpy(), rtol=1e-3)
    codes = np.array(data["codes"])
    assert codes.shape == (2, 4, 2, 3)
    assert (codes[..., :2].min(), codes[..., :2].max()) == (0, 1)


def test_maps_of_another_model_are_refused(tmp_path: Path) -> None:
    model, images = load(tiny("vit")), inputs_for("vit")["pixel_values"]
    with pytest.raises(InputError, match="2 x 4 heads"):
        vit_report(model, images, {"one": HeadMap(np.zeros((3, 4)), "x", "y", "", "")}, tmp_path / "page.html")
