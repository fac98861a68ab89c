"""The comparison in a real browser, with texts that mean harm."""

import random
from typing import Any

import pytest

from latteflow.tasks.report.compare import Changed, Comparison, Run, page_of
from latteflow.tasks.report.html import picture_url
from latteflow.tasks.report.page import Change
from latteflow.tasks.report.scores import Gain, McNemar
from tests.tasks.report.test_page import ATTRIBUTE, SCRIPT, picture

HARM = f"{SCRIPT}</script></style>{ATTRIBUTE} \u202egpj.exe\u200b"


def comparison(texts: tuple[str, str]) -> Comparison:
    """Made up: forty images that changed, of two classes."""
    shown = picture_url(picture(random.Random(0), 48))
    changed = [
        Changed(kind, f"{texts[0]} {i}", texts[0], texts[1], texts[i % 2], shown, i % 2)
        for i in range(20)
        for kind in ("better", "worse")
    ]
    runs = [Run(f"run {text}", "latteclip", None, texts, None, {}) for text in texts]  # type: ignore[arg-type]
    tests = {"permutation_p": 0.012, "mcnemar": McNemar(p=0.0001, only_adapted=9, only_zero_shot=1)}
    gain = Gain(gain=0.04, gain_interval=(0.01, 0.07), **tests)
    return Comparison(
        *runs, n=1200, labelled=1000, top1=(0.5, 0.54), gain=gain, agreement=0.83,
        per_class=[Change(text, 500, 0.5, 0.54) for text in texts], changed=changed,
        counts={"better": 120, "worse": 80, "other": 4}, settings=[(text, text, "") for text in texts],
        lineage=[(text, text, text) for text in texts],
    )  # fmt: skip


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("compare")
    for name, texts in (("plain", ("cat", "dog")), ("hostile", (HARM, HARM + "'"))):
        (folder / f"{name}.html").write_text(page_of(comparison(texts)), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in ("plain", "hostile")}


@pytest.mark.parametrize("name", ["plain", "hostile"])
@pytest.mark.parametrize("width", [360, 1280])
def test_opens_and_fits_without_a_request_or_a_complaint(
    open_tab: Any,
    urls: dict[str, str],
    name: str,
    width: int,
) -> None:
    tab = open_tab(urls[name], viewport={"width": width, "height": 800})
    assert [url for url in tab.requests if not url.startswith("data:")] == [urls[name]] and tab.complaints == []
    assert tab.page.evaluate("window.pwned") is None and tab.page.locator("img[onerror]").count() == 0
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_values_and_filters(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["plain"]).page
    assert page.locator(".verdict").inner_text() == "B is better."
    assert "+1.0 to +7.0 points" in page.locator(".sentence").inner_text()
    output = page.locator("#changed output")
    assert output.inner_text() == "40 of 40" and page.locator("#changed .card:visible").count() == 12
    page.locator("[data-by=state]").select_option("worse")
    assert output.inner_text() == "20 of 40"
    page.locator("[data-by=label]").select_option("dog")
    assert output.inner_text() == "10 of 40" and page.locator("#changed .card:visible .truth").count() == 10
    page.get_by_role("searchbox", name="Search").fill("cat 13")
    assert output.inner_text() == "1 of 40"


def test_hostile_text_is_read(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["hostile"]).page
    assert SCRIPT in page.locator("h1").inner_text()
    assert "gpj.exe" in page.content() and "\u202e" not in page.content()
    assert page.locator("script").count() == 1
