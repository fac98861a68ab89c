"""A fault proxy: HTTP between an S3 client and its server, going wrong on purpose.

Each fault is what a real network or server does at its worst moment:

    drop      the connection breaks before the request reaches the server
    lost      the server carries the request out, and the connection breaks before the answer
    cut       the request breaks off in the middle of its body
    500, 503  the server refuses for now (InternalError, SlowDown)
    truncate  the answer breaks off in the middle of its body
    short     the answer is complete, and half its body is missing: only a digest can tell
    mangle    a byte of the answer's body is another
    stall     nothing happens for 2 seconds

And what a server may be that does not know conditional requests:

    501       it says so (NotImplemented)
    ignore    it does as if there were no condition: a failed one is answered with 200
"""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

STALL_SECONDS = 2.0
_REFUSALS = {"500": "InternalError", "503": "SlowDown", "501": "NotImplemented"}


@dataclass(frozen=True)
class Request:
    """What a script decides by."""

    method: str
    path: str
    """With the query."""
    size: int
    """Bytes of the body."""


Script = Callable[[Request], str | None]
"""The fault to inject into a request, if any."""


def nothing(_: Request) -> str | None:
    """No fault."""
    return None


def randomly(seed: int, rates: dict[str, float]) -> Script:
    """Each fault with its own probability, from a seed."""
    dice = random.Random(seed)
    kinds, weights = [*rates, None], [*rates.values(), 1 - sum(rates.values())]
    return lambda _: dice.choices(kinds, weights)[0]


def first(faults: Iterable[str], *, method: str, path: str = "") -> Script:
    """One fault after the other, on the requests that match; then none."""
    left = iter(faults)

    def script(request: Request) -> str | None:
        return next(left, None) if request.method == method and path in request.path else None

    return script


class FaultProxy:
    """Listens on a free port of this machine, in a thread of its own."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self.script: Script = nothing
        self.injected: Counter[str] = Counter()
        """Faults that were really injected, by kind."""
        self.seen: list[Request] = []
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one of the two hung up, or the tests are over
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass one request on, and its answer back; False if the connection is to break."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")]
        if b"expect" in _headers(head):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, path, _ = lines[0].decode().split(" ", 2)
        body = await reader.readexactly(_length(head))
        request = Request(method, path, len(body))
        self.seen.append(request)
        fault = self.script(request)
        if fault == "drop":
            return self._break(fault)
        if fault in _REFUSALS:
            self.injected[fault] += 1
            writer.write(_refusal(fault, method))
            await writer.drain()
            return True
        if fault == "stall":
            self.injected[fault] += 1
            await asyncio.sleep(STALL_SECONDS)
        upstream, out = await asyncio.open_connection("127.0.0.1", self._upstream, limit=1 << 20)
        try:
            out.write(b"\r\n".join(lines))
            if fault == "cut" and body:
                out.write(body[: len(body) // 2])
                await out.drain()
                return self._break(fault)
            out.write(body)
            await out.drain()
            answer_head = await upstream.readuntil(b"\r\n\r\n")
            while answer_head.split(b" ")[1].startswith(b"1"):
                answer_head = await upstream.readuntil(b"\r\n\r\n")
            answer = b"" if method == "HEAD" else await _body(answer_head, upstream)
        finally:
            out.transport.abort()
        if fault == "lost":
            return self._break(fault)
        if fault == "ignore" and answer_head.split(b" ")[1] == b"412":
            self.injected[fault] += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return True
        ok = answer_head.split(b" ")[1].startswith(b"2") and method == "GET" and len(answer) > 1
        if fault in ("truncate", "short", "mangle") and ok:
            self.injected[fault] += 1
            half = len(answer) // 2
            if fault == "truncate":
                writer.write(answer_head + answer[:half])
                await writer.drain()
                return False
            answer = (
                answer[:half] if fault == "short" else answer[:half] + bytes([answer[half] ^ 1]) + answer[half + 1 :]
            )
            answer_head = _resized(answer_head, len(answer))
        writer.write(answer_head + answer)
        await writer.drain()
        return True

    def _break(self, fault: str) -> bool:
        self.injected[fault] += 1
        return False


def _headers(head: bytes) -> dict[bytes, bytes]:
    pairs = (line.split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _length(head: bytes) -> int:
    headers = _headers(head)
    if b"transfer-encoding" in headers:
        raise OSError("the tests' clients send bodies of known length")
    return int(headers.get(b"content-length", 0))


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    """The body as it was on the wire."""
    headers = _headers(head)
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        raw = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            raw += line + await reader.readexactly(size + 2)
            if size == 0:
                return raw
    if b"content-length" in headers:
        return await reader.readexactly(int(headers[b"content-length"]))
    return b"" if head.split(b" ")[1] in (b"204", b"304") else await reader.read()


def _resized(head: bytes, size: int) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(
        b"Content-Length: %d" % size if line.lower().startswith(b"content-length:") else line for line in lines
    )


def _refusal(fault: str, method: str) -> bytes:
    code = _REFUSALS[fault]
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {fault} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
