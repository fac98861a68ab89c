"""Whom the service listens to, and for how long: half-sent requests, foreign names, answers before a request's end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from latteflow.storage.errors import DataError

_OWN = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """A request that is answered with an error, and what to do about it."""

    def __init__(self, status: int, error: str, what_to_do: str, **more: Any) -> None:
        super().__init__(error)
        self.status, self.content = status, {"error": error, "what_to_do": what_to_do, **more}

    def answer(self) -> JSONResponse:
        """As it is sent."""
        return JSONResponse(self.content, self.status, {"Retry-After": "1"} if self.status == 503 else None)


@dataclass(eq=False)
class Awaited:
    """Something of a peer's that is not all here yet."""

    peer: str
    weight: int
    give_way: Callable[[], object]
    """Called where it is no longer waited for."""


class Waiting:
    """All that is waited for. Where it is too much, the peer that has most of it loses its oldest.

    So whoever sends halves of requests is in nobody's way but its own, and not even there for long.

    Args:
        most: weight of all together; what is alone may weigh more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: dict[str, dict[Awaited, None]] = {}

    def add(self, peer: str, weight: int, give_way: Callable[[], object]) -> Awaited:
        """Wait for one more."""
        one = Awaited(peer, weight, give_way)
        self._of.setdefault(peer, {})[one] = None
        self._make_room()
        return one

    def grow(self, one: Awaited, weight: int) -> None:
        """It weighs so much more."""
        one.weight += weight
        self._make_room()

    def remove(self, one: Awaited) -> None:
        """It is here, or not waited for any more; may be said twice."""
        others = self._of.get(one.peer, {})
        others.pop(one, None)
        if not others:
            self._of.pop(one.peer, None)

    def _make_room(self) -> None:
        weights = {peer: sum(each.weight for each in theirs) for peer, theirs in self._of.items()}
        while sum(weights.values()) > self._most and sum(map(len, self._of.values())) > 1:
            peer = max(weights, key=lambda each: weights[each])
            oldest = next(iter(self._of[peer]))
            weights[peer] -= oldest.weight
            self.remove(oldest)
            oldest.give_way()


class HalfSent:
    """ASGI: requests are waited for, but neither for long nor too many of them; and who is refused gets to hear it.

    An answer that is given before the request is here (413, say) is sent at once, and the connection closed after what
    the client still sends was read and forgotten: many send all before they read, and a connection that is closed
    under them is all that they would see.

    Args:
        seconds: for a request, from its head to its end.
        waiting: where half-sent requests stand; each by ``weight`` and the bytes that came.
    """

    def __init__(self, app: ASGIApp, seconds: float, waiting: Waiting, weight: int) -> None:
        self._app, self._seconds, self._waiting, self._weight = app, seconds, waiting, weight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        one = _Request(receive, send, self._seconds, self._waiting)
        one.awaited = self._waiting.add(_peer(scope["client"]), self._weight, one.give_way)
        try:
            await self._app(scope, one.receive, one.send)
        finally:
            self._waiting.remove(one.awaited)


class _Request:
    """A request with a body, from its head to the end of its answer."""

    awaited: Awaited

    def __init__(self, receive: Receive, send: Send, seconds: float, waiting: Waiting) -> None:
        self._receive, self._send, self._seconds, self._waiting = receive, send, seconds, waiting
        self._until = asyncio.get_running_loop().time() + seconds
        self._timer: asyncio.Timeout | None = None
        self._whole = self._answered = self._let_go = False

    def give_way(self) -> None:
        self._until = 0.0
        if self._timer is not None:
            self._timer.reschedule(self._until)

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until) as self._timer:
                message = await self._receive()
        except TimeoutError:
            self._let_go = True
            raise self._too_slow() from None
        finally:
            self._timer = None
        self._whole = not message.get("more_body", False)
        if self._whole:
            self._waiting.remove(self.awaited)
        elif not self._answered:  # what comes later is not kept
            self._waiting.grow(self.awaited, len(message["body"]))
        return message

    async def send(self, message: Message) -> None:
        if not self._whole and message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        elif not self._whole and not message.get("more_body", False):
            self._answered = True
            await self._send({**message, "more_body": True})
            with contextlib.suppress(Refused):
                while not (self._whole or self._let_go):
                    await self.receive()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _too_slow(self) -> Refused:
        if self._until:
            return Refused(
                408, f"the request did not arrive within {self._seconds:g} s", "send it faster, or smaller images"
            )
        return Refused(503, "too many requests are being received", "try again in a second, with fewer at a time")


class OwnNames:
    """ASGI: answers only who asks for this service by a name of its own.

    Else a web page of elsewhere could bind its name to this address, and read the answers as its own.

    Args:
        names: beside localhost and the address at which a request arrives; with or without a port.

    Raises:
        DataError: one of them is no name.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = {*_OWN, *map(_checked, names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked = Headers(scope=scope).get("host", "")
            if _name(asked) not in {*self._names, scope["server"][0]}:
                refused = Refused(
                    421,
                    f"this service does not go by the name {asked[:200]!r}",
                    "use the address it listens at, or start it with --allow-host NAME",
                )
                await refused.answer()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Impatient(H11Protocol):
    """Closes a connection on which no request begins in time, or too many are waited for; see :class:`HalfSent`."""

    seconds: ClassVar[float]
    waiting: ClassVar[Waiting]
    """Connections without a request, each of weight 1."""
    _awaited: Awaited | None = None
    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._begun()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before and not self.transport.is_closing():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._begun()

    def _expect(self) -> None:
        self._awaited = self.waiting.add(_peer(self.client), 1, self.transport.abort)
        self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _begun(self) -> None:
        if self._awaited is not None:
            self.waiting.remove(self._awaited)
            self._timer.cancel()
            self._awaited = None


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _peer(client: tuple[str, int] | None) -> str:
    return client[0] if client else ""


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _checked(name: str) -> str:
    found = _name(f"[{name}]" if name.count(":") > 1 and "[" not in name else name)
    if found is None or "/" in name:
        raise DataError(f"--allow-host {name!r} is no name; give one such as photos.example.org")
    return found
