"""Any server that speaks OpenAI's chat API: ``vllm serve``, SGLang, llama-server, or a hosted one."""

from __future__ import annotations

import base64
import functools
import io
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from latteflow.models.errors import ModelError
from latteflow.models.settings import OpenAISettings
from latteflow.models.texts.describers import EngineStopped, Prompt, Text, tidy
from latteflow.models.texts.describers.prompted import ANSWER

if TYPE_CHECKING:
    from PIL.Image import Image

NEVER = frozenset({400, 413, 415, 422})
"""Statuses of a request that will not be answered however often it is sent: one row's fault."""
PATIENT = frozenset({408, 409, 425, 429})
"""Statuses, besides 5xx, that a later try may not meet."""
BUSY = frozenset({429, 503, 529})
"""Statuses that say nothing about the prompt."""
TRIES = 6
"""Failures of one prompt, not counting a busy server, after which a server that answers others has failed at it."""
LONGEST_WAIT_S = 30.0
LISTING_S = 5.0
"""Until a server that is asked for its models counts as away."""
_DECODING = threading.BoundedSemaphore(min(16, 2 * (os.cpu_count() or 1)))
"""Requests may be many; decoded images take memory."""


class OpenAIEngine:
    """An :class:`~models.texts.describers.Engine`.

    Args:
        settings: of the server.
        key: sent as bearer token; never logged, stored or shown.

    Raises:
        ModelError: the package openai is missing, or the key cannot be one.
    """

    def __init__(self, settings: OpenAISettings, key: str | None) -> None:
        try:
            import openai
        except ImportError as error:
            raise ModelError(
                "the describer `kind: openai` needs the package openai: pip install 'latteflow[openai]'"
            ) from error
        for name in ("httpx", "httpx2"):  # the second since openai 3
            logging.getLogger(name).setLevel(logging.WARNING)  # they have a line for each request
        self._settings, self._key = settings, (key or "").strip() or "none"
        if not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            raise ModelError(
                f"the key (variable {settings.key_env}, or `key_block`) has blanks or characters that cannot be sent; "
                "was something else pasted with it?"
            )
        self._client = openai.OpenAI(
            base_url=settings.url, api_key=self._key, timeout=settings.timeout_s, max_retries=0
        )
        self.waited = 0.0
        self._host = urlsplit(settings.url).hostname or "the server"
        self._request = {
            "model": settings.model,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        if settings.structured:
            form = {"name": "description", "schema": ANSWER, "strict": True}
            self._request["response_format"] = {"type": "json_schema", "json_schema": form}

    @functools.cached_property
    def version(self) -> str:
        """What the server says it is; vLLM does, the API has no such question."""
        import httpx

        root = self._settings.url.rstrip("/").removesuffix("/v1")
        try:
            answer = httpx.get(f"{root}/version", timeout=5, headers={"Authorization": f"Bearer {self._key}"})
            return f"server of version {self._line(str(answer.json()['version']))[:40]}"
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return "server of unknown version"

    def models(self) -> list[str]:
        """What the server answers with, by its own names; asked once, for a few seconds.

        Raises:
            ModelError: it does not answer, refuses, or does not speak OpenAI's API.
        """
        import openai

        try:
            listed = self._client.with_options(timeout=LISTING_S).models.list().data
            return [tidy(each.id) for each in listed]
        except (openai.APIError, AttributeError, TypeError, ValueError) as error:
            raise ModelError(
                f"the server at {self._host} does not say which models it has: {self._shown(error)}. "
                f"Check `url` (it ends in /v1 for most servers) and the key (variable {self._settings.key_env}, or "
                "`key_block`)"
            ) from None

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Text]]:
        """See :meth:`models.texts.describers.Engine.generate`."""
        order = iter(enumerate(prompts))
        session = _Session(self._settings.patience_s)
        under_way: dict[Future[Text], int] = {}
        pool = ThreadPoolExecutor(self._settings.concurrency)
        try:
            while True:
                while len(under_way) < self._settings.concurrency and (coming := next(order, None)) is not None:
                    under_way[pool.submit(self._answer, coming[1], session)] = coming[0]
                if not under_way:
                    break
                stop: BaseException | None = None
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    place = under_way.pop(future)
                    if (error := future.exception()) is None:
                        yield place, future.result()
                    else:
                        stop = stop or error
                if stop is not None:
                    session.stopped.set()
                    for future in wait(under_way).done:  # those that are answered were paid for
                        if future.exception() is None:
                            yield under_way[future], future.result()
                    raise stop
        finally:
            session.stopped.set()
            # A reader that went away does not wait for what is under way.
            pool.shutdown(wait=False, cancel_futures=True)
            self.waited = session.share_of_images

    def _answer(self, prompt: Prompt, session: _Session) -> Text:
        """One text, however many tries it takes."""
        import openai

        start = time.perf_counter()
        try:
            with _DECODING:
                content: list[dict[str, Any]] = [
                    {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in prompt.images()
                ]
        except EngineStopped:
            raise
        except Exception as error:  # a hostile image may raise anything; it is one row
            return Text.failed(error)
        session.decoded(time.perf_counter() - start)
        message = {"role": "user", "content": [*content, {"type": "text", "text": prompt.text}]}
        attempt = failures = 0
        while not session.stopped.is_set():
            start = time.perf_counter()
            try:
                text = self._asked(message, seed=prompt.seed)
                session.succeeded(time.perf_counter() - start)
                return text
            except openai.APIStatusError as error:
                if error.status_code in NEVER:
                    return Text.failed(self._shown(error))
                if error.status_code < 500 and error.status_code not in PATIENT:
                    raise EngineStopped(
                        f"the server at {self._host} refuses model {self._settings.model!r}: {self._shown(error)}. "
                        f"Check `url`, `model` and the key (variable {self._settings.key_env}, or `key_block`)"
                    ) from None
                why: Exception = error
                asked = _retry_after(error)
                failures += error.status_code not in BUSY
            except (openai.APIError, _Garbage, ValueError) as error:  # ValueError: JSON that is none
                why, asked = error, 0.0
                failures += 1
                if isinstance(error, _Garbage) and not session.ever:
                    raise EngineStopped(
                        f"the server at {self._host} does not speak OpenAI's chat API: {self._shown(error)}. "
                        "Check `url`; it ends in /v1 for most servers"
                    ) from None
            if failures >= TRIES and self._answers():
                return Text.failed(f"the server answers, and fails at this prompt: {self._shown(why)}")
            # Spread by the prompt's own seed, so that not all come back at once.
            pause = min(LONGEST_WAIT_S, max(asked, 0.5 * 2.0 ** min(attempt, 6) * (0.75 + (prompt.seed % 64) / 128)))
            if not session.wait(pause):
                raise EngineStopped(
                    f"the server at {self._host} gave no answer for {self._settings.patience_s:g} s, the last time: "
                    f"{self._shown(why)}. What was written is kept; run again when the server is back"
                ) from None
            attempt += 1
        raise EngineStopped("another request stopped the run")

    def _asked(self, message: dict[str, Any], **more: Any) -> Text:
        # Any: its own types are for requests that are written out.
        create: Any = self._client.chat.completions.create
        extra = self._settings.extra
        body = {name: value for name, value in {**self._request, **more}.items() if name not in extra}
        further = {name: value for name, value in extra.items() if value is not None}
        return _text(create(messages=[message], **body, extra_body=further))

    def _answers(self) -> bool:
        """Whether the server answers a prompt that no model fails at."""
        import openai

        try:
            self._asked({"role": "user", "content": "Hello."}, max_tokens=1)
        except (openai.APIError, _Garbage, ValueError):
            return False
        return True

    def _shown(self, error: Exception) -> str:
        """The error in one line, without the key, which some servers repeat."""
        return self._line(f"{type(error).__name__}: {error}")[:500]

    def _line(self, text: str) -> str:
        # Before anything is cut off: half a key is one too much.
        return tidy(text.replace(self._key, "***") if len(self._key) > 4 else text)


class _Garbage(Exception):
    """An answer that is none."""


class _Session:
    """What the requests of one call share: since when none succeeds, and whether to stop."""

    def __init__(self, patience_s: float) -> None:
        self.stopped = threading.Event()
        self.ever = False
        self._patience_s = patience_s
        self._failing_since: float | None = None
        self._lock = threading.Lock()
        self._images_s = self._requests_s = 0.0

    def decoded(self, seconds: float) -> None:
        with self._lock:
            self._images_s += seconds

    def succeeded(self, seconds: float) -> None:
        with self._lock:
            self.ever, self._failing_since = True, None
            self._requests_s += seconds

    def wait(self, seconds: float) -> bool:
        """Pause; False if patience is at an end or the run stops."""
        now = time.monotonic()
        with self._lock:
            self._failing_since = self._failing_since or now
            left = self._failing_since + self._patience_s - now
        return left > 0 and not self.stopped.wait(min(seconds, left))

    @property
    def share_of_images(self) -> float:
        return self._images_s / max(self._images_s + self._requests_s, 1e-9)


def _text(answer: Any) -> Text:
    try:
        choice = answer.choices[0]
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError(text)
        return Text(
            text,
            flags=("filtered",) if choice.finish_reason == "content_filter" else (),
            finish_reason="length" if choice.finish_reason == "length" else "stop",
            prompt_tokens=_count(answer, "prompt_tokens"),
            output_tokens=_count(answer, "completion_tokens"),
        )
    except (AttributeError, LookupError, TypeError, ValueError):
        raise _Garbage(f"it answered {answer!r}") from None


def _count(answer: Any, name: str) -> int:
    """A number of tokens; 0 from a server that does not count, whose answer is none the worse."""
    found = getattr(getattr(answer, "usage", None), name, None)
    return found if isinstance(found, int) and 0 <= found < 2**31 else 0


def _retry_after(error: Any) -> float:
    try:
        return max(0.0, float(error.response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
