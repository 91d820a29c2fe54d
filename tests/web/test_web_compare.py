"""The page of comparisons in a browser: typed questions, labelled ones, and the plane of documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

PHONE = {"width": 360, "height": 740}


def test_two_strategies_on_typed_questions(page: Page, site: str, shoot: Callable[[str], Path]) -> None:
    page.goto(f"{site}/app/compare")
    page.fill("#questions", "where rivers begin\nbread and salt")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_selector("section.answer")
    assert page.locator("section.answer").count() == 2
    assert "Mean overlap of aspects and dense over 2 questions" in page.inner_text("#answers")
    page.wait_for_selector(".plot .scatterlayer .point")
    shoot("compare")


def test_the_plane_says_titles_and_follows_colours_and_theme(page: Page, site: str) -> None:
    page.goto(f"{site}/app/compare")
    page.wait_for_selector(".plot .scatterlayer .point")
    assert page.locator(".plot .scatterlayer .point").count() == 25
    page.locator(".plot .scatterlayer .point").first.hover(force=True)
    page.wait_for_selector(".plot .hovertext")
    page.select_option("#colour", "folder")
    page.locator(".plot .legend", has_text="many").wait_for()
    page.click("#theme")
    page.wait_for_selector(".plot .scatterlayer .point")
    page.get_by_text("As a table").click()
    assert "Rivers" in page.inner_text("#plane table")


@pytest.mark.usefixtures("data_dir")
def test_a_trial_on_labelled_questions(page: Page, site: str) -> None:
    page.goto(f"{site}/app/compare")
    page.fill("#size", "20")
    page.select_option("#second-trial", "parts")
    page.get_by_role("button", name="Try").click()
    page.wait_for_selector("#labelled table")
    assert "20 of 1,000 questions" in page.inner_text("#labelled")


def test_a_phone_and_what_cannot_be_compared(page: Page, site: str, tolerated: list[str]) -> None:
    tolerated.append("422")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.goto(f"{site}/app/compare")
    page.wait_for_selector(".plot .scatterlayer .point")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.select_option("#second-trial", "aspects")
    page.get_by_role("button", name="Try").click()
    page.wait_for_selector("#labelled .trouble")
    assert "two different" in page.inner_text("#labelled")
