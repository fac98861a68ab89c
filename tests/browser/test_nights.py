"""The page of nights in a real browser, with texts that mean harm."""

from pathlib import Path
from typing import Any

import pytest

from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ship.nights import Night, write_page
from tests.tasks.report.test_page import SCRIPT


@pytest.fixture
def url(domain: Domain, tmp_path: Path) -> str:
    states = ("Promoted", "Kept", "Unchanged", "Failed")
    found = [
        Night(f"2027-03-{day:02d}T01:30:02+00:00", states[day % 4], f"{SCRIPT} of {day} " * 9, 31.5, 9000 + day, 3, 12)
        for day in range(1, 31)
        if day != 14
    ]
    return write_page(domain, found, tmp_path / "nights.html").as_uri()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_opens_and_fits_without_a_request_or_a_complaint(open_tab: Any, url: str, width: int, scheme: str) -> None:
    tab = open_tab(url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert [each for each in tab.requests if not each.startswith("data:")] == [url] and tab.complaints == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.page.evaluate("window.pwned") is None and tab.page.locator("script").count() == 1
    assert tab.page.locator("tbody tr").count() == 29
    assert (
        tab.page.locator("tbody tr", has_text="no word of 1 before it").locator("th").inner_text()[:10] == "2027-03-15"
    )
    assert tab.page.locator("tbody tr").first.bounding_box()["height"] < 400
