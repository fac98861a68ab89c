"""`latteflow review` as it is used: a process, a real browser, a new domain file."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.tasks.core.domain import Domain

pytestmark = pytest.mark.slow
HARM = "<img src=x onerror='alert(1)'>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A domain file with a comment, after a run."""
    folder = tmp_path_factory.mktemp("reviewed")
    draw_folder(folder / "photos", 60)
    file = folder / "shapes.yaml"
    file.write_text(
        f'# Mine.\nname: shapes\nsource: photos\nclasses: [red, green, "{HARM}"]  # to be looked at\n'
        f"clip: {{model: {tiny_clip}}}\nlatteclip: {{batch_size: 8, epochs: 1}}\nstore: store\noutput: out\n"
    )
    run_plainly(Domain.load(file))
    return file


@pytest.fixture(scope="module")
def url(file: Path, serving: Any) -> Iterator[str]:
    with serving("review", file) as address:
        yield address


def test_classes_are_renamed_merged_taken_out_and_added_into_a_new_file(open_tab, url: str, file: Path) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    tab = open_tab(url)
    page = tab.page
    assert page.locator("h1").inner_text() == "The class list"
    rows = page.locator("#classes tbody tr")
    assert rows.count() == 3
    rows.nth(0).locator("input").fill("crimson")
    rows.nth(2).locator("button").click()
    page.locator("#write").click()
    told = page.locator("#told")
    expect(told).to_contain_text("Next: latteflow run")
    new = file.with_name("shapes.reviewed.yaml")
    assert Domain.load(new).classes == ["crimson", "green"]
    assert new.read_text().startswith("# Mine.\nname: shapes\n")
    assert Domain.load(file).classes == ["red", "green", HARM]
    rows.nth(1).locator("button").click()  # one class is too few: nothing is written
    page.locator("#write").click()
    expect(told).to_contain_text("at least 2 are needed")
    assert Domain.load(new).classes == ["crimson", "green"]
    pictures = page.locator(".finding img")
    for number in range(pictures.count()):
        pictures.nth(number).scroll_into_view_if_needed()
        expect(pictures.nth(number)).not_to_have_js_property("naturalWidth", 0)
    assert not [each for each in tab.complaints if "422" not in each] and not tab.blocked
    assert all(each.startswith(url) for each in tab.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(open_tab, url: str, width: int, scheme: str) -> None:
    page = open_tab(url, viewport={"width": width, "height": 800}, color_scheme=scheme).page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_only_this_page_is_answered(url: str) -> None:
    assert httpx.get(f"{url}/images/{'0' * 64}").status_code == 404
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 421
    assert httpx.post(f"{url}/classes", data={"classes": "a"}).status_code == 422
    assert httpx.post(f"{url}/classes", json={"classes": [1, 2]}).status_code == 422


def test_a_file_that_is_there_already_is_never_replaced(file: Path) -> None:
    (file.parent / "mine.yaml").write_text("mine")
    command = [
        sys.executable,
        "-m",
        "latteflow.flows.cli",
        "review",
        str(file),
        "--out",
        str(file.parent / "mine.yaml"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "is there already" in found.stderr
