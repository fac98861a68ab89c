"""review: the class list of a domain beside its images, served to this machine alone, and a new domain file of it."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from ruamel.yaml import YAML
from starlette.types import ASGIApp

from latteflow.flows.errors import UsageError
from latteflow.flows.peers import OwnNames, Refused
from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.report.classlist import SHOWN, Review
from latteflow.tasks.report.html import html, thumbnail

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


def serve(file: Path, place: Path, found: Review, shards: Artifact, port: int, on_ready: Callable[[str], None]) -> None:
    """Show the review at 127.0.0.1 until the process is told to end.

    Args:
        file: the domain file.
        place: of the new one.
        port: 0 for any that is free.
        on_ready: called with the address once it can be reached.

    Raises:
        DataError: the port is taken.
    """
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen at port {port} ({error}); choose another --port") from error
    with listener:
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(build(file, place, found, shards), log_config=None, server_header=False, ws="none")
        uvicorn.Server(config).run(sockets=[listener])


def build(file: Path, place: Path, found: Review, shards: Artifact) -> ASGIApp:
    """The application."""
    page = html("review.html.j2", live="review.js", r=found, shown=SHOWN)
    index = read_index(shards)
    app = FastAPI(title=f"latteflow review: {found.domain}", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _not_understood)

    @app.get("/", response_class=HTMLResponse)
    def index_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"})

    @app.get("/images/{key}")
    def image(key: str) -> Response:
        """A small picture of an image that the page names; of no other."""
        rows = index.filter(index["key"] == key) if key in found.paths else index.clear()
        for record in read_records(shards, rows):
            data = thumbnail(opened(record), SIDE_PX)
            kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
            return Response(data, media_type=kind, headers={"Cache-Control": "max-age=3600"})
        raise Refused(404, f"there is no image {key[:80]!r}", "start latteflow review again, after a run")

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

    return OwnNames(app, ())


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


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    answer: JSONResponse = error.answer()
    return answer


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "classes are a list of names", "what_to_do": "write them by the page"}, 422)
