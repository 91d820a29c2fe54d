"""A real browser on a running service; only where ``POLYHEAD_WEB=1`` says so, as ``make test-web`` does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polyhead.search.index import Index
from polyhead.search.posted import Posted
from polyhead.serve import Service, create_app
from tests.serve.conftest import ServedEncoder
from tests.serve.running import running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("POLYHEAD_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds, on a busy machine

HOSTILE = '<img src=x onerror=alert(1)> "it\'s" & more'
DOCUMENTS = [
    Posted("water/rivers", "rivers begin high between mountains", "Rivers", "note"),
    Posted("water/sea", "the sea is salt and deep, ships cross it in all weather", "The sea", "note"),
    Posted("land/mountains", "mountains rise where plates of the earth meet", "Mountains", "note"),
    Posted("land/bread", "bread needs flour and a hot oven", "Bread", "recipe"),
    Posted("odd/hostile", f"{HOSTILE} rivers", HOSTILE, "it's"),
    *(Posted(f"many/{i}", f"filler{i} text{i} of{i} no{i} use{i}", f"Filler {i}", "filler") for i in range(20)),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without ``POLYHEAD_WEB=1`` the tests of this folder are skipped."""
    if os.environ.get("POLYHEAD_WEB") == "1":
        return
    skip = pytest.mark.skip(reason="needs a browser; `make test-web` (POLYHEAD_WEB=1) runs it")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a service over an encoder without a model, with 25 documents; tests leave its index as it is."""
    encoder = ServedEncoder()
    service = Service(encoder, Index(tmp_path_factory.mktemp("web") / "index"))  # type: ignore[arg-type]
    service.change(DOCUMENTS, [])
    with running(create_app(service)) as address:
        yield address


@pytest.fixture
def tolerated() -> list[str]:
    """Patterns of complaints that a test expects; it adds them itself."""
    return []


@pytest.fixture
def page(browser: Browser, tolerated: list[str]) -> Iterator[Page]:
    """A page in a fresh profile; at its end it fails on any console error or failed request not tolerated."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda sent: complaints.append(f"failed: {sent.url} {sent.failure}"))
    yield page
    page.wait_for_load_state("networkidle")
    context.close()
    # A question that a newer one replaced is aborted on purpose; htmx notes that as an error.
    expected = [*tolerated, "ERR_ABORTED", "htmx:afterRequest", "htmx:sendAbort"]
    unexpected = [said for said in complaints if not any(re.search(pattern, said) for pattern in expected)]
    assert not unexpected


@pytest.fixture
def shoot(page: Page, tmp_path: Path) -> Callable[[str], Path]:
    """Keeps a picture of the whole page, in ``$POLYHEAD_SCREENSHOTS`` where that is set."""
    folder = Path(os.environ.get("POLYHEAD_SCREENSHOTS") or tmp_path)

    def shot(name: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        return path

    return shot
