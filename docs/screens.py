"""The pictures of pages in docs, as Chromium shows them: at a desk in the light, on a phone in the dark.

    python docs/screens.py DOMAIN           # after `latteflow run DOMAIN`; those in docs are of 300 photos of the demo

Writes review.png and sample.png beside this file; each has both pages side by side.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
DESK, PHONE = (1100, 1100), (390, 1100)
PAGES = {"review": (), "sample": ("--n", "100")}
_SPACE = 24


def main(domain: str) -> None:
    """A picture of each page."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for command, options in PAGES.items():
            # What was labelled before is not gone on with.
            out = ("--out", str(Path(scratch, "labels.csv"))) if command == "sample" else ()
            with shown(command, domain, *options, *out) as url:
                desk, phone = (look(browser, url, size, scheme) for size, scheme in ((DESK, "light"), (PHONE, "dark")))
            beside(desk, phone).save(HERE / f"{command}.png", optimize=True)
        browser.close()


@contextlib.contextmanager
def shown(command: str, domain: str, *options: str) -> Iterator[str]:
    """The address of the page that a command shows."""
    arguments = [sys.executable, "-m", "latteflow.flows.cli", command, domain, *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield next(line.split()[-1] for line in process.stdout if "http://" in line)
    finally:
        process.terminate()
        process.wait()


def look(browser: Any, url: str, size: tuple[int, int], scheme: str) -> Image.Image:
    """The top of a page, once its pictures are there."""
    context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
    page = context.new_page()
    page.goto(url, wait_until="networkidle", timeout=120_000)
    found = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    context.close()
    return found


def beside(desk: Image.Image, phone: Image.Image) -> Image.Image:
    """Both in one picture, on nothing."""
    height = max(desk.height, phone.height)
    both = Image.new("RGBA", (desk.width + _SPACE + phone.width, height))
    both.paste(desk, (0, 0))
    both.paste(phone, (desk.width + _SPACE, 0))
    return both


if __name__ == "__main__":
    main(*sys.argv[1:])
