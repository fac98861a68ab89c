"""`doctor`: what is there, what is missing, and what to do; for people and for scripts."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from chatserver import ChatServer
from conftest import call
from latteflow.flows import machine

NAMES = [
    "latteflow", "torch", "open_clip", "vllm", "decoders", "temporary files", "store", "room of the store", "clip",
    "describer", "prefect",
]  # fmt: skip
DOMAIN = """\
name: birds
source: photos
classes: [robin, wren]
clip: {model: embedded}
store: parent/store
"""

Examine = Callable[..., tuple[int, dict[str, dict[str, str]]]]
"""More lines of a domain file -> exit code, and each check by its name."""


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Examine:
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> tuple[int, dict[str, dict[str, str]]]:
        Path("birds.yaml").write_text("\n".join([DOMAIN, *more]))
        capsys.readouterr()
        code = call("doctor", "birds.yaml", "--json")
        told = json.loads(capsys.readouterr().out)
        assert list(told) == ["healthy", "checks"] and told["healthy"] == (code == 0)
        assert [check["name"] for check in told["checks"]] == NAMES
        return code, {check["name"]: check for check in told["checks"]}

    return run


@pytest.fixture
def server() -> Iterator[ChatServer]:
    running = ChatServer()
    running.version = {"object": "list", "data": [{"id": "vlm", "object": "model"}]}
    yield running
    running.close()


def names(said: str) -> list[str]:
    """First column of a table, whose long lines go on below."""
    return [line.partition("  ")[0] for line in said.splitlines() if not line.startswith(" ")]


def test_a_sound_machine_is_one_screen_and_is_left_as_it_was(
    examine: Examine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "room", lambda _: 50 * 10**9)
    code, found = examine()
    assert code == 0 and {check["state"] for check in found.values()} == {"ok"}
    assert "of several writers of one object, one creates it" in found["store"]["found"]
    assert [path.name for path in Path().iterdir()] == ["birds.yaml"], "the store is not made, nothing is left"
    assert call("doctor", "birds.yaml") == 0
    assert names(capsys.readouterr().out) == NAMES
    assert call("doctor") == 0, "without a domain file"
    assert names(capsys.readouterr().out) == [each for each in NAMES if each not in ("clip", "describer")]


def test_a_store_that_cannot_be_written(examine: Examine) -> None:
    Path("parent").write_text("a file")
    code, found = examine()
    assert code == 1 and found["store"]["state"] == "problem"
    assert "a file is where a folder should be: choose another `store`" in found["store"]["found"]
    assert found["describer"]["state"] == "ok", "the others are looked at all the same"


def test_a_store_of_a_single_writer_is_a_warning(examine: Examine) -> None:
    code, found = examine("single_writer: true")
    assert code == 0 and found["store"]["state"] == "warning" and "one process at a time" in found["store"]["advice"]


@pytest.mark.parametrize(("gigabytes", "state"), [(50, "ok"), (5, "warning"), (0.5, "problem")])
def test_room_on_the_disks(examine: Examine, monkeypatch: pytest.MonkeyPatch, gigabytes: float, state: str) -> None:
    monkeypatch.setattr(machine, "room", lambda _: int(gigabytes * 10**9))
    code, found = examine()
    assert code == (state == "problem")
    assert {found[name]["state"] for name in ("temporary files", "room of the store")} == {state}


def test_what_is_broken_or_missing_is_a_line(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise OSError("libcudart.so: cannot open shared object file")

    versions = {"latteflow": "1", "prefect": "3"}
    monkeypatch.setattr(machine, "gpus", broken)
    monkeypatch.setattr(machine, "version", versions.get)
    code, found = examine("describer: {kind: vllm, model: a/vlm}")
    assert code == 1
    assert found["torch"]["state"] == "problem" and "OSError: libcudart.so" in found["torch"]["found"]
    assert found["open_clip"]["state"] == "warning" and "pip install open_clip_torch" in found["open_clip"]["advice"]
    assert found["vllm"]["state"] == "warning" and "Two environments" in found["vllm"]["advice"]


def test_versions_are_found_by_the_name_of_a_module_too() -> None:
    assert machine.version("open_clip") == metadata.version("open_clip_torch")
    assert machine.version("no-such-package") is None


def test_texts_that_are_not_there(examine: Examine) -> None:
    code, found = examine("describer: {kind: sidecar, texts: texts.csv}")
    assert code == 1 and "texts.csv' does not exist" in found["describer"]["found"]


def test_the_server_of_the_describer(examine: Examine, server: ChatServer) -> None:
    describer = "describer: {{kind: openai, model: {}, url: {}}}"
    code, found = examine(describer.format("vlm", server.url))
    assert code == 0 and found["describer"]["state"] == "ok"
    code, found = examine(describer.format("other", server.url))
    assert code == 0 and (found["describer"]["state"], found["describer"]["advice"]) == ("warning", "it has vlm")
    server.close()
    code, found = examine(describer.format("vlm", server.url))
    assert code == 1 and "the server at 127.0.0.1 does not say which models it has" in found["describer"]["found"]


def test_weights_that_are_out_of_reach(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "within_reach", lambda *_: False)
    clip = "clip: {model: ViT-B-32, pretrained: laion2b_s34b_b79k}"
    monkeypatch.setattr(sys.modules[__name__], "DOMAIN", DOMAIN.replace("clip: {model: embedded}", clip))
    code, found = examine()
    assert code == 0 and found["clip"]["state"] == "warning" and "weights are not here" in found["clip"]["found"]


def test_a_domain_file_that_is_wrong_is_told_as_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "birds.yaml").write_text("sorce: photos\n")
    assert call("doctor", tmp_path / "birds.yaml", "--json") == 1
    said = capsys.readouterr()
    assert said.out == "" and "did you mean `source`?" in said.err


class Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/api/health": b"true", "/api/admin/version": b'"3.1.0"'}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_the_server_of_prefect(tmp_path: Path) -> None:
    def asked(url: str) -> dict[str, str]:
        environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "latteflow.flows.cli", "doctor", "--json"],
            env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])}, cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found: dict[str, str] = json.loads(done.stdout)["checks"][-1]
        assert done.returncode == (found["state"] == "problem")
        return found

    api = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{api.server_port}/api"
    found = asked(url)
    assert found["state"] == "warning" and f"the server at {url} has 3.1.0" in found["found"]
    api.shutdown()
    api.server_close()
    found = asked(url)
    assert found["state"] == "problem" and f"the server at {url} does not answer" in found["found"]
