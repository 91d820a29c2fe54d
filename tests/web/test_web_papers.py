"""The pages of the papers in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from polyhead.papers import catalogue

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE = {"width": 360, "height": 740}


def test_the_catalogue_is_filtered_and_searched(page: Page, site: str, shoot: Callable[[str], Path]) -> None:
    from playwright.sync_api import expect

    page.goto(f"{site}/app/papers")
    assert page.inner_text("#said").startswith(f"{len(catalogue())} papers")
    page.select_option("#verdict", "refuted")
    page.wait_for_url("**/app/papers?verdict=refuted")
    expect(page.locator("tbody td:last-child", has_text="supported")).to_have_count(0)
    assert set(page.locator("tbody td:last-child").all_inner_texts()) == {"refuted"}
    page.select_option("#verdict", "")
    question = catalogue()["landmark-attention"].summary
    page.fill("#q", question)
    expect(page.locator("tbody tr")).to_have_count(30)
    assert page.locator("tbody a").first.inner_text() == catalogue()["landmark-attention"].title
    shoot("papers")
    page.reload()
    assert page.input_value("#q") == question
    page.locator("tbody a").first.click()
    page.wait_for_url("**/landmark-attention")


def test_a_paper_shows_evidence_plot_code_and_neighbours(page: Page, site: str, shoot: Callable[[str], Path]) -> None:
    page.goto(f"{site}/app/papers/fastmax")
    assert "95% interval" in (page.locator("svg.interval").get_attribute("aria-label") or "")
    assert "from polyhead.attention.fastmax import FastmaxAttention" in page.inner_text("#code-1")
    page.wait_for_selector("#similar-papers li")
    page.locator("#similar-papers a", has_text="data").first.click()
    page.wait_for_selector("#similar-papers a[aria-current]:has-text('data')")
    assert page.locator("#similar-papers li").count() == 8
    shoot("paper")
    page.locator(".code").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("from polyhead.attention.fastmax")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_papers_on_a_phone(page: Page, site: str, shoot: Callable[[str], Path], scheme: Any) -> None:
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    for path in ("papers?family=cache", "papers/fastmax", "papers/vit-attention-visual-analytics"):
        page.goto(f"{site}/app/{path}")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    shoot(f"paper-phone-{scheme}")
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert page.evaluate(unlabelled) == 0


def test_an_unknown_paper_is_told(page: Page, site: str, tolerated: list[str]) -> None:
    tolerated.append("status of 404")
    page.goto(f"{site}/app/papers/fastmaxx")
    assert "fastmax" in page.inner_text("main")
