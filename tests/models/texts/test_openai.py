"""The client of OpenAI's chat API against a real server on this machine that does everything a server may do wrong."""

import functools
import io
import logging
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from chatserver import Ask, ChatServer, Reply, answer, echo, error
from latteflow.models.errors import ModelError
from latteflow.models.settings import OpenAISettings
from latteflow.models.texts.describers import EngineStopped, Prompt, Text
from latteflow.models.texts.describers import openai as module
from latteflow.models.texts.describers.openai import TRIES, OpenAIEngine

pytestmark = pytest.mark.slow

PAGE = Reply("<html>Welcome to nginx</html>", kind="text/html")
KEY = "sk-very-secret-0123456789abcdef"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    found = ChatServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(ssl, "create_default_context", _certificates)  # read for each client, though never used here


@functools.cache
def _certificates(*args: Any, **more: Any) -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def engine(server: ChatServer | str, key: str | None = KEY, **more: Any) -> OpenAIEngine:
    url = server if isinstance(server, str) else server.url
    given = {"timeout_s": 10.0, "patience_s": 10.0, "concurrency": 4, **more}
    return OpenAIEngine(OpenAISettings(kind="openai", model="tiny", url=url, **given), key)


def prompts(count: int, images: Callable[[], list[Image.Image]] = lambda: []) -> list[Prompt]:
    return [Prompt(f"p{number}", images, seed=1000 + number) for number in range(count)]


def run(engine: OpenAIEngine, asked: list[Prompt]) -> dict[int, Text]:
    found = list(engine.generate(asked))
    assert len(dict(found)) == len(found)  # each place once
    return dict(found)


def stops(engine: OpenAIEngine, asked: list[Prompt]) -> tuple[dict[int, Text], str]:
    """What came before it stopped, and what it said."""
    found: dict[int, Text] = {}
    with pytest.raises(EngineStopped) as caught:
        for place, text in engine.generate(asked):
            found[place] = text
    return found, str(caught.value)


def good(count: int) -> dict[int, Text]:
    return {n: Text(f"about: p{n}", prompt_tokens=11, output_tokens=5) for n in range(count)}


def once(reply: Reply) -> Callable[[Ask], Reply]:
    """The first try of every prompt gets this, the next an answer."""
    return lambda ask: reply if ask.attempt == 0 else echo(ask)


def test_what_is_sent(server: ChatServer) -> None:
    run(engine(server, max_tokens=33, temperature=0.5), prompts(1))
    (ask,) = server.asked
    assert ask.body == {
        "model": "tiny",
        "max_tokens": 33,
        "temperature": 0.5,
        "seed": 1000,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "p0"}]}],
    }
    assert ask.headers["Authorization"] == f"Bearer {KEY}"


def test_fields_that_a_server_wants_are_sent_and_others_are_not(server: ChatServer) -> None:
    extra = {"max_tokens": None, "seed": None, "temperature": 1, "max_completion_tokens": 400, "top_k": 5}
    run(engine(server, extra=extra), prompts(1))
    (ask,) = server.asked
    assert {name: value for name, value in ask.body.items() if name != "messages"} == {
        "model": "tiny", "temperature": 1, "max_completion_tokens": 400, "top_k": 5,
    }  # fmt: skip
    plain = OpenAISettings(kind="openai", model="tiny", url=server.url)
    assert plain.sampling != plain.model_copy(update={"extra": extra}).sampling


def test_structured_answers_are_asked_for_by_schema(server: ChatServer) -> None:
    run(engine(server, structured=True), prompts(1))
    form = server.asked[0].body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"]["required"] == ["description"]


def test_images_arrive_whole_and_before_the_question(server: ChatServer) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))
    run(engine(server), [Prompt("what?", lambda: [Image.new("RGB", (30, 20), "red"), noise], 1)])
    (ask,) = server.asked
    assert [part["type"] for part in ask.body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    red, other = (Image.open(io.BytesIO(data)) for data in ask.images)
    assert (red.format, red.size) == ("JPEG", (30, 20)) and other.size == (64, 40)
    assert np.abs(np.asarray(red, int) - (255, 0, 0)).max() < 4
    assert np.abs(np.asarray(other, int) - np.asarray(noise, int)).mean() < 4


def test_answers_find_their_prompts_in_any_order(server: ChatServer) -> None:
    server.script = lambda ask: Reply(echo(ask).body, after_s=0.05 * (3 - int(ask.prompt[1:]) % 4))
    found = list(engine(server).generate(prompts(8)))
    assert dict(found) == good(8) and [place for place, _ in found] != sorted(place for place, _ in found)


def test_never_more_requests_at_a_time_than_allowed(server: ChatServer) -> None:
    server.script = lambda ask: Reply(echo(ask).body, after_s=0.03)
    assert run(engine(server, concurrency=5), prompts(30)) == good(30)
    assert server.most_at_once == 5


@pytest.mark.parametrize("key", [None, "", "\n"])
def test_a_server_without_keys_needs_none(server: ChatServer, key: str | None) -> None:
    assert run(engine(server, key), prompts(1)) == good(1)


def test_a_key_may_end_in_a_line_break_and_holds_nothing_else(server: ChatServer) -> None:
    assert run(engine(server, f"{KEY}\n"), prompts(1)) == good(1)
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    for bad in (f"{KEY} {KEY}", f"{KEY}\u2026", f"{KEY}\r\nX: y"):
        with pytest.raises(ModelError, match=r"variable OPENAI_API_KEY.*cannot be sent") as caught:
            engine(server, bad)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        error(500), error(502), error(503), error(529), error(429, **{"Retry-After": "0"}), error(408), error(409),
        error(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), error(429, **{"Retry-After": "nan"}),
        Reply(breaks=0.0), Reply(answer("half of it " * 50).body, breaks=0.5),
        Reply('{"choices": [{"message": {"content": "cut off by a pro'), Reply(b"\xff\xfe\x00"), Reply(b""),
        Reply(b"not gzip", headers={"Content-Encoding": "gzip"}),
    ],
    ids=lambda reply: f"{reply.status}-{str(reply.body)[:12]}-{reply.breaks}",
)  # fmt: skip
def test_what_passes_by_itself_is_asked_again(server: ChatServer, reply: Reply) -> None:
    server.script = once(reply)
    assert run(engine(server), prompts(3)) == good(3)
    assert len(server.asked) == 6


def test_a_stall_counts_as_a_failure_and_is_asked_again(server: ChatServer) -> None:
    server.script = once(Reply(after_s=30))
    begin = time.monotonic()
    assert run(engine(server, timeout_s=0.3), prompts(3)) == good(3)
    assert time.monotonic() - begin < 5


def test_a_server_that_says_when_is_asked_then(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 30.0)
    server.script = once(error(429, **{"Retry-After": "1"}))
    assert run(engine(server), prompts(1)) == good(1)
    first, second = server.asked
    assert 1.0 <= second.at - first.at < 3


@pytest.mark.parametrize("reply", [error(500), error(429), error(503), Reply(breaks=0.0), Reply(after_s=9)])
def test_patience_ends(server: ChatServer, reply: Reply) -> None:
    server.script = lambda ask: reply
    begin = time.monotonic()
    found, why = stops(engine(server, patience_s=0.5, timeout_s=0.3), prompts(50))
    assert time.monotonic() - begin < 3
    assert found == {} and "127.0.0.1 gave no answer for 0.5 s" in why
    assert len({ask.prompt for ask in server.asked}) <= 5  # with the one that is no prompt of ours


def test_nobody_listens() -> None:
    found, why = stops(engine("http://127.0.0.1:9/v1", patience_s=0.2), prompts(3))
    assert found == {} and "APIConnectionError" in why and "run again when the server is back" in why


def test_an_idle_reader_does_not_use_up_patience(server: ChatServer) -> None:
    texts = engine(server, patience_s=0.4, concurrency=1).generate(prompts(3))
    first = next(texts)
    time.sleep(0.6)  # the store was slow
    server.script = once(error(503))
    assert dict([first, *texts]) == good(3)


def test_each_answer_renews_patience(server: ChatServer) -> None:
    def script(ask: Ask) -> Reply:
        return error(503) if ask.attempt == 0 else Reply(echo(ask).body, after_s=0.1)

    server.script = script
    assert run(engine(server, patience_s=0.5, concurrency=1), prompts(8)) == good(8)


def test_texts_that_are_under_way_are_kept_when_one_stops_the_run(server: ChatServer) -> None:
    def script(ask: Ask) -> Reply:
        return Reply(status=401, after_s=0.3) if ask.prompt == "p0" else Reply(echo(ask).body, after_s=0.6)

    server.script = script
    found, why = stops(engine(server), prompts(100))
    assert sorted(found) == [1, 2, 3]  # those that were sent, and no other was
    assert sorted(server.prompts()) == ["p0", "p1", "p2", "p3"]
    assert "AuthenticationError" in why


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_a_refusal_stops_at_once_and_says_what_to_check(server: ChatServer, status: int) -> None:
    server.script = lambda ask: error(status, "no such thing here")
    found, why = stops(engine(server, key_env="MY_KEY"), prompts(50))
    assert found == {} and len(server.asked) <= 4
    for part in ("127.0.0.1 refuses model 'tiny'", "no such thing here", "`url`, `model` and the key", "MY_KEY"):
        assert part in why


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_no_try_will_help_is_one_row(server: ChatServer, status: int) -> None:
    server.script = lambda ask: error(status, "context of 4096 is too short") if ask.prompt == "p2" else echo(ask)
    found = run(engine(server), prompts(6))
    row = found.pop(2)
    assert row.flags == ("error",) and f"{status} - context of 4096 is too short" in row.detail
    assert found == {n: text for n, text in good(6).items() if n != 2}
    assert server.prompts().count("p2") == 1


@pytest.mark.parametrize("reply", [error(500, "CUDA kernel"), Reply(breaks=0.0), PAGE], ids=["500", "drop", "page"])
def test_a_prompt_that_a_living_server_always_fails_at_is_one_row(server: ChatServer, reply: Reply) -> None:
    server.script = lambda ask: reply if ask.prompt == "p7" else echo(ask)
    found = run(engine(server, concurrency=2), prompts(20))
    row = found.pop(7)
    assert row.finish_reason == "error" and row.detail.startswith("the server answers, and fails at this prompt: ")
    assert server.prompts().count("p7") == TRIES
    assert found == {n: text for n, text in good(20).items() if n != 7}


@pytest.mark.parametrize("reply", [error(500), Reply(breaks=0.0)])
def test_a_run_that_has_only_such_a_prompt_left_ends_with_its_row(server: ChatServer, reply: Reply) -> None:
    server.script = lambda ask: reply if ask.prompt == "p0" else echo(ask)
    assert run(engine(server), prompts(1))[0].flags == ("error",)
    assert server.prompts()[-1] == "Hello." and server.asked[-1].body["max_tokens"] == 1


def test_a_server_that_fails_at_everything_gets_no_rows(server: ChatServer) -> None:
    server.script = lambda ask: echo(ask) if ask.prompt == "p0" else error(500)
    found, why = stops(engine(server, patience_s=0.5), prompts(40))
    assert sorted(found) == [0] and "InternalServerError" in why


def test_a_busy_server_is_never_a_prompts_fault(server: ChatServer) -> None:
    server.script = lambda ask: error(503) if ask.prompt == "p0" and ask.attempt < 3 * TRIES else echo(ask)
    assert run(engine(server), prompts(2)) == good(2)


@pytest.mark.parametrize(
    "reply",
    [PAGE, Reply({"choices": []}), Reply({"choices": None}), Reply({"object": "list"}), Reply([1]), Reply("null"),
     Reply({"choices": [{"message": None}]}), answer(["a", "b"]), Reply({"error": {"message": "no credits"}})],
    ids=lambda reply: str(reply.body)[:30],
)  # fmt: skip
def test_a_server_of_another_kind_is_found_out_at_once(server: ChatServer, reply: Reply) -> None:
    server.script = lambda ask: reply
    found, why = stops(engine(server), prompts(50))
    assert found == {} and len(server.asked) <= 4
    assert "does not speak OpenAI's chat API" in why and "it ends in /v1" in why


def test_a_page_of_a_proxy_in_between_passes(server: ChatServer) -> None:
    server.script = lambda ask: PAGE if ask.prompt != "p0" and ask.attempt == 0 else echo(ask)
    assert run(engine(server, concurrency=1), prompts(3)) == good(3)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (answer(None), Text("", prompt_tokens=11, output_tokens=5)),
        (answer("cut", "length"), Text("cut", finish_reason="length", prompt_tokens=11, output_tokens=5)),
        (answer("", "content_filter"), Text("", ("filtered",), prompt_tokens=11, output_tokens=5)),
        (answer("x", prompt_tokens=None, completion_tokens="7"), Text("x")),
        (answer("x", prompt_tokens=2**40, completion_tokens=-1), Text("x")),
        (Reply({"choices": [{"message": {"content": "x"}}]}), Text("x")),
        (answer("word " * 2000), Text("word " * 2000, prompt_tokens=11, output_tokens=5)),
        (answer("x" * 5_000_000), Text("x" * 5_000_000, prompt_tokens=11, output_tokens=5)),
        (answer("\x00\x1b \ud83d"), Text("\x00\x1b \ud83d", prompt_tokens=11, output_tokens=5)),
    ],
    ids=lambda each: each.text[:9] if isinstance(each, Text) else "",
)
def test_answers_of_all_kinds(server: ChatServer, reply: Reply, text: Text) -> None:
    server.script = lambda ask: reply
    assert run(engine(server), prompts(1)) == {0: text}


@pytest.mark.parametrize("why", [OSError("image file is truncated"), MemoryError(), ValueError("\x00"), KeyError("x")])
def test_an_image_that_cannot_be_decoded_is_one_row_and_not_sent(server: ChatServer, why: Exception) -> None:
    def broken() -> list[Image.Image]:
        raise why

    asked = prompts(5)
    asked[3] = Prompt("p3", broken, 0)
    found = run(engine(server), asked)
    assert found[3].finish_reason == "error" and found[3].detail
    assert sorted(server.prompts()) == ["p0", "p1", "p2", "p4"]


def test_an_image_that_is_no_jpeg_is_one_row(server: ChatServer) -> None:
    found = run(engine(server), [Prompt("a", lambda: [Image.new("RGB", (70_000, 1))], 0), *prompts(1)])
    assert found[0].finish_reason == "error" and found[1] == good(1)[0]


def test_images_that_nobody_can_read_stop_the_run_and_keep_what_came(server: ChatServer) -> None:
    def away() -> list[Image.Image]:
        raise EngineStopped("the store is away")

    found, why = stops(engine(server, concurrency=1), [*prompts(2), Prompt("x", away, 0), *prompts(9)])
    assert found == good(2) and why == "the store is away"


def test_a_reader_that_goes_away_waits_for_nothing_and_nothing_more_is_sent(server: ChatServer) -> None:
    server.script = lambda ask: echo(ask) if ask.prompt == "p0" else Reply(echo(ask).body, after_s=1.0)
    texts = engine(server).generate(prompts(100))
    assert next(texts) == (0, good(1)[0])
    while len(server.asked) < 4:
        time.sleep(0.01)
    begin = time.monotonic()
    texts.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < 0.5
    sent = len(server.asked)
    time.sleep(1.2)  # those under way have ended
    assert len(server.asked) == sent == 4


def test_a_reader_that_goes_away_ends_retries(server: ChatServer) -> None:
    server.script = lambda ask: echo(ask) if ask.prompt == "p0" else error(503)
    texts = engine(server).generate(prompts(9))
    next(texts)
    texts.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    sent = len(server.asked)
    time.sleep(0.3)
    assert len(server.asked) == sent


def test_few_images_are_decoded_at_a_time(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DECODING", threading.BoundedSemaphore(2))
    at_once, most, lock = [0], [0], threading.Lock()

    def decode() -> list[Image.Image]:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return [Image.new("RGB", (8, 8))]

    run(engine(server, concurrency=16), prompts(32, decode))
    assert most[0] == 2


LEAKS = [
    error(400, f"bad prompt of {KEY}"), error(401, f"Incorrect API key provided: {KEY}."), error(500, f"{KEY}"),
    Reply(f"<html>{'x' * 150}{KEY}</html>" , kind="text/html"), Reply({"debug": KEY}),
    *(error(status, "x" * pad + KEY) for status in (400, 401) for pad in range(400, 500, 9)),
]  # fmt: skip


@pytest.mark.parametrize("reply", LEAKS, ids=lambda reply: f"{reply.status}-{len(str(reply.body))}")
def test_a_server_that_repeats_the_key_does_not_make_us_tell_it(
    server: ChatServer, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script, server.version = lambda ask: reply, {"version": f"1.0 {KEY}"}
    made = engine(server, patience_s=0.05)
    told = [made.version]
    try:
        told += [str(text) for text in run(made, prompts(1)).values()]
    except EngineStopped as stop:
        told += traceback.format_exception(stop)
    told += [f"{record.getMessage()} {record.exc_text}" for record in caplog.records if record.name != "asyncio"]
    for start in range(3, len(KEY) - 12):
        assert all(KEY[start : start + 12] not in line for line in told)


def test_a_plain_run_logs_nothing(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(engine(server), prompts(3))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("version", "shown"),
    [({"version": "0.11.2"}, "server of version 0.11.2"), ({"version": "1\n\x1b[2J\ud800" + "x" * 99}, None),
     ("a page", "server of unknown version"), ([], "server of unknown version"), ({}, "server of unknown version")],
)  # fmt: skip
def test_the_version_is_what_the_server_says(server: ChatServer, version: Any, shown: str | None) -> None:
    server.version = version
    found = engine(server).version
    assert found == shown if shown else len(found) <= 60 and found.isprintable()


def test_the_share_of_time_that_images_took(server: ChatServer) -> None:
    def slow() -> list[Image.Image]:
        time.sleep(0.1)
        return []

    asked = engine(server)
    run(asked, prompts(4, slow))
    assert 0.5 < asked.waited <= 1
    run(asked, prompts(4))
    assert 0 <= asked.waited < 0.5


@pytest.mark.parametrize("url", ["http://", "http://a:port/v1", "http://[::1/v1", "ftp://a/v1", "a/v1", "http:///v1"])
def test_an_address_that_is_none_is_said_before_anything_runs(url: str) -> None:
    with pytest.raises(ValidationError, match=r"is no address of a server, such as http://127\.0\.0\.1:8000/v1"):
        OpenAISettings(kind="openai", model="m", url=url)


def test_a_session_of_everything_at_once(server: ChatServer) -> None:
    """Sixty prompts at a server that does any of these at random: each has its text, and none two."""
    dice = np.random.default_rng(5)
    faults = [error(500), error(503), error(429), Reply(breaks=0.0), Reply(answer("x" * 99).body, breaks=0.3), PAGE]
    lock = threading.Lock()

    def script(ask: Ask) -> Reply:
        with lock:
            number = int(dice.integers(0, 14))
        return faults[number] if number < len(faults) and ask.prompt != "p0" and ask.attempt < 3 else echo(ask)

    server.script = script
    made = engine(server, concurrency=8)
    assert run(made, prompts(1)) == good(1)
    assert run(made, prompts(60)) == good(60)


def test_a_server_lists_its_models(server: ChatServer) -> None:
    server.version = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("a/b", "c\x1b[31m")]}
    assert engine(server).models() == ["a/b", "c [31m"]


@pytest.mark.parametrize(
    "reply",
    [
        PAGE, Reply("[]"), Reply("{}"), Reply('{"data": [{}]}'), Reply('{"data": [7]}'), Reply('{"data": [{"id": 7}]}'),
        Reply("{"), error(401, f"Incorrect API key provided: {KEY}."), error(404), error(500),
    ],
)  # fmt: skip
def test_a_server_that_does_not_list_them_is_one_line(server: ChatServer, reply: Reply) -> None:
    server.version = reply
    with pytest.raises(
        ModelError, match=r"the server at 127.0.0.1 does not say which models it has: .*Check `url`"
    ) as told:
        engine(server).models()
    assert KEY not in str(told.value) and "\n" not in str(told.value)


def test_a_server_that_is_away_or_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTING_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match="does not say which models it has: APITimeoutError"):
            engine(url).models()
    with pytest.raises(ModelError, match="does not say which models it has: APIConnectionError"):
        engine(url).models()
