"""docs/first-hour.md as it stands: a machine with nothing but the wheel, a shell, and a person at the keyboard."""

import csv
import fcntl
import html
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sysconfig
import termios
import venv
from pathlib import Path

import httpx
import pytest
from test_wheel import build_wheel

from conftest import draw

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[1] / "docs" / "first-hour.md"
BIRDS = {"robin": "red", "wren": "green", "jay": "blue"}
PATIENCE_S = 900  # other tests have the processors too
NEEDED = ("bash", "curl")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a shell in which the wheel is installed, and libraries, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("machine")
    place = folder / "venv"
    venv.create(place, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # an editable latteflow is not on it
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "OMP_NUM_THREADS", "TMPDIR")}
    # No model hub, on any machine: what `init` proposes is then the same.
    home = {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "TERM": "xterm", "DO_NOT_TRACK": "1"}
    found = {**kept, **home, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    subprocess.run([*pip, "--ignore-installed", str(build_wheel(folder))], env=found, cwd=folder, check=True)
    where = [place / "bin" / "python", "-c", "import latteflow; print(latteflow.__file__)"]
    assert subprocess.check_output(where, env=found, cwd=folder, text=True).startswith(str(packages))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Person:
    """Who reads what a shell prints, and does on a page what it asks for."""

    def __init__(self, colours: dict[str, str]) -> None:
        self.names = {path: next(name for name, each in BIRDS.items() if each == colours[path]) for path in colours}

    def at(self, command: str, url: str) -> None:
        page = httpx.get(url).text
        if command == "review":
            assert "The class list" in page
            return
        (images,) = re.findall(r'data-images="([^"]*)"', page)
        for image in json.loads(html.unescape(images)):
            assert httpx.get(f"{url}/images/{image['key']}").status_code == 200
            answer = {"key": image["key"], "name": self.names[image["path"]]}
            assert httpx.post(f"{url}/labels", json=answer).status_code == 200


def typed(script: str, folder: Path, machine: dict[str, str], person: Person) -> str:
    """What a shell prints that runs a script at a terminal, where a person ends pages by Ctrl-C."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-ec", script], cwd=folder, env=machine, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    said, seen = "", 0
    try:
        while True:
            try:
                said += os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:  # the shell has ended, and all that it began
                break
            for shown in re.finditer(r"^(review|sample) +(http://127\.0\.0\.1:\d+)\r?\n", said[seen:], re.M):
                person.at(shown[1], shown[2])
                os.write(ours, b"\x03")
                seen = len(said)
        assert process.wait(PATIENCE_S) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return said


def test_from_a_folder_of_photos_to_a_served_model(machine: dict[str, str], tmp_path: Path) -> None:
    if missing := [each for each in NEEDED if shutil.which(each) is None]:
        pytest.skip(f"not here: {missing}")
    colours = {}
    for folder, numbers in {"photos": range(45), "new": range(100, 106)}.items():
        (tmp_path / folder).mkdir()
        for place, number in enumerate(numbers):
            colour = list(BIRDS.values())[number % 3]
            draw(number, colour).resize((80, 64)).save(tmp_path / folder / f"{place}.png")
            colours |= {f"{place}.png": colour} if folder == "photos" else {}
    (script,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert script.count("8000") == 3
    said = typed(script.replace("8000", str(free_port())), tmp_path, machine, Person(colours))
    with (tmp_path / "photos.labels.csv").open(newline="") as table:
        labels = {row["path"]: row["class"] for row in csv.DictReader(table)}
    assert len(labels) == 30 and all(BIRDS[name] == colours[path] for path, name in labels.items())
    assert "on 30 images adapted to" in said and "Traceback" not in said and "error" not in said
    with (tmp_path / "new.csv").open(newline="") as table:
        assert {row["class"] for row in csv.DictReader(table)} <= BIRDS.keys()
    (answer,) = re.findall(r"^\{.*\"predictions\".*$", said, re.M)
    assert json.loads(answer)["predictions"][0]["file"] == "1.png" and '"status":"ok"' in said
