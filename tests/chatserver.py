"""A server of OpenAI's chat API on a free port of this machine, that misbehaves on demand."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One request, as a script sees it."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    attempt: int
    """How often the same prompt came before."""
    at: float

    @property
    def prompt(self) -> str:
        content = self.body["messages"][0]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    @property
    def images(self) -> list[bytes]:
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"] if "image_url" in part]
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        return [base64.b64decode(url.split(",", 1)[1], validate=True) for url in urls]


@dataclass(frozen=True)
class Reply:
    """What the server sends."""

    body: Any = b""
    """Bytes, text, or something to be sent as JSON."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    after_s: float = 0.0
    """Seconds until it is sent."""
    breaks: float | None = None
    """Share of the body after which the connection breaks; None: never."""


def answer(text: Any, reason: str = "stop", **usage: Any) -> Reply:
    """An answer as the API has it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    counts = usage or {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return Reply(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": counts}
    )


def error(status: int, message: str = "injected", **headers: str) -> Reply:
    """A refusal as the API has it."""
    return Reply({"error": {"message": message, "type": "injected", "code": None}}, status, headers)


Script = Callable[[Ask], Reply]


def echo(ask: Ask) -> Reply:
    """A text that tells which prompt it belongs to."""
    return answer(f"about: {ask.prompt}")


class ChatServer:
    """Listens until :meth:`close`. ``script`` may be changed at any time."""

    def __init__(self) -> None:
        self.script: Script = echo
        self.version: Any = {"version": "0.0-fake"}
        self.asked: list[Ask] = []
        self.most_at_once = 0
        self._at_once, self._attempts, self._lock = 0, Counter[str](), threading.Lock()
        self._closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(handler) -> None:  # noqa: N805
                self._send(handler, self.version if isinstance(self.version, Reply) else Reply(self.version))

            def do_POST(handler) -> None:  # noqa: N805
                self._serve(handler)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up, that is the test
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        """What was asked, in order of arrival."""
        return [ask.prompt for ask in self.asked]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            ask = Ask(body, handler.headers, 0, time.monotonic())
            ask = Ask(body, ask.headers, self._attempts[ask.prompt], ask.at)
            self._attempts[ask.prompt] += 1
            self.asked.append(ask)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.script(ask)
            if reply.after_s:
                self._closing.wait(reply.after_s)
        finally:
            with self._lock:
                self._at_once -= 1
        self._send(handler, reply)

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if reply.breaks is not None:
            handler.close_connection = True
            if not reply.breaks:
                return
        handler.send_response(reply.status)
        for name, value in {"Content-Type": reply.kind, "Content-Length": str(len(data)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data if reply.breaks is None else data[: int(len(data) * reply.breaks)])
