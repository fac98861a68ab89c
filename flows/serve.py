"""serve: an exported model as a small web service, for one machine and its neighbours.

What comes in is looked at by the rules of ingest, in processes of their own; images that arrive together go through the
model together. Whatever a client sends or does not send, the answer is JSON and the service stays up.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.util
import queue
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from models.errors import ModelError
from models.predictor import Predictor
from storage.errors import DataError
from storage.images import ImageLimits, ImageRejected
from tasks.predict import Decoder

TOP = 5
BATCH, WAIT_S = 32, 0.004
"""Images that go through the model at once, and how long the first of them waits for others."""
_THREADS = 4
_PAGE = Path(__file__).with_name("serve.html")


@dataclass(frozen=True)
class Limits:
    """What a client may do."""

    max_bytes: int = 32 << 20
    """Of a request."""
    max_files: int = 64
    max_pixels: int = 50_000_000
    """Of an image; larger ones are not decoded."""
    requests: int = 32
    """That are being received or answered; more are asked to come back."""
    seconds: float = 20.0
    """To send a request, and again to send the next."""


class Refused(Exception):
    """A request that is answered with an error, and what to do about it."""

    def __init__(self, status: int, error: str, what_to_do: str, **more: Any) -> None:
        super().__init__(error)
        self.status, self.content = status, {"error": error, "what_to_do": what_to_do, **more}


class File(NamedTuple):
    """An image of a request; the name is what the client says."""

    name: str
    data: bytes


class Batcher:
    """One thread that runs the model, on all images that arrive within a moment."""

    def __init__(self, answer: Callable[[torch.Tensor], list[dict[str, Any]]]) -> None:
        self._answer = answer
        self._waiting: queue.SimpleQueue[tuple[torch.Tensor, Future[dict[str, Any]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def __call__(self, pixels: torch.Tensor) -> Future[dict[str, Any]]:
        """What the model says of an image ``(3, height, width)``, later."""
        found: Future[dict[str, Any]] = Future()
        self._waiting.put((pixels, found))
        return found

    def close(self) -> None:
        """Answer what waits, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            wanted = [(pixels, found) for pixels, found in batch if found.set_running_or_notify_cancel()]
            if not wanted:
                continue
            try:
                answers = self._answer(torch.stack([pixels for pixels, _ in wanted]))
            except Exception as error:  # goes to those who asked; others are answered
                for _, found in wanted:
                    found.set_exception(error)
            else:
                for (_, found), answer in zip(wanted, answers, strict=True):
                    found.set_result(answer)

    def _next(self) -> list[tuple[torch.Tensor, Future[dict[str, Any]]]]:
        """Those that go together; nothing at the end."""
        batch = []
        item = self._waiting.get()
        until = time.monotonic() + WAIT_S
        while item is not None:
            batch.append(item)
            try:
                if len(batch) == BATCH:
                    break
                item = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
        if item is None and batch:
            self._waiting.put(None)  # for the next time
        return batch


def serve(folder: Path, host: str, port: int, limits: Limits, on_ready: Callable[[str], None]) -> None:
    """Load the model and answer until the process is told to end.

    Args:
        port: 0 for any that is free.
        on_ready: called with the address once it can be reached.

    Raises:
        ModelError: the folder is not a sound model, or a package is missing.
        DataError: the address is taken, or not one of this machine.
    """
    if importlib.util.find_spec("python_multipart") is None:
        raise ModelError("serving needs the package python-multipart; run: pip install 'latteflow[serve]'")
    predictor = Predictor.load(folder)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen at {host} port {port} ({error}); choose another --port or --host") from error
    with listener, Decoder(predictor, ImageLimits(max_pixels=limits.max_pixels), limits.seconds) as decode:
        config = uvicorn.Config(
            build(predictor, decode, folder.resolve().name, limits),
            http=type("Protocol", (_Impatient,), {"seconds": limits.seconds}),
            ws="none",
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        shown = f"[{host}]" if ":" in host else host
        on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is in order
            uvicorn.Server(config).run(sockets=[listener])


def build(predictor: Predictor, decode: Decoder, name: str, limits: Limits) -> FastAPI:
    """The application."""
    batcher = Batcher(lambda pixels: _said(predictor, pixels))
    pool = ThreadPoolExecutor(_THREADS, "decode")
    page, policy = _page()
    under_way = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.shutdown(cancel_futures=True)
        batcher.close()

    app = FastAPI(title=f"latteflow: {name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)

    @contextlib.contextmanager
    def room() -> Iterator[None]:
        nonlocal under_way
        if under_way >= limits.requests:
            raise Refused(503, f"{under_way} requests are being answered", "try again in a second")
        under_way += 1
        try:
            yield
        finally:
            under_way -= 1

    async def answer(files: Sequence[File]) -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        decoded = await loop.run_in_executor(pool, decode, [file.data for file in files])
        waiting = [_why(each) if isinstance(each, ImageRejected) else batcher(each) for each in decoded]
        said = [await asyncio.wrap_future(each) if isinstance(each, Future) else each for each in waiting]
        return [{"file": file.name, **each} for file, each in zip(files, said, strict=True)]

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        """One image as the body, or one and more as multipart/form-data."""
        with room():
            found = await answer(await _files(request, limits))
        if all("error" in each for each in found):
            raise Refused(422, found[0]["error"], found[0]["what_to_do"], predictions=found)
        return JSONResponse({"model": name, "predictions": found})

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "classes": len(predictor.classes), "under_way": under_way}

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    return app


class _Impatient(H11Protocol):
    """Closes a connection on which no request begins in time; the application times the rest of a request."""

    seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        before = self.cycle

        def look() -> None:
            if self.cycle is before:
                self.transport.abort()

        self.loop.call_later(self.seconds, look)


async def _files(request: Request, limits: Limits) -> list[File]:
    """The images of a request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
        raise Refused(
            415,
            f"content type {kind[:80]!r} is not understood",
            "send an image with the content type image/jpeg or the like, or a form as multipart/form-data",
        )
    data = await _body(request, limits)
    if not is_form:
        return [File("", data)]

    async def stream() -> AsyncGenerator[bytes, None]:
        yield data

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=limits.max_files).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(
            400, f"the form cannot be read: {error}", f"send at most {limits.max_files} files as multipart/form-data"
        ) from error
    files = [
        File(each.filename or "", await each.read()) for _, each in form.multi_items() if not isinstance(each, str)
    ]
    await form.close()
    if not files:
        raise Refused(400, "the form holds no file", "add an image, as in: curl --form file=@photo.jpg ADDRESS/predict")
    return files


async def _body(request: Request, limits: Limits) -> bytes:
    # uvicorn reads on and forgets what comes after a refusal, so that the client gets to hear it.
    too_much = Refused(
        413, f"the request is larger than {limits.max_bytes:,} bytes", "send fewer or smaller images at a time"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise too_much
    pieces, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > limits.max_bytes:
                    raise too_much
                pieces.append(piece)
    except TimeoutError:
        raise Refused(
            408, f"the request did not arrive within {limits.seconds:g} s", "send it faster, or a smaller image"
        ) from None
    return b"".join(pieces)


def _said(predictor: Predictor, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """What the model says of each image, as it is sent."""
    found = predictor.answers(pixels, TOP)
    return [
        {
            "classes": [
                {"class": predictor.classes[number], "probability": float(probability)}
                for number, probability in zip(found.ranked[row], found.probabilities[row], strict=True)
            ],
            "unknown": None if found.unknown is None else bool(found.unknown[row]),
            **{name: float(getattr(found, name)[row]) for name in ("margin", "entropy", "score")},
        }
        for row in range(len(pixels))
    ]


def _why(rejected: ImageRejected) -> dict[str, Any]:
    """An image without an answer, as it is told."""
    return {
        "error": f"the image cannot be used: {rejected}",
        "reason": rejected.reason.value,
        "what_to_do": "send a JPEG, PNG, WebP, GIF, BMP or TIFF that other programs open, within the size limit",
    }


async def _refused(request: Request, error: Any) -> JSONResponse:
    return JSONResponse(error.content, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _http(request: Request, error: Any) -> JSONResponse:
    content = {"error": f"{error.status_code}: {error.detail}", "what_to_do": "POST /predict, GET /health or GET /"}
    return JSONResponse(content, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({}, 499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> JSONResponse:
    content = {"error": f"{type(error).__name__} in the service", "what_to_do": "try again; its log says more"}
    return JSONResponse(content, 500)


def _page() -> tuple[str, str]:
    """The upload page, and the policy by which a browser runs its own style and script, and asks nobody else."""
    html = _PAGE.read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None
        return f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    parts = ["default-src 'none'", digest("style"), digest("script"), "img-src blob: data:", "connect-src 'self'"]
    return html, "; ".join([*parts, "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'"])
