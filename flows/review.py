"""review: the class list of a domain beside its images, and a new domain file of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Annotated

from fastapi import Body, FastAPI
from ruamel.yaml import YAML

from latteflow.flows import local
from latteflow.flows.errors import UsageError
from latteflow.flows.peers import Refused
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.report.classlist import SHOWN, Review
from latteflow.tasks.report.html import html

SIDE_PX = 160
MOST_CLASSES = 100_000


def place_beside(file: Path, out: Path | None) -> Path:
    """Where the new domain file goes: beside the old one, as the paths in it are relative to it.

    Raises:
        UsageError: there is a file already, or it would lie elsewhere.
    """
    place = out or file.with_name(f"{file.stem}.reviewed{file.suffix}")
    if place.resolve().parent != file.resolve().parent:
        raise UsageError(f"--out {place}: paths in a domain file are relative to it, so give a name in {file.parent}/")
    if place.exists():
        raise UsageError(f"{place} is there already; give another name with --out, or take it away")
    return place


def build(file: Path, place: Path, found: Review, shards: Artifact) -> FastAPI:
    """The page of a review, which writes a new domain file.

    Args:
        file: the domain file.
        place: of the new one.
    """
    page = html("review.html.j2", live="review.js", r=found, shown=SHOWN)
    app = local.app(page, shards, found.paths, SIDE_PX)

    @app.post("/classes")
    def classes(classes: Annotated[list[str], Body(embed=True, max_length=MOST_CLASSES)]) -> dict[str, str]:
        """Write a domain file with these classes."""
        try:
            domain = write(file, place, classes)
        except ConfigError as error:
            raise Refused(422, str(error).splitlines()[-1].strip(), "nothing was written") from error
        told = f"{place.name} has {len(domain.classes)} classes. Next: latteflow run {place}"
        if domain.evaluation is not None:
            told += ". Names in the labels of `evaluation` stay as they are: change them there too"
        return {"file": str(place), "told": told}

    return app


def write(file: Path, place: Path, classes: list[str]) -> Domain:
    """A domain file like another, comments and all, with other classes; it takes its place when it is sound.

    Raises:
        ConfigError: it would not be.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10**6  # no line is broken that was none
    raw = yaml.load(file.read_text(encoding="utf-8-sig"))
    raw["classes"] = classes
    text = io.StringIO()
    yaml.dump(raw, text)
    part = place.with_name(f".{place.name}.part")
    try:
        part.write_text(text.getvalue(), encoding="utf-8")
        domain = Domain.load(part)
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)
    return domain
