"""The search page in a browser: from typing to explanation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

BREAD = "bread needs flour and a hot oven"
QUESTION = f"rivers begin high between mountains. {BREAD}."
PHONE = {"width": 360, "height": 740}


def ask(page: Page, question: str) -> None:
    """Type a question and wait for its results."""
    page.fill("#q", question)
    page.wait_for_url(lambda url: parse_qs(urlsplit(url).query).get("q") == [question])
    page.wait_for_selector("article.hit")


def test_from_typing_to_explanation(page: Page, site: str, shoot: Callable[[str], Path]) -> None:
    page.goto(site)
    assert "Ask something" in page.inner_text("#results")
    ask(page, QUESTION)
    assert page.inner_text("#said").startswith("10 hits by aspects")
    assert {"Rivers", "Bread"} <= {title.split(". ")[1] for title in page.locator("article h3").all_inner_texts()[:3]}
    first = page.locator("article.hit").first
    assert "rivers" in first.locator("mark").all_inner_texts() or "bread" in first.locator("mark").all_inner_texts()
    assert "For the whole question" in first.inner_text()
    assert page.locator(".answers", has_text="Answers “").count() > 0
    assert "layer" in (first.locator("svg.heads").get_attribute("aria-label") or "")
    assert first.locator("svg.heads rect").count() == 3
    first.get_by_text("Why it is here").click()
    assert "log share among rivals" in first.inner_text()
    page.get_by_text("How it was decided").click()
    assert "parts of the question looked at" in page.inner_text("#results")
    shoot("search")
    page.reload()
    assert page.input_value("#q") == QUESTION
    assert page.locator("article.hit").count() == 10


def test_filters_side_by_side_and_back_to_all(page: Page, site: str, shoot: Callable[[str], Path]) -> None:
    from playwright.sync_api import expect

    page.goto(site)
    ask(page, "rivers")
    page.select_option("#beside", "dense")
    page.wait_for_selector("section[aria-label='Found by dense']")
    assert page.locator("section.column").count() == 2
    shoot("search-side-by-side")
    page.select_option("#beside", "")
    page.get_by_text("Filters", exact=True).click()
    page.select_option("#kind", "it's")
    expect(page.locator("article.hit")).to_have_count(1)
    assert "<img src=x" in page.inner_text("article.hit h3")
    assert page.locator("main img").count() == 0
    page.fill("#since", "2999-01-01")
    page.wait_for_selector("text=No document passes the filters")
    page.get_by_role("link", name="Ask all documents").click()
    expect(page.locator("article.hit")).to_have_count(10)


def test_an_answer_that_comes_late_does_not_replace_a_newer_one(page: Page, site: str) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        if "mountains" in route.request.url:
            held.append(route)
        else:
            route.continue_()

    page.route("**/app/results*", hold)
    page.goto(site)
    with page.expect_request("**/app/results*mountains*"):
        page.fill("#q", "mountains")
    ask(page, BREAD)
    assert held
    with contextlib.suppress(Exception):  # the browser has given the first question up already
        held[0].continue_()
    page.wait_for_timeout(500)
    assert "q=bread" in page.url
    assert page.locator("article h3").first.inner_text().endswith("Bread")


def test_copies_reach_the_clipboard(page: Page, site: str) -> None:
    page.goto(f"{site}/?q=rivers&k=2")
    page.get_by_role("button", name="Copy as JSON").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert len(json.loads(page.evaluate("navigator.clipboard.readText()"))["hits"]) == 2
    page.get_by_role("button", name="Copy as Python").click()
    page.get_by_role("button", name="Copied").nth(0).wait_for()
    page.wait_for_timeout(200)
    assert "search_index(" in page.evaluate("navigator.clipboard.readText()")


def test_the_keyboard_is_enough_and_every_field_has_its_label(page: Page, site: str) -> None:
    page.goto(f"{site}/?q=rivers")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("2: ")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("1: ")
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    assert page.evaluate(unlabelled) == 0
    assert page.get_attribute("#said", "aria-live") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(page: Page, site: str, shoot: Callable[[str], Path], scheme: Any) -> None:
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{site}/?q=rivers&beside=dense&k=3&kind=note")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(f"search-phone-{scheme}")
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before


def test_failures_are_told_kindly(page: Page, site: str, tolerated: list[str], shoot: Callable[[str], Path]) -> None:
    tolerated += ["status of 500", "status of 422", "ERR_FAILED", "htmx:sendError"]
    page.goto(site)
    page.fill("#q", "poison")
    page.wait_for_selector(".trouble:has-text('The service failed')")
    assert page.inner_text("#said") == ""
    assert "Nothing that was accepted is lost" in page.inner_text("#results")
    shoot("search-trouble")
    ask(page, "rivers")
    assert page.locator(".trouble").count() == 0
    page.fill("#k", "9999")
    page.dispatch_event("#k", "change")  # the browser itself holds a number beyond the field's bounds back
    page.fill("#k", "10")
    page.route("**/app/results*", lambda route: route.abort())
    page.fill("#q", "sea")
    page.wait_for_selector(".trouble:has-text('does not answer')")


def test_without_scripts_the_form_works(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(site)
    page.fill("#q", "rivers")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("article.hit")
    assert "q=rivers" in page.url
    assert page.locator("article.hit").count() == 10
    context.close()
