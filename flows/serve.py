"""serve: an exported model as a small web service, for one machine and its neighbours.

What comes in is looked at by the rules of ingest, in processes of their own; images that arrive together go through the
model together. Whatever a client sends or does not send, the answer is JSON and the service stays up.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from latteflow.flows.instruments import Instruments, Measured
from latteflow.flows.peers import HalfSent, Impatient, OwnNames, Refused, Waiting
from latteflow.models.errors import ModelError
from latteflow.models.ship.predictor import Predictor
from latteflow.storage.errors import DataError
from latteflow.storage.images import ImageLimits, ImageRejected, RejectReason
from latteflow.tasks.ship.predict import Decoder

log = logging.getLogger("latteflow.flows")
TOP = 5
BATCH, WAIT_S = 32, 0.004
"""Images that go through the model at once, and how long the first of them waits for others."""
_THREADS = 4
_LARGE = 12_500_000
"""Pixels above which images are decoded one at a time, so that they leave room for others, in memory and in threads."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE_BLOCK, _KEPT = 32 << 20, 64 << 20
_PAGE = Path(__file__).with_name("serve.html")


@dataclass(frozen=True)
class Limits:
    """What a client may do."""

    max_bytes: int = 32 << 20
    """Of a request."""
    max_files: int = 64
    max_pixels: int = 50_000_000
    """Of an image; larger ones are not decoded."""
    request_pixels: int = 100_000_000
    """Of all images of a request; what goes beyond is not decoded."""
    requests: int = 256
    """That are here and not answered; more are asked to come back."""
    half_sent: int = 256
    """Requests that are not all here, and again connections on which none begins; of more, the oldest give way."""
    seconds: float = 20.0
    """To send a request, and again to send the next."""

    @property
    def short(self) -> int:
        """Bytes of a request for which room is kept."""
        return self.max_bytes // 32

    def memory(self, requests: int) -> int:
        """Bytes that so many requests may hold together: each counts as a short one, and as much as it has."""
        return requests * self.short


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


class Serving:
    """A model that answers, with what decodes and batches for it.

    While another takes over, requests that began with it end with it.

    Raises:
        ModelError: the folder is not a sound model.
    """

    def __init__(self, folder: Path, limits: Limits, instruments: Instruments) -> None:
        self.predictor = Predictor.load(folder)
        self.name, self._instruments = folder.resolve().name, instruments
        self.decode = Decoder(self.predictor, ImageLimits(max_pixels=limits.max_pixels), limits.seconds)
        self.decode.__enter__()
        self.batcher = Batcher(self._answer)
        self._users, self._is_retired = 0, False

    @contextlib.contextmanager
    def used(self) -> Iterator[Serving]:
        """For a request, on the event loop."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            self._end()

    def retire(self) -> None:
        """Close when the last request is answered."""
        self._is_retired = True
        self._end()

    def close(self) -> None:
        """Answer what waits, and end."""
        self.batcher.close()
        self.decode.__exit__(None, None, None)

    def _end(self) -> None:
        if self._is_retired and not self._users:
            threading.Thread(target=self.close, daemon=True).start()  # it waits, and the event loop must not

    def _answer(self, pixels: torch.Tensor) -> list[dict[str, Any]]:
        found = _said(self.predictor, pixels)
        self._instruments.batch.observe(len(found))
        self._instruments.unknown.inc(sum(bool(each["unknown"]) for each in found))
        return found


def serve(
    folder: Path,
    host: str,
    port: int,
    limits: Limits,
    on_ready: Callable[[str], None],
    names: Sequence[str] = (),
) -> None:
    """Load the model and answer until the process is told to end. On SIGHUP the folder is read again.

    Args:
        port: 0 for any that is free.
        on_ready: called with the address once it can be reached.
        names: by which clients call it, beside localhost and the addresses of this machine.

    Raises:
        ModelError: the folder is not a sound model, or a package is missing.
        DataError: the address is taken, or not one of this machine; or a name is none.
    """
    if importlib.util.find_spec("python_multipart") is None:
        raise ModelError("serving needs the package python-multipart; run: pip install 'latteflow[serve]'")
    _keep_memory()
    instruments = Instruments()
    with contextlib.ExitStack() as ending:
        service = Service(lambda: Serving(folder, limits, instruments), limits, instruments)
        ending.callback(service.close)
        try:
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:
            raise DataError(
                f"cannot listen at {host} port {port} ({error}); choose another --port or --host"
            ) from error
        ending.enter_context(listener)
        silent = {"seconds": limits.seconds, "waiting": Waiting(limits.half_sent)}
        config = uvicorn.Config(
            build(service, [host, *names]),
            http=type("Protocol", (Impatient,), silent),
            ws="none",
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        shown = f"[{host}]" if ":" in host else host
        on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is in order
            uvicorn.Server(config).run(sockets=[listener])


class Service:
    """The model that answers now, and the room there is for requests.

    Args:
        load: the first model, and those that take its place.
    """

    def __init__(self, load: Callable[[], Serving], limits: Limits, instruments: Instruments) -> None:
        self._load, self.limits, self.instruments = load, limits, instruments
        self._pool = ThreadPoolExecutor(_THREADS, "decode")
        self._one_large, self._takeover = asyncio.Lock(), asyncio.Lock()
        self.under_way = self._held = 0
        instruments.under_way.set_function(lambda: self.under_way)
        self._take(load())

    def _take(self, model: Serving) -> None:
        self.now = model
        self.instruments.serves(model.name, model.predictor.fingerprint)

    async def reload(self) -> None:
        """Let the folder's model take over, if it is sound; what is being asked ends with the one before."""
        async with self._takeover:
            try:
                new = await asyncio.get_running_loop().run_in_executor(None, self._load)
            except Exception as error:  # a folder may be anything; the model that answers stays
                self.instruments.reloads.labels("refused").inc()
                log.error("the model before stays: %s", error)
                return
            before = self.now
            self._take(new)
            self.instruments.reloads.labels("taken").inc()
            log.warning("model %s, fingerprint %s, answers from now on", new.name, new.predictor.fingerprint)
            before.retire()

    def close(self) -> None:
        """Answer what waits, and end."""
        self._pool.shutdown(cancel_futures=True)
        self.now.close()

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """For a request of so many bytes. Long ones leave a quarter to short ones."""
        weight, most = self.limits.short + size, self.limits.memory(self.limits.requests)
        if size > self.limits.short:
            most = most * 3 // 4
        if self.under_way and self._held + weight > most:
            raise Refused(503, f"{self.under_way} requests are being answered", "try again in a second")
        self.under_way, self._held = self.under_way + 1, self._held + weight
        try:
            yield
        finally:
            self.under_way, self._held = self.under_way - 1, self._held - weight

    async def answer(self, model: Serving, files: Sequence[File]) -> list[dict[str, Any]]:
        """What the model says of each image, or why nothing; as it is sent."""
        left = self.limits.request_pixels
        waiting: list[dict[str, Any] | Future[dict[str, Any]]] = []
        for file in files:  # one after the other, so that requests take turns
            found, size = await self._decoded(model.decode, file.data, min(left, self.limits.max_pixels))
            left -= size
            rejected = isinstance(found, ImageRejected)
            self.instruments.images.labels("refused" if rejected else "answered").inc()
            waiting.append(_why(found, left, self.limits) if isinstance(found, ImageRejected) else model.batcher(found))
        said = [await asyncio.wrap_future(each) if isinstance(each, Future) else each for each in waiting]
        if self.limits.request_pixels - left > _LARGE:
            await asyncio.get_running_loop().run_in_executor(self._pool, _give_back)
        return [{"file": file.name, **each} for file, each in zip(files, said, strict=True)]

    async def _decoded(self, decode: Decoder, data: bytes, most: int) -> tuple[torch.Tensor | ImageRejected, int]:
        """Pixels of an image that has at most so many, or why there are none; and how many."""
        loop = asyncio.get_running_loop()
        found, size = await loop.run_in_executor(self._pool, decode.one, data, min(most, _LARGE))
        if isinstance(found, ImageRejected) and found.reason is RejectReason.TOO_LARGE and most > _LARGE:
            async with self._one_large:
                found, size = await loop.run_in_executor(self._pool, decode.one, data, most)
        return found, size


def build(service: Service, names: Sequence[str]) -> ASGIApp:
    """The application, for clients that call it by one of these names."""
    page, policy = _page()
    limits = service.limits

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

        def again() -> None:
            tasks.add(task := loop.create_task(service.reload()))
            task.add_done_callback(tasks.discard)

        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, again)
        yield

    app = FastAPI(title=f"latteflow: {service.now.name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _broken)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        """One image as the body, or one and more as multipart/form-data."""
        is_form = _is_form(request)
        data = await _body(request, limits)
        with service.room(len(data)), service.now.used() as model:
            found = await service.answer(model, await _files(request, data, limits) if is_form else [File("", data)])
        if all("error" in each for each in found):
            raise Refused(422, found[0]["error"], found[0]["what_to_do"], predictions=found)
        return JSONResponse({"model": model.name, "fingerprint": model.predictor.fingerprint, "predictions": found})

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        now = service.now
        return {
            "status": "ok",
            "model": now.name,
            "fingerprint": now.predictor.fingerprint,
            "classes": len(now.predictor.classes),
            "under_way": service.under_way,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.instruments.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    waiting = Waiting(limits.memory(limits.half_sent))
    own = HalfSent(OwnNames(app, names), limits.seconds, waiting, limits.short)
    return Measured(own, service.instruments)


def _is_form(request: Request) -> bool:
    """Whether a request is a form, and not an image."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    if not (is_form or kind.startswith("image/") or kind == "application/octet-stream"):
        raise Refused(
            415,
            f"content type {kind[:80]!r} is not understood",
            "send an image with the content type image/jpeg or the like, or a form as multipart/form-data",
        )
    return is_form


async def _files(request: Request, data: bytes, limits: Limits) -> list[File]:
    """The images of a form."""

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
    too_much = Refused(
        413, f"the request is larger than {limits.max_bytes:,} bytes", "send fewer or smaller images at a time"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise too_much
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limits.max_bytes:
            raise too_much
    return bytes(data)


def _keep_memory() -> None:
    """Have the C library keep what a batch takes: to have it anew each time costs a fifth of the model's time."""
    with contextlib.suppress(AttributeError):  # other libraries do so, or have another name for it
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def _give_back() -> None:
    """Have it give back all that is free; else it keeps what the largest images took."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def _why(rejected: ImageRejected, left: int, limits: Limits) -> dict[str, Any]:
    """An image without an answer, as it is told; ``left`` are the pixels that a request still has."""
    if rejected.reason is RejectReason.TOO_LARGE and left < limits.max_pixels:
        return {
            "error": f"the image cannot be used: {rejected}, what those before it left of {limits.request_pixels:,}",
            "reason": rejected.reason.value,
            "what_to_do": "send fewer or smaller images at a time",
        }
    return {
        "error": f"the image cannot be used: {rejected}",
        "reason": rejected.reason.value,
        "what_to_do": "send a JPEG, PNG, WebP, GIF, BMP or TIFF that other programs open, within the size limit",
    }


async def _refused(request: Request, error: Any) -> JSONResponse:
    response: JSONResponse = error.answer()
    return response


async def _http(request: Request, error: Any) -> JSONResponse:
    content = {
        "error": f"{error.status_code}: {error.detail}",
        "what_to_do": "POST /predict, GET /health, GET /metrics or GET /",
    }
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
