"""A real browser, and pages opened in it that remember what they asked for."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Tab:
    """A page that remembers every request, complaint and dialog."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **context}
        )
        self.page = self.context.new_page()
        self.page.set_default_navigation_timeout(120_000)  # other tests have the processors too
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda r: self.requests.append(r.url))
        self.blocked: list[str] = []
        self.context.on("requestfailed", lambda r: self.blocked.append(f"{r.url} {r.failure}"))
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", self.dismiss)

    def dismiss(self, dialog: Any) -> None:
        self.complaints.append(dialog.message)
        dialog.dismiss()


@pytest.fixture
def open_tab(browser: Any) -> Iterator[Any]:
    tabs: list[Tab] = []

    def open_tab(url: str, **context: Any) -> Tab:
        tabs.append(tab := Tab(browser, **context))
        tab.page.goto(url)
        return tab

    yield open_tab
    for tab in tabs:
        tab.context.close()


@contextmanager
def served(command: str, file: Path, *options: str) -> Iterator[str]:
    """The address of the page that a command shows, which is the last thing it prints."""
    arguments = [sys.executable, "-m", "latteflow.flows.cli", command, str(file), *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line.split()[-1] for line in process.stdout if "http://" in line)
        process.terminate()
        assert process.wait(20) in (0, -15)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def serving() -> Any:
    """:func:`served`."""
    return served
