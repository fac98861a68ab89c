"""sample: a page on which a person labels some images by keys, and the labels file that comes of it."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Annotated

from fastapi import Body, FastAPI

from latteflow.flows import local
from latteflow.flows.errors import UsageError
from latteflow.flows.peers import Refused
from latteflow.storage.artifacts import Artifact
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.report.html import html
from latteflow.tasks.report.sample import Sample

SIDE_PX = 640
HEAD = ["path", "class"]


class Labels:
    """A labels file that grows by one answer at a time, and is whole at any moment.

    Args:
        file: as `evaluation` reads it, with columns path and class; answers that are in it already stay.

    Raises:
        UsageError: there is a file of another kind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[str, str] = {}
        if not file.exists():
            return
        try:
            head, *rows = csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig")))
            self.answers = {path: name for path, name in rows}
        except (OSError, ValueError, csv.Error) as error:
            raise UsageError(f"{file} cannot be gone on with: {error}; give another name with --out") from error
        if head != HEAD:
            raise UsageError(f"{file} has the columns {', '.join(head)}, not path and class; give another --out")

    def answer(self, path: str, name: str) -> None:
        """Note the class of an image; empty: it is of none, and left out of every figure."""
        self.answers[path] = name
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([HEAD, *self.answers.items()])
        part = self.file.with_name(f".{self.file.name}.part")
        part.write_text(text.getvalue(), encoding="utf-8")
        os.replace(part, self.file)


def build(domain: Domain, found: Sample, shards: Artifact, labels: Labels) -> FastAPI:
    """The page, which asks about the images that have no answer yet."""
    path_of = dict(zip(found.keys, found.paths, strict=True))
    images = [{"key": key, "path": path, "answer": labels.answers.get(path)} for key, path in path_of.items()]
    page = html(
        "sample.html.j2", live="sample.js", domain=domain.name, classes=domain.classes, images=images, of=found.of
    )
    app = local.app(page, shards, path_of, SIDE_PX)

    @app.post("/labels")
    def label(key: Annotated[str, Body(max_length=200)], name: Annotated[str, Body(max_length=1000)]) -> dict[str, int]:
        """Note an answer; an empty one for an image of none of the classes."""
        if key not in path_of or name not in ("", *domain.classes):
            raise Refused(422, "no such image or class", "use the page; start it again if the domain file changed")
        labels.answer(path_of[key], name)
        return {"labelled": sum(path in labels.answers for path in found.paths)}

    return app
