"""`latteflow sample` as it is used: images are labelled by keys, and `evaluate` reads what comes of it."""

import csv
import subprocess
import sys
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
    folder = tmp_path_factory.mktemp("sampled")
    draw_folder(folder / "photos", 60)
    file = folder / "shapes.yaml"
    file.write_text(
        f'name: shapes\nsource: photos\nclasses: [red, green, blue, "{HARM}"]\nclip: {{model: {tiny_clip}}}\n'
        "latteclip: {batch_size: 8, epochs: 1}\nstore: store\noutput: out\n"
    )
    run_plainly(Domain.load(file))
    return file


def rows(file: Path) -> list[list[str]]:
    with file.with_name("shapes.labels.csv").open(newline="") as table:
        return list(csv.reader(table))


def test_images_are_labelled_by_keys_and_evaluated(open_tab, serving: Any, file: Path) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    with serving("sample", file, "--n", "6") as url:
        tab = open_tab(url)
        page, told = tab.page, tab.page.locator("#told")
        expect(told).to_contain_text("0 of 6")
        expect(page.locator("#picture")).not_to_have_js_property("naturalWidth", 0)
        page.keyboard.type("gr")
        page.keyboard.press("Enter")
        expect(told).to_contain_text("1 of 6")
        page.keyboard.type("x")  # no class begins like this
        page.keyboard.press("Enter")
        expect(told).to_contain_text("No class")
        page.locator("#typed").fill("RED")
        page.keyboard.press("Enter")
        expect(told).to_contain_text("2 of 6")
        page.keyboard.type("bl")
        expect(page.locator("#names button")).to_have_text(["blue"])
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        expect(page.locator("#names button")).to_have_text(["red", "green", "blue", HARM])
        page.locator("#none").click()
        expect(told).to_contain_text("3 of 6")
        assert not tab.complaints and not tab.blocked and all(each.startswith(url) for each in tab.requests)
        assert httpx.post(f"{url}/labels", json={"key": "x", "name": "red"}).status_code == 422
        assert httpx.post(f"{url}/labels", content=b"").status_code == 422
    head, *answers = rows(file)
    assert head == ["path", "class"] and [name for _, name in answers] == ["green", "red", ""]
    with serving("sample", file, "--n", "6") as url:  # gone on with, by the same images
        page = open_tab(url).page
        expect(page.locator("#told")).to_contain_text("3 of 6")
        page.get_by_role("button", name="blue").click()
        expect(page.locator("#told")).to_contain_text("4 of 6")
    assert rows(file)[:4] == [head, *answers] and rows(file)[4][1] == "blue"
    file.write_text(f"{file.read_text()}evaluation: {{labels: shapes.labels.csv}}\n")
    made = {each.label: each for each in run_plainly(Domain.load(file))}
    assert made["evaluate"].counts["labelled"] == 3


@pytest.mark.parametrize("text", ["name,label\na,b\n", "path,class\na\n", "\x00"])
def test_another_file_is_not_gone_on_with(file: Path, text: str) -> None:
    other = file.with_name("other.csv")
    other.write_text(text)
    command = [sys.executable, "-m", "latteflow.flows.cli", "sample", str(file), "--out", str(other)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "another" in found.stderr and "--out" in found.stderr
    assert other.read_text() == text


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(open_tab, serving: Any, file: Path, width: int) -> None:
    with serving("sample", file, "--n", "3", "--out", str(file.with_name(f"{width}.csv"))) as url:
        page = open_tab(url, viewport={"width": width, "height": 800}, color_scheme="dark", has_touch=width == 390).page
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
