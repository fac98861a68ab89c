"""The service as it is run: a process with a port, good and bad clients, and the page in a real browser."""

import contextlib
import io
import json
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from conftest import draw
from latteflow.models.settings import ClipSettings
from latteflow.models.ship.export import export
from latteflow.models.towers import clip

pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
HARM = "<img src=x onerror='window.pwned=1'>"
CLASSES = ["red", HARM, "blue"]
SERVER = """
import sys
from pathlib import Path
from latteflow.flows.serve import Limits, serve
limits = Limits(max_bytes=1 << 20, request_pixels=60_000_000, requests=16, half_sent=64, seconds=5.0)
serve(Path(sys.argv[1]), "127.0.0.1", 0, limits, lambda url: print(url, flush=True), ["photos.example.org"])
"""


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A grey PNG, written by hand: of black rows, which compress a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(width + 1) * (height if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    draw(number, "red").save(out, kind)
    return out.getvalue()


def export_tiny(tiny_clip: Path, folder: Path, unknown_below: float = -1.0) -> None:
    model = clip.read(ClipSettings(model=str(tiny_clip)))
    prototypes = torch.nn.functional.normalize(torch.randn(3, model.dim, generator=torch.Generator().manual_seed(0)))
    export(
        model, folder, classes=CLASSES, prototypes=prototypes, centre=torch.zeros(model.dim), scale=20.0, resize="pad",
        unknown_below=unknown_below,
    )  # fmt: skip


@pytest.fixture(scope="module")
def service(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Its address and process."""
    folder = tmp_path_factory.mktemp("served") / "shapes"
    export_tiny(tiny_clip, folder)
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
        process.terminate()
        assert process.wait(20) in (0, -15)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(service: tuple[str, int]) -> str:
    return service[0]


@pytest.fixture(autouse=True)
def still_up(url: str) -> Iterator[None]:
    """After every test the service answers as before it."""
    yield
    with httpx.Client(timeout=30) as client:
        assert client.get(f"{url}/health").json()["status"] == "ok"
        assert client.post(f"{url}/predict", content=encoded(), headers=PNG).status_code == 200


PNG = {"Content-Type": "image/png"}


def refused(answer: httpx.Response, status: int, error: str) -> None:
    said = answer.json()
    assert answer.status_code == status and re.search(error, said["error"]), said
    assert said["what_to_do"]


def test_one_image_as_the_body_or_in_a_form(url: str) -> None:
    body = httpx.post(f"{url}/predict", content=encoded(), headers=PNG).json()
    assert body["model"] == "shapes" and len(body["predictions"]) == 1
    found = body["predictions"][0]
    assert {each["class"] for each in found["classes"]} == set(CLASSES) and not found["unknown"]
    assert sum(each["probability"] for each in found["classes"]) == pytest.approx(1)
    form = httpx.post(f"{url}/predict", files={"photo": ("a.png", encoded())}).json()
    assert form["predictions"] == [{**found, "file": "a.png"}]


def test_several_images_good_and_bad(url: str) -> None:
    name = f"{HARM}\u202e.jpg"
    files = [("file", (name, encoded(3))), ("file", ("b.jpg", b"no picture")), ("file", ("c.jpg", encoded(4, "JPEG")))]
    said = httpx.post(f"{url}/predict", files=files).json()["predictions"]
    assert [each["file"] for each in said] == [name, "b.jpg", "c.jpg"]
    assert ["error" in each for each in said] == [False, True, False]
    assert said[1]["reason"] == "not_an_image" and said[1]["what_to_do"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just text, whatever its name", "not_an_image"),
        (png(30_000, 30_000, rows=1), "too_large"),
        (png(6_000, 5, rows=5), "too_narrow"),
        (encoded()[:-30], "corrupt"),
        (encoded(1, "JPEG")[:300], "corrupt"),
    ],
)
def test_what_is_no_sound_image(url: str, data: bytes, reason: str) -> None:
    answer = httpx.post(f"{url}/predict", files={"file": ("photo.jpg", data)})
    refused(answer, 422, f"cannot be used: {reason}")
    assert answer.json()["predictions"][0]["reason"] == reason


def test_a_decompression_bomb_is_not_decoded(url: str) -> None:
    bomb = png(20_000, 20_000)  # whole: 400 MB of pixels in 400 kB
    assert len(bomb) < 1 << 20
    refused(httpx.post(f"{url}/predict", content=bomb, headers=PNG), 422, "too_large: 20000 x 20000 pixels")


def test_a_hundred_megabytes(url: str) -> None:
    refused(httpx.post(f"{url}/predict", content=bytes(100 << 20), headers=PNG, timeout=60), 413, "larger than")

    def endless() -> Iterator[bytes]:  # of no declared length
        yield from (bytes(1 << 16) for _ in range(1600))

    refused(
        httpx.post(f"{url}/predict", content=endless(), headers=PNG, timeout=60), 413, "larger than 1,048,576 bytes"
    )


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is told by /proc")
def test_the_pixels_of_a_request_are_bounded_and_their_memory_returned(service: tuple[str, int]) -> None:
    url, pid = service
    httpx.post(f"{url}/predict", content=encoded(), headers=PNG)
    before = resident_mb(pid)
    pictures = [png(7000, 7000), png(5000, 4000), encoded()]
    files = [("file", ("a.png", each)) for each in pictures]
    said = httpx.post(f"{url}/predict", files=files, timeout=120).json()["predictions"]
    assert ["error" in each for each in said] == [False, True, False]
    assert said[1]["reason"] == "too_large" and "fewer" in said[1]["what_to_do"]
    assert "the limit is 11,000,000, what those before it left of 60,000,000" in said[1]["error"]
    assert resident_mb(pid) < before + 100  # it took a quarter of a gigabyte


@pytest.mark.parametrize(
    ("path", "kind", "length", "status"),
    [
        ("/predict", "image/png", "Content-Length: 34603008", 413),
        ("/predict", "image/png", "Transfer-Encoding: chunked", 413),
        ("/predict", "text/html", "Content-Length: 34603008", 415),
        ("/nowhere", "image/png", "Content-Length: 34603008", 404),
    ],
)
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_who_sends_all_before_reading_hears_why(
    url: str, path: str, kind: str, length: str, status: int, connection: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: {connection}\r\n{length}"
    with socket.create_connection(address(url), timeout=30) as client:
        client.sendall(f"{head}\r\n\r\n".encode())
        for _ in range(33):
            client.sendall(b"100000\r\n" * ("chunked" in length) + bytes(1 << 20) + b"\r\n" * ("chunked" in length))
        client.sendall(b"0\r\n\r\n" * ("chunked" in length))
        answer = b"".join(iter(lambda: client.recv(4096), b""))  # to the end: it is closed in order
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("[::1]:8000", True),
        ("photos.example.org", True),
        ("photos.example.org.evil.example", False),
        ("evil.example:8000", False),
        ("10.0.0.1", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_who_asks_by_its_name_is_answered(url: str, host: str, known: bool) -> None:
    for path in ("/", "/health", "/openapi.json", "/nowhere"):
        answer = httpx.get(url + path, headers={"Host": host})
        if known:
            assert answer.status_code == (404 if path == "/nowhere" else 200)
        else:
            refused(answer, 421, re.escape(f"does not go by the name {host!r}"))
    if not known:
        answer = httpx.post(f"{url}/predict", content=encoded(), headers={**PNG, "Host": host})
        refused(answer, 421, "does not go by the name")


@pytest.mark.parametrize(
    ("headers", "content", "status", "error"),
    [
        ({"Content-Type": "application/json"}, b"{}", 415, "'application/json' is not understood"),
        ({"Content-Type": "text/html; charset=utf-8"}, b"<p>", 415, "'text/html'"),
        ({}, b"abc", 415, "content type ''"),
        ({"Content-Type": "multipart/form-data"}, b"abc", 400, "the form cannot be read"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x--\r\n", 400, "holds no file"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"garbage", 400, "form"),
    ],
)
def test_what_is_no_request_for_us(url: str, headers: dict[str, str], content: bytes, status: int, error: str) -> None:
    refused(httpx.post(f"{url}/predict", content=content, headers=headers), status, error)


def test_too_many_files_and_other_places(url: str) -> None:
    files = [("file", (f"{i}.png", b"x")) for i in range(100)]
    refused(httpx.post(f"{url}/predict", files=files), 400, "Too many files")
    refused(httpx.get(f"{url}/nowhere"), 404, "404")
    refused(httpx.get(f"{url}/predict"), 405, "405")


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def test_clients_that_never_finish_are_let_go(url: str) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
    silent = [socket.create_connection(address(url)) for _ in range(50)]
    slow = [socket.create_connection(address(url)) for _ in range(4)]
    for each in silent[:25]:
        each.sendall(b"GET / HT")
    for each in slow:
        each.sendall(head)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.2):
            for each in slow:
                try:
                    each.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    assert httpx.get(f"{url}/health").status_code == 200  # others are answered meanwhile
    assert httpx.post(f"{url}/predict", content=encoded(), headers=PNG).status_code == 200
    for each in slow:
        each.settimeout(60)
        assert each.recv(4096).startswith(b"HTTP/1.1 408 ")
    for each in silent:
        each.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert each.recv(4096) == b""
    stop.set()
    thread.join()
    for each in [*silent, *slow]:
        each.close()


HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


def half_sent(url: str, count: int, peer: str = "127.0.0.1") -> list[socket.socket]:
    """Clients that send the head of a request and half of an image, and then nothing."""
    found = []
    for number in range(count):
        found.append(socket.create_connection(address(url), timeout=30, source_address=(peer, 0)))
        found[-1].sendall(HEAD % 1000 + bytes(500))
        if number % 20 == 19:  # so that the heads are read: a burst of connections alone is too many as well
            assert httpx.get(f"{url}/health").status_code == 200
    return found


def test_good_requests_beside_half_sent_ones(url: str) -> None:
    """40 clients that never finish: of 200 others none is refused, and none waits."""
    slow = half_sent(url, 40)
    own = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=30, limits=own) as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> tuple[int, float]:
            begin = time.monotonic()
            answer = client.post(f"{url}/predict", content=encoded(number % 9), headers=PNG)
            return answer.status_code, time.monotonic() - begin

        found = list(pool.map(ask, range(200)))
    assert {status for status, _ in found} == {200}
    assert max(seconds for _, seconds in found) < 2
    assert select.select(slow, [], [], 0)[0] == []  # all the while
    for each in slow:
        each.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a second address of this machine")
@pytest.mark.parametrize("begun", [True, False], ids=["half of a body", "half of a head"])
def test_of_too_many_halves_the_peer_that_has_most_loses_its_oldest(url: str, begun: bool) -> None:
    good = half_sent(url, 1)[0]
    many = half_sent(url, 100 if begun else 0, "127.0.0.2")
    while len(many) < 100:
        many.append(socket.create_connection(address(url), timeout=30, source_address=("127.0.0.2", 0)))
        many[-1].sendall(b"GET / HT")
    good.sendall(bytes(500))
    assert good.recv(15).startswith(b"HTTP/1.1 422 ")  # those 1,000 bytes are no image
    end, lost = time.monotonic() + 3, many[:0]
    while len(lost) < 36 and time.monotonic() < end:
        lost = select.select(many, [], [], 0.1)[0]
    assert 36 <= len(lost) <= 40 and not set(lost) & set(many[50:])
    for each in lost:
        each.settimeout(3)
        with contextlib.suppress(ConnectionResetError):
            said = b"".join(iter(lambda each=each: each.recv(4096), b""))
            assert said.startswith(b"HTTP/1.1 503 ") if begun else not said
    for each in [good, *many]:
        each.close()


def test_clients_that_hang_up(url: str) -> None:
    for sent in (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nabc",
        b"\0" * 9,
    ):
        with socket.create_connection(address(url)) as connection:
            connection.sendall(sent)


def test_many_at_once_are_answered_or_asked_to_come_back(url: str) -> None:
    # A connection each: one that is kept may be closed for its idleness just when it is used again.
    own = httpx.Limits(max_connections=100, max_keepalive_connections=0)
    with httpx.Client(timeout=60, limits=own) as client, ThreadPoolExecutor(40) as pool:
        answers = list(
            pool.map(lambda i: client.post(f"{url}/predict", content=encoded(i % 9), headers=PNG), range(200))
        )
    assert {answer.status_code for answer in answers} <= {200, 503}
    good = [answer for answer in answers if answer.status_code == 200]
    assert len(good) >= 8
    for answer in answers:
        if answer.status_code == 503:
            refused(answer, 503, "requests are being answered")
            assert answer.headers["Retry-After"] == "1"
    # In whatever company an image went through the model, the answer is its own.
    alone = [httpx.post(f"{url}/predict", content=encoded(i), headers=PNG).json() for i in range(9)]
    for number, answer in enumerate(answers):
        if answer.status_code == 200:
            mine, theirs = (said["predictions"][0]["classes"] for said in (alone[number % 9], answer.json()))
            assert [c["class"] for c in mine] == [c["class"] for c in theirs]
            assert [c["probability"] for c in mine] == pytest.approx([c["probability"] for c in theirs], abs=1e-4)


def test_an_address_that_is_taken(url: str, tiny_clip: Path, tmp_path: Path) -> None:
    export_tiny(tiny_clip, tmp_path / "model")
    command = ["-c", "from latteflow.flows.cli import entry; entry()", "serve", str(tmp_path / "model"), "--port"]
    done = subprocess.run([sys.executable, *command, str(address(url)[1])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "choose another --port" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page(url: str, tmp_path: Path, scheme: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    hostile = tmp_path / "<img src=x onerror=alert(1)>.png"
    hostile.write_bytes(encoded())
    (tmp_path / "text.jpg").write_text("no picture")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(color_scheme=scheme, viewport={"width": 360, "height": 800})
        complaints: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.get_by_label("Images").set_input_files([hostile, tmp_path / "text.jpg"])
        page.get_by_role("button", name="Classify").click()
        page.get_by_text("2 images classified.").wait_for()
        items = page.locator("#results > li")
        assert items.nth(0).locator("h2").inner_text() == hostile.name
        assert sorted(items.nth(0).locator("th").all_inner_texts()) == sorted(CLASSES)
        assert items.nth(0).locator("td").nth(1).inner_text().endswith("%")
        assert "not_an_image" in items.nth(1).inner_text() and "What to do" in items.nth(1).inner_text()
        assert page.evaluate("window.pwned") is None and page.locator("#results [onerror]").count() == 0
        assert "knows 3 classes" in page.locator("#about").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(250, 248, 244)", "dark": "rgb(23, 20, 18)"}[scheme]
        page.get_by_label("Images").set_input_files(hostile)
        page.keyboard.press("Enter")  # the button has kept the focus
        page.get_by_text("1 image classified.").wait_for()
        assert items.count() == 1
        browser.close()
    assert all(each.startswith((url, "blob:", "data:")) for each in requests)
    assert complaints == []


def test_the_page_holds_no_address_and_no_style_that_its_policy_forbids(url: str) -> None:
    answer = httpx.get(url)
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "http" not in answer.text.replace("http-equiv", "") and " style=" not in answer.text
    assert json.loads(httpx.get(f"{url}/healthz").text)["classes"] == 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_another_model_takes_over_and_no_request_is_lost(tiny_clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    export_tiny(tiny_clip, folder)
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    said: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                answer = client.post(f"{url}/predict", content=encoded(), headers=PNG)
                said.append((answer.status_code, answer.json().get("fingerprint", "")))

    def until(wanted: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not wanted():
            assert time.monotonic() < end
            time.sleep(0.05)

    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            until(lambda: len(said) > 5)
            first = said[0][1]
            (folder / "latteflow.json").write_text("{")  # no model: the one before stays
            process.send_signal(signal.SIGHUP)
            until(lambda: 'latteflow_reloads_total{result="refused"} 1.0' in httpx.get(f"{url}/metrics").text)
            shutil.rmtree(folder)
            export_tiny(tiny_clip, folder, unknown_below=-0.5)
            process.send_signal(signal.SIGHUP)
            until(lambda: httpx.get(f"{url}/health").json()["fingerprint"] != first)
            count = len(said)
            until(lambda: len(said) > count + 5)
            stop.set()
            for each in asking:
                each.result()
        assert {status for status, _ in said} == {200}
        assert said[0][1] == first and said[-1][1] not in ("", first)
        figures = httpx.get(f"{url}/metrics").text
        assert f'latteflow_requests_total{{status="200"}} {len(said)}.0' in figures
        assert f'latteflow_model{{fingerprint="{said[-1][1]}",model="shapes"}} 1.0' in figures and first not in figures
        process.terminate()
        assert process.wait(20) in (0, -15)
    finally:
        stop.set()
        process.kill()
        process.wait()


def test_what_it_counts(url: str) -> None:
    def count(name: str) -> float:
        (line,) = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[-1])

    names = [
        'latteflow_images_total{result="refused"}',
        'latteflow_requests_total{status="422"}',
        "latteflow_batch_images_count",
    ]
    httpx.post(f"{url}/predict", content=b"no image", headers=PNG)
    httpx.post(f"{url}/predict", content=encoded(), headers=PNG)
    before = [count(name) for name in names]
    assert httpx.post(f"{url}/predict", content=b"no image", headers=PNG).status_code == 422
    assert [count(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 0]
    assert httpx.post(f"{url}/predict", content=encoded(), headers=PNG).status_code == 200
    assert [count(name) - old for name, old in zip(names, before, strict=True)] == [1, 1, 1]
