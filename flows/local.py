"""Pages for the person at this machine: their app, the pictures in it, and a port that nobody else reaches."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Collection

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from latteflow.flows.peers import OwnNames, Refused
from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import opened
from latteflow.tasks.report.html import thumbnail


def app(page: str, shards: Artifact, keys: Collection[str], side_px: int) -> FastAPI:
    """A page at ``/``, and pictures of the images with these keys, and of no others, at ``/images/KEY``."""
    own = FastAPI(title="latteflow", docs_url=None, redoc_url=None, openapi_url=None)
    own.add_exception_handler(Refused, _refused)
    own.add_exception_handler(RequestValidationError, _not_understood)
    index = read_index(shards)
    index = index.filter(index["key"].is_in(list(keys)))

    @own.get("/", response_class=HTMLResponse)
    def shown() -> HTMLResponse:
        return HTMLResponse(page, headers={"Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"})

    @own.get("/images/{key}")
    def image(key: str) -> Response:
        for record in read_records(shards, index.filter(index["key"] == key)):
            data = thumbnail(opened(record), side_px)
            kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
            return Response(data, media_type=kind, headers={"Cache-Control": "max-age=3600"})
        raise Refused(404, f"there is no image {key[:80]!r}", "start the command again, after a run")

    return own


def serve(own: FastAPI, port: int, on_ready: Callable[[str], None]) -> None:
    """At 127.0.0.1, until the process is told to end, as by Ctrl-C.

    Args:
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
        config = uvicorn.Config(OwnNames(own, ()), log_config=None, server_header=False, ws="none")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is in order
            uvicorn.Server(config).run(sockets=[listener])


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    answer: JSONResponse = error.answer()
    return answer


async def _not_understood(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "this is not what the page sends", "what_to_do": "use the page"}, 422)
