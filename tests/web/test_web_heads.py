"""The page of heads in a browser: a head clicked, looked at and masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyhead.search.index import Index
from polyhead.serve import Service, create_app
from tests.serve.running import running
from tests.serve.tinysaved import FolderEncoder, save_encoder
from tests.web.conftest import DOCUMENTS

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def heads_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service whose model is a tiny random one that can be loaded."""
    folder = save_encoder(tmp_path_factory.mktemp("web-model"))
    service = Service(FolderEncoder(folder), Index(tmp_path_factory.mktemp("web-heads") / "index"))  # type: ignore[arg-type]
    service.change(DOCUMENTS, [])
    with running(create_app(service)) as address:
        yield address


def test_a_head_is_clicked_and_masked(page: Page, heads_site: str, shoot: Callable[[str], Path]) -> None:
    page.goto(f"{heads_site}/app/heads")
    page.wait_for_selector(".plot .xy .hm")
    cell = page.locator('[data-cell="1/2"]')
    cell.click()
    page.wait_for_selector("#chosen")
    assert page.inner_text("#chosen") == "Layer 1, head 2"
    assert page.evaluate("document.activeElement.id") == "chosen"
    assert cell.get_attribute("aria-current") == "true"
    assert "of 8" in page.inner_text("table.ranks")
    page.locator("#strip .token").nth(2).hover()
    assert "attends to" in page.inner_text("#strip-said")
    assert page.locator("table.attention tr.looking").get_attribute("data-row") == "2"
    page.fill("#question", "the river rises in the hills")
    page.get_by_role("button", name="Mask it").click()
    page.wait_for_selector("#changed h4")
    assert "Layer 1, head 2 masked" in page.inner_text("#changed")
    assert page.locator("#changed ol li").count() == 20
    shoot("heads")
    page.fill("#other", "who lives in the hills")
    page.locator("#gain").focus()
    page.keyboard.press("End")
    assert page.inner_text("#gain-said") == "2.0"
    page.get_by_role("button", name="Scale it").click()
    page.locator("#changed h4", has_text="times 2.0").wait_for()
    assert "cosine of the two texts" in page.inner_text("#changed")
    page.reload()
    assert page.inner_text("#chosen") == "Layer 1, head 2"


def test_the_picture_is_clicked_and_follows_the_theme(page: Page, heads_site: str) -> None:
    page.goto(f"{heads_site}/app/heads")
    page.wait_for_selector(".plot .xy .hm")
    colour = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    before = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != before
    page.locator(".plot .nsewdrag").click(position={"x": 12, "y": 12})
    page.wait_for_selector("#chosen")
    assert page.inner_text("#chosen").endswith("head 0")


def test_another_score_and_the_keyboard(page: Page, heads_site: str) -> None:
    page.goto(f"{heads_site}/app/heads")
    page.select_option("#score", "attention-distance")
    page.locator("#map h2", has_text="mean distance").wait_for()
    page.wait_for_url("**score=attention-distance**")
    page.locator('[data-cell="0/0"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chosen")
    assert page.inner_text("#chosen") == "Layer 1, head 1"
    assert page.locator("table.cells a[tabindex='0']").get_attribute("data-cell") == "1/1"
    from playwright.sync_api import expect

    page.fill("#text", "the sea")
    page.get_by_role("button", name="Look").click()
    expect(page.locator("#strip .token")).to_have_count(4)
    assert "score=attention-distance" in page.url


def test_a_phone_and_a_model_that_cannot_be_loaded(page: Page, site: str, tolerated: list[str]) -> None:
    tolerated.append("422")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(f"{site}/app/heads")
    page.wait_for_selector(".plot .xy .hm")
    page.locator("table.cells a").first.click()
    page.wait_for_selector("#head .trouble")
    assert "cannot be loaded by that name" in page.inner_text("#head")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.select_option("#score", "output-norm")
    page.wait_for_selector("#map .trouble")
    assert page.locator("#score").is_visible()
