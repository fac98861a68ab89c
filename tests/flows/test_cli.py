"""The program as people use it: commands, options, exit codes, and what a mistake prints."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import polars as pl
import pytest

from conftest import call, draw, draw_folder
from latteflow.flows import documents
from latteflow.flows.pipeline import STAGES, as_they_are
from latteflow.storage.artifacts import ArtifactRef
from latteflow.storage.captions import CaptionStore
from latteflow.storage.errors import StorageError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.sources import Entry, Source
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.describe.texts import Question, Texts
from latteflow.tasks.ship.nights import Night, remember
from latteflow.tasks.ship.promote import Champion

HOSTILE = "[red]x[/red]\x1b[31m\u202e\n.png"
LABELS = [
    "shard train", "shard test", "embed train", "embed test", "describe", "group", "screen", "tune", "select",
    "evaluate", "report",
]  # fmt: skip

Latteflow = Callable[..., tuple[int, str, str]]
"""Arguments -> exit code, standard output, standard error."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """The folder of a domain that was run once."""
    folder = tmp_path_factory.mktemp("made")
    train, test = draw_folder(folder / "train", 24), draw_folder(folder / "test", 12, first=100)
    hostile = folder / "train" / HOSTILE
    hostile.parent.mkdir()
    draw(300, "red").save(hostile)
    (folder / "train" / "bad[b]\x1b.png").write_text("no picture")
    (folder / "labels.csv").write_text("path,class\n" + "".join(f"test/{path},{name}\n" for path, name in test.items()))
    texts = "".join(f"train/{path},a [bold]{name}[/bold] \x1b[1mshape {path[:3]}\n" for path, name in train.items())
    (folder / "texts.csv").write_text("path,text\n" + texts)
    (folder / "domain.yaml").write_text(
        f"""\
name: shapes
source: train
classes: [red, green, blue]
templates: ["a {{}} shape."]
evaluation: {{source: test, labels: labels.csv}}
clip: {{model: {tiny_clip}, resize: pad, centre: false}}
describer: {{kind: sidecar, texts: texts.csv}}
method: [latteclip]
latteclip: {{epochs: 2, batch_size: 8}}
seeds: [0, 1]
shard: {{images: 10}}
store: store
output: runs
"""
    )
    assert call("run", folder / "domain.yaml") == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to work on, and the working folder."""
    copy = tmp_path / "domain"
    shutil.copytree(made, copy)
    monkeypatch.chdir(copy)
    yield copy


@pytest.fixture
def latteflow(folder: Path, capsys: pytest.CaptureFixture[str]) -> Latteflow:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(*arguments)
        said = capsys.readouterr()
        for stream in said:
            assert "\x1b" not in stream and "\u202e" not in stream
        return code, said.out, said.err

    return run


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "domain.yaml").read_text()
    assert old in text
    (folder / "domain.yaml").write_text(text.replace(old, new))


def states(said: str) -> dict[str, str]:
    """Label of a stage -> cached, done or will run, as the tables of `run` and `plan` say."""
    found = re.findall(rf"^({'|'.join(LABELS)}) +(cached|done|will run)", said, re.MULTILINE)
    return dict(found)


def tree(folder: Path) -> set[str]:
    """Every object of the store but those that nobody trusts."""
    paths = {str(path.relative_to(folder)) for path in (folder / "store").rglob("*") if path.is_file()}
    return {path for path in paths if "stat-" not in path}


def test_a_second_run_is_cached_and_says_the_same(latteflow: Latteflow) -> None:
    code, said, _ = latteflow("run", "domain.yaml")
    assert code == 0
    assert states(said) == dict.fromkeys(LABELS, "cached")
    assert "on 12 test images" in said and "runs/shapes/report.html" in said


@pytest.mark.parametrize(
    ("arguments", "said", "without"),
    [
        (["--help"], "Usage", "numpy polars pyarrow fsspec PIL pydantic torch"),
        (["plan", "bad.yaml"], "did you mean `source`?", "numpy polars pyarrow fsspec PIL torch"),
        (["init", "train", "--classes", "a"], "1 given, at least 2", "numpy polars pyarrow fsspec PIL torch"),
        (["predict", "model", "nowhere"], "'nowhere' does not exist", "pyarrow torch"),
        (["rank", "domain.yaml", "larger", "--out", "nowhere/a.html"], "there is no folder 'nowhere'", "numpy torch"),
        (["compare", "a", "b", "--out", "nowhere/a.html"], "there is no folder 'nowhere'", "numpy torch"),
        (["predict", "nowhere", "train"], "model nowhere: there is no such folder", "pyarrow torch"),
    ],
)
def test_help_and_mistakes_wait_for_no_library(folder: Path, arguments: list[str], said: str, without: str) -> None:
    (folder / "bad.yaml").write_text("sorce: train\n")
    (folder / "model").mkdir()
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); "
    code += "from latteflow.flows.cli import entry; entry()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert said in done.stdout + done.stderr
    assert not set(without.split()) & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_cached_command_loads_neither_torch_nor_prefect(folder: Path, command: str) -> None:
    code = "import sys; from latteflow.flows.cli import app; app(standalone_mode=False); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "domain.yaml"], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = done.stdout.splitlines()[-1]
    assert "'latteflow.flows.cli'" in loaded
    for heavy in ("torch", "prefect", "open_clip", "transformers", "altair"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("command", [["run"], ["plan"], ["show"], ["gc"], ["run", "--only", "embed"]])
def test_a_store_of_a_newer_version_is_one_line_that_names_it(
    latteflow: Latteflow, folder: Path, command: list[str]
) -> None:
    """And nothing is made beside what the newer version made."""
    paths = list((folder / "store/shapes/shard").glob("*/manifest.json"))
    for path in paths:
        record = json.loads(path.read_text())
        del record["sha256"]
        record["format"] = 2
        path.write_bytes(canonical_json({**record, "sha256": sha256(canonical_json(record))}))
    before = tree(folder)
    code, _, said = latteflow(command[0], "domain.yaml", *command[1:])
    assert code == 1 and "has format 2 of a newer latteflow, this one reads 1: upgrade to read it" in said
    assert "Traceback" not in said and tree(folder) == before


def test_plan_says_what_a_run_then_does(latteflow: Latteflow, folder: Path) -> None:
    draw(500, "red").save(folder / "train" / "new.png")
    (folder / "train" / "003.png").unlink()
    before = tree(folder)
    code, said, _ = latteflow("plan", "domain.yaml")
    assert code == 0 and tree(folder) == before
    planned = states(said)
    assert planned == {label: "cached" if label in ("shard test", "embed test") else "will run" for label in LABELS}
    assert "images: 1 new, 1 removed" in said
    assert "train images: 1 new, 24 kept, 1 removed" in said
    assert re.search(r"^describe +will run +1 text +\d+\.\d s +input changes: shard train, embed train", said, re.M)
    assert re.search(r"^group +will run +up to 8 texts", said, re.M)
    assert "texts to write: up to 9, tokens: none" in said and "time: about" in said
    _, did, _ = latteflow("run", "domain.yaml")
    assert {label for label, state in states(did).items() if state == "done"} == {
        label for label, state in planned.items() if state == "will run"
    }
    assert states(latteflow("plan", "domain.yaml")[1]) == dict.fromkeys(LABELS, "cached")


def test_plan_looks_at_each_source_once(latteflow: Latteflow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(500, "red").save(folder / "train" / "new.png")
    looks, plain = [], Source.files

    def files(self: Source) -> Iterator[Entry]:
        looks.append(self.urls)
        return plain(self)

    monkeypatch.setattr(Source, "files", files)
    assert "train images: 1 new, 25 kept, 0 removed" in latteflow("plan", "domain.yaml")[1]
    assert len(looks) == 2 and looks[0] != looks[1]


def test_plan_of_a_domain_that_was_never_run(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "store: store", "store: elsewhere")
    code, said, _ = latteflow("plan", "domain.yaml")
    assert code == 0 and states(said) == dict.fromkeys(LABELS, "will run")
    assert said.count("not made yet") == len(LABELS)
    assert "time: unknown" in said
    assert {path.name for path in (folder / "elsewhere" / "shapes").iterdir()} == {"shard"}  # the stat cache


@pytest.mark.parametrize(
    ("old", "new", "running", "why"),
    [
        ("epochs: 2", "epochs: 3", {"tune", "select", "evaluate", "report"}, "latteclip.epochs: 2 -> 3"),
        ("seeds: [0, 1]", "seeds: [0, 1, 7]", {"tune", "select", "evaluate", "report"}, "seeds: added 7"),
        ("method: [latteclip]", "method: [latteclip, flyp]", {"tune", "select", "evaluate", "report"},
         'method: added "flyp"'),
        ("seeds: [0, 1]", "screen: {floor: 2}\nseeds: [0, 1]", {*LABELS[6:]}, "screen.floor: 3 -> 2"),
        ("labels.csv", "other.csv", {"evaluate", "report"}, "labels: "),
        ("texts.csv", "other.csv", {*LABELS[4:]}, "describer.revision: "),
        ("a {} shape", "a {} thing", {*LABELS} - {"shard train", "shard test"}, 'prompts: added 3 of 3: ["a red'),
    ],
)  # fmt: skip
def test_plan_says_why(latteflow: Latteflow, folder: Path, old: str, new: str, running: set[str], why: str) -> None:
    (folder / "other.csv").write_text((folder / old).read_text() + "x.png,red\n" if old.endswith("csv") else "")
    edit(folder, old, new)
    _, said, _ = latteflow("plan", "domain.yaml")
    assert {label for label, state in states(said).items() if state == "will run"} == running
    assert why in said


def test_plan_counts_models_and_texts_that_are_missing(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "seeds: [0, 1]", "seeds: [0, 1, 7]")
    assert re.search(r"^tune +will run +1 model ", latteflow("plan", "domain.yaml")[1], re.M)
    (folder / "texts.csv").write_text((folder / "texts.csv").read_text().replace("shape 003", "form 003"))
    assert re.search(r"^describe +will run +25 texts", latteflow("plan", "domain.yaml")[1], re.M)


def test_only_runs_one_stage_and_what_it_needs_must_be_there(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "epochs: 2", "epochs: 3")
    draw(500, "red").save(folder / "train" / "new.png")
    code, said, _ = latteflow("run", "domain.yaml", "--only", "tune")
    assert code == 0
    assert {label for label, state in states(said).items() if state == "done"} == {"tune"}
    assert "25 images" in said and "evaluate" not in said and "report" not in said
    code, _, error = latteflow("run", "domain.yaml", "--only", "report")
    assert code == 1
    assert '--only: select would have to run first (tune: "tune ' in error and "run without --only" in error


def test_from_starts_in_the_middle_with_the_images_of_the_last_run(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "epochs: 2", "epochs: 3")
    shutil.rmtree(folder / "train")
    code, said, _ = latteflow("run", "domain.yaml", "--from", "tune")
    assert code == 0
    assert {label for label, state in states(said).items() if state == "done"} == {
        "tune",
        "select",
        "evaluate",
        "report",
    }
    assert json.loads((folder / "runs/shapes/metrics.json").read_text())["n_test"] == 12
    edit(folder, "a {} shape", "a {} thing")
    code, _, error = latteflow("run", "domain.yaml", "--from", "tune")
    assert code == 1 and "--from: embed train would have to run first (prompts: added" in error


def test_refresh_makes_a_stage_anew(latteflow: Latteflow, folder: Path) -> None:
    captions = CaptionStore(open_store(Domain.load("domain.yaml")).objects)
    before = {who: captions.scan(who).collect() for who in captions.describers()}
    code, said, _ = latteflow("run", "domain.yaml", "--refresh", "describe", "--refresh", "tune")
    assert code == 0
    # The same bytes came out, so that nothing after them had to run.
    assert {label for label, state in states(said).items() if state == "done"} == {"describe", "tune"}
    assert all(captions.scan(who).collect().equals(texts) for who, texts in before.items())
    assert sum(len(list(path.iterdir())) for path in (folder / "store" / "captions").iterdir()) > len(before)
    assert states(latteflow("run", "domain.yaml")[1]) == dict.fromkeys(LABELS, "cached")


def test_a_refresh_that_dies_loses_nothing(latteflow: Latteflow, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = tree(folder), Texts.write

    def die(self: Texts, parts: Mapping[str, Sequence[Question]]) -> Iterator[object]:
        yield next(write(self, parts))
        raise StorageError("the model server is gone")

    monkeypatch.setattr(Texts, "write", die)
    code, _, error = latteflow("run", "domain.yaml", "--refresh", "describe")
    assert code == 1 and error.strip() == "error: the model server is gone"
    assert before < tree(folder)
    assert states(latteflow("run", "domain.yaml")[1]) == dict.fromkeys(LABELS, "cached")


@pytest.mark.parametrize("option", ["--from", "--only", "--refresh"])
def test_a_mistyped_stage_is_told_what_was_meant(latteflow: Latteflow, option: str) -> None:
    code, _, error = latteflow("run", "domain.yaml", option, "descibe")
    assert code == 2 and error.strip() == "error: there is no stage 'descibe'; did you mean describe?"
    code, _, error = latteflow("run", "domain.yaml", option, "\x1b[31m")
    assert code == 2 and f"stages are {', '.join(STAGES)}" in error


def test_options_that_exclude_each_other(latteflow: Latteflow) -> None:
    code, _, error = latteflow("run", "domain.yaml", "--from", "tune", "--only", "tune")
    assert code == 2 and "exclude each other" in error


@pytest.mark.parametrize("command", ["run", "plan", "show", "explain", "replay", "verify", "gc"])
def test_a_missing_domain_file_is_one_message(latteflow: Latteflow, command: str) -> None:
    code, _, error = latteflow(command, "domian.yaml", *(["tune"] if command == "explain" else []))
    assert code == 1
    assert error.startswith("error: domain file domian.yaml cannot be read") and "did you mean domain.yaml?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "command",
    [
        "",
        "init",
        "schema",
        "doctor",
        "run",
        "plan",
        "preview",
        "show",
        "explain",
        "replay",
        "verify",
        "gc",
        "export",
        "predict",
        "serve",
        "captions",
        "compare",
    ],
)
def test_help_is_there(latteflow: Latteflow, command: str) -> None:
    code, said, _ = latteflow(*filter(None, [command]), "--help")
    assert code == 0 and "Usage" in said


def test_the_version_is_told(latteflow: Latteflow) -> None:
    assert latteflow("--version") == (0, f"latteflow {metadata.version('latteflow')}\n", "")


def test_the_shell_completes_commands_and_options(latteflow: Latteflow, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(*words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_LATTEFLOW_COMPLETE", "complete_bash")
        return latteflow()[1].split()

    assert completed("latteflow", "p") == ["plan", "preview", "predict", "promote"]
    assert completed("latteflow", "plan", "--j") == ["--json"]
    monkeypatch.setenv("_LATTEFLOW_COMPLETE", "source_bash")
    code, script, _ = latteflow()
    assert code == 0 and "complete -o default -F _latteflow_completion latteflow" in script


@pytest.mark.parametrize(
    "wrong",
    [[], ["rnu"], ["run"], ["run", "domain.yaml", "--onyl", "tune"], ["predict", "model", "train", "--top", "0"]],
)
def test_a_command_line_that_is_wrong_ends_with_2(latteflow: Latteflow, wrong: list[str]) -> None:
    assert latteflow(*wrong)[0] == 2


def test_a_domain_without_a_champion_says_so(latteflow: Latteflow) -> None:
    code, said, error = latteflow("champion", "domain.yaml")
    assert (code, error) == (0, "") and said.startswith("domain 'shapes' has no champion yet; `latteflow promote`")
    for needs_one in (["rollback", "domain.yaml"], ["export", "domain.yaml", "model", "--champion"]):
        assert latteflow(*needs_one)[0] == 1


def test_what_is_cached_is_no_news_before_another_answer(latteflow: Latteflow) -> None:
    code, said, beside = latteflow("rank", "domain.yaml", "red", "--top", 2)
    assert (code, beside) == (0, "") and said.startswith("place ")
    code, said, beside = latteflow("export", "domain.yaml", "model")
    assert code == 0 and "cached" not in beside and said.startswith("kept ")


@pytest.mark.parametrize("command", [["rank", "domain.yaml", "red"], ["export", "domain.yaml", "model"]])
def test_a_model_that_is_not_there_is_told_before_anything_runs(
    latteflow: Latteflow, folder: Path, command: list[str]
) -> None:
    edit(folder, "store: store", "store: elsewhere")
    for option, told in (
        (["--method", "clamp"], "no model by 'clamp'; `method` is latteclip, and zero_shot is the model as it came"),
        (["--seed", "7"], "no model with seed 7; `seeds` are 0, 1"),
    ):
        assert latteflow(*command, *option) == (1, "", f"error: there is {told}\n")
    assert not (folder / "elsewhere").exists()


def test_a_zero_that_matters_stays_in_the_table(latteflow: Latteflow) -> None:
    _, said, _ = latteflow("run", "domain.yaml")
    assert re.search(r"^select .* 0 accepted, 2 models", said, re.M)
    assert "0 duplicates" not in said and "0 removed" not in said


def test_preview_writes_a_page(latteflow: Latteflow, folder: Path) -> None:
    code, said, _ = latteflow("preview", "domain.yaml", "--images", "3")
    assert code == 0 and said.splitlines()[-1].endswith("runs/shapes/preview.html")
    assert (folder / "runs/shapes/preview.html").read_text().count('class="shown"') == 3


def test_an_exported_model_predicts_without_the_domain(latteflow: Latteflow, folder: Path) -> None:
    code, said, _ = latteflow("export", "domain.yaml", "model", "--method", "zero_shot")
    assert code == 0 and (folder / "model" / "README.md").is_file()
    shutil.rmtree(folder / "store")
    code, said, beside = latteflow("predict", "model", "train", "--out", "p[b].csv")
    assert not beside.startswith("\n")
    assert code == 0 and re.match("images +25, the model cannot say which", said)
    assert "quarantined  1: " in said and said.endswith("predictions  p[b].csv\n")
    code, _, error = latteflow("predict", "model\x1b[31m", "train")
    assert code == 1 and r"model model\x1b[31m: there is no such folder" in error
    code, _, error = latteflow("predict", "model", "texts.csv")
    assert code == 1 and "holds no image" in error
    code, _, error = latteflow("serve", "train")
    assert code == 1 and "it has no latteflow.json; `latteflow export` writes it" in error


def test_show_lists_artifacts_and_which_are_current(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "epochs: 2", "epochs: 3")
    latteflow("run", "domain.yaml", "--from", "tune")
    code, said, _ = latteflow("show", "domain.yaml")
    assert code == 0
    assert len(re.findall(r"^tune +[0-9a-f]{12}", said, re.M)) == 2
    assert len(re.findall(r"^tune +[0-9a-f]{12} +current", said, re.M)) == 1
    assert len(re.findall(r"current", said)) == len(LABELS)


def test_show_follows_an_image(latteflow: Latteflow, folder: Path) -> None:
    code, by_path, _ = latteflow("show", "domain.yaml", "test/100.png")
    assert code == 0
    assert re.search(r"^shard +shard-0000\d of test, 40 x 32, \d+ B \(shard test [0-9a-f]{12}\)", by_path, re.M)
    assert re.search(r"^pseudo-label +\w+ 0\.\d\d, \w+ 0\.\d\d, \w+ 0\.\d\d \(embed test [0-9a-f]{12}\)", by_path, re.M)
    assert re.search(r"^prediction +\w+ 0\.\d\d by latteclip \(evaluate [0-9a-f]{12}\)", by_path, re.M)
    assert re.search(r"^label +green", by_path, re.M)
    key = re.search(r"^key +([0-9a-f]{20})", by_path, re.M)[1]  # type: ignore[index]
    assert latteflow("show", "domain.yaml", key[:8])[1] == latteflow("show", "domain.yaml", "100.png")[1] == by_path
    trained = latteflow("show", "domain.yaml", folder / "train" / "004.png")[1]
    assert re.search(
        r"^text, image +a \[bold\]green\[/bold\] \\x1b\[1mshape 004 \[names_class\], by sidecar", trained, re.M
    )
    domain = Domain.load(folder / "domain.yaml")
    made = {each.label: each for each in as_they_are(domain, "shard", "embed", "group")}
    groups = read_parquet(open_store(domain).open(made["group"].ref).read("groups.parquet"))
    own = re.search(r"^key +([0-9a-f]{20})", trained, re.M)[1]  # type: ignore[index]
    shown = groups.filter(pl.col("member_keys").list.contains(own)).height
    assert len(re.findall(r"^text, group of 4 ", trained, re.M)) == shown > 0
    assert "prediction" in trained and "none: only the images of `evaluation: source` were evaluated" in trained


def test_show_of_an_unknown_image(latteflow: Latteflow) -> None:
    code, _, error = latteflow("show", "domain.yaml", "0004.png")
    assert code == 1 and "has no image '0004.png'; did you mean '004.png'?" in error


def test_hostile_names_are_printed_and_nothing_more(latteflow: Latteflow, folder: Path) -> None:
    code, said, _ = latteflow("show", "domain.yaml", folder / "train" / HOSTILE)
    assert code == 0 and re.search(r"^image +\[red\]x\[/red\]\\x1b\[31m\\u202e\\x0a\.png *$", said, re.M)
    code, said, _ = latteflow("show", "domain.yaml", folder / "train" / "bad[b]\x1b.png")
    assert code == 0 and re.search(r"^image +bad\[b\]\\x1b\.png *$", said, re.M)
    assert re.search(r"^quarantined +not_an_image", said, re.M)
    for command in (["plan"], ["verify"], ["gc"], ["show"], ["explain", "shard"]):
        assert latteflow(command[0], "domain.yaml", *command[1:])[0] == 0
    code, _, error = latteflow("show", "domain.yaml", "\x1b]0;[red]\u202e")
    assert code == 1 and r"\x1b]0;[red]\u202e" in error


def test_explain_in_words(latteflow: Latteflow, folder: Path) -> None:
    code, said, _ = latteflow("explain", "domain.yaml", "tune")
    assert code == 0
    assert re.search(r"^  embed +embed train [0-9a-f]{12}", said, re.M)
    assert re.search(r"^  latteclip\.epochs +2", said, re.M)
    old = re.search(r"^artifact +tune ([0-9a-f]{64})", said, re.M)[1]  # type: ignore[index]
    edit(folder, "epochs: 2", "epochs: 3")
    latteflow("run", "domain.yaml", "--only", "tune")
    assert "embed test" in latteflow("explain", "domain.yaml", "embed test")[1]
    for name in (old, old[:10], f"tune/{old[:10]}", f"shapes/tune/{old[:10]}"):
        code, said, _ = latteflow("explain", "domain.yaml", name, "tune")
        assert code == 0
        assert re.match(
            rf"tune {old[:12]} -> tune [0-9a-f]{{12}}; their content differs\n  latteclip.epochs: 2 -> 3\n$", said
        )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tune", "embed"], "'tune' is of stage tune and 'embed' of embed; compare two of one stage"),
        (["zzz"], "domain 'shapes' has no artifact 'zzz'; give a stage (describe, embed, "),
        (["tune/zzz"], "has no artifact 'tune/zzz'"),
        (["embed/"], "'embed/' fits 2 artifacts: embed/"),
    ],
)
def test_explain_of_what_is_not_there(latteflow: Latteflow, names: list[str], message: str) -> None:
    code, _, error = latteflow("explain", "domain.yaml", *names)
    assert code == 1 and message in error


def grow_old(folder: Path) -> None:
    then = time.time() - 2 * 86400
    for path in (folder / "store").rglob("*"):
        os.utime(path, (then, then))


@pytest.mark.parametrize("address", [["domain.yaml"], ["--store", "store"]])
def test_gc_takes_what_no_current_run_needs(latteflow: Latteflow, folder: Path, address: list[str]) -> None:
    old = {
        stage: next((folder / "store/shapes" / stage).glob("*/manifest.json")) for stage in ("tune", "select", "report")
    }
    latteflow("run", "domain.yaml", "--refresh", "describe")
    edit(folder, "epochs: 2", "epochs: 3")
    latteflow("run", "domain.yaml")
    (folder / "store/shapes/tune/data" / f".tmp-{'0' * 32}").write_text("half")
    before = tree(folder)
    assert "nothing to delete" in latteflow("gc", *address)[1]
    grow_old(folder)
    for stage in ("select", "report"):
        os.utime(old[stage], (1, 1))
    code, said, _ = latteflow("gc", *address)
    assert code == 0 and tree(folder) == before
    assert "would delete" in said and "`--delete` does it" in said
    assert re.search(r"^shapes +tune +unfinished +1 +4 B", said, re.M)
    code, said, _ = latteflow("gc", *address, "--delete")
    assert code == 0 and "deleted" in said and "1 small files of texts merged" in said
    assert [stage for stage, path in old.items() if path.exists()] == []
    gone = before - tree(folder)
    assert {path.split("/")[2] for path in gone if not path.startswith("store/captions")} == {
        "tune",
        "select",
        "evaluate",
        "report",
    }
    assert latteflow("verify", *address)[0] == 0
    assert "nothing to delete" in latteflow("gc", *address)[1]
    assert states(latteflow("run", "domain.yaml")[1]) == dict.fromkeys(LABELS, "cached")


def test_gc_keeps_what_the_domain_file_would_take_now(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "epochs: 2", "epochs: 3")
    latteflow("run", "domain.yaml")
    grow_old(folder)
    edit(folder, "epochs: 3", "epochs: 2")
    latteflow("gc", "domain.yaml", "--delete")
    assert states(latteflow("run", "domain.yaml")[1]) == dict.fromkeys(LABELS, "cached")


def test_gc_leaves_a_domain_alone_that_is_run_or_never_was(latteflow: Latteflow, folder: Path) -> None:
    edit(folder, "epochs: 2", "epochs: 3")
    latteflow("run", "domain.yaml")
    grow_old(folder)
    running = folder / "store" / "shapes" / "describe" / ("0" * 64) / "running.json"
    running.parent.mkdir()
    running.write_text("{}")
    before = tree(folder)
    assert "shapes: describe is under way; nothing of it goes" in latteflow("gc", "domain.yaml", "--delete")[1]
    running.unlink()
    for path in (folder / "store/shapes/report").glob("*/manifest.json"):
        path.unlink()
    assert "shapes: it has no complete run yet; nothing of it goes" in latteflow("gc", "domain.yaml", "--delete")[1]
    assert {
        path for path in before if "/report/" not in path and "captions" not in path and "running" not in path
    } < tree(folder)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give domain files, or --store URL"),
        (["domain.yaml", "--store", "store"], 2, "give domain files, or --store URL"),
        (["--store", "nowhere"], 1, "store 'nowhere' holds nothing; check the path"),
        (["--store", "train"], 1, "'train' is no store: latteflow wrote none of it; check the path"),
        (["elsewhere.yaml"], 1, "holds nothing of domain 'shapes'; run it first, or check `store` and `name`"),
    ],
)
@pytest.mark.parametrize("command", ["gc", "verify"])
def test_gc_and_verify_need_to_know_where(
    latteflow: Latteflow, folder: Path, command: str, arguments: list[str], status: int, message: str
) -> None:
    elsewhere = (folder / "domain.yaml").read_text().replace("store: store", "store: train")
    (folder / "elsewhere.yaml").write_text(elsewhere)
    before = tree(folder / "train")
    code, _, error = latteflow(command, *arguments, *(["--delete"] if command == "gc" else []))
    assert code == status and message in error and error.count("\n") == 1
    assert tree(folder / "train") == before


@pytest.mark.parametrize("arguments", [("show", "domain.yaml"), ("explain", "domain.yaml", "embed")])
def test_a_store_that_holds_nothing_of_a_domain(latteflow: Latteflow, folder: Path, arguments: tuple[str]) -> None:
    edit(folder, "store: store", "store: train")
    code, _, error = latteflow(*arguments)
    assert code == 1 and "store" in error and "holds nothing of domain 'shapes'" in error


Tell = Callable[..., dict]


@pytest.fixture
def tell(latteflow: Latteflow) -> Tell:
    """Arguments -> the one document that `--json` gives."""

    def told(*arguments: object, status: int = 0) -> dict:
        code, said, error = latteflow(*arguments, "--json")
        assert code == status, error
        assert said.isascii(), "names from outside reach no terminal raw"
        document: dict = json.loads(said, parse_constant=pytest.fail)
        return document

    return told


def test_the_end_of_a_run_as_json(tell: Tell, folder: Path) -> None:
    told = tell("run", "domain.yaml")
    assert list(told) == [
        "domain", "stages", "labelled", "adapted_to", "scores", "kept", "report", "metrics",
    ]  # fmt: skip
    assert [each["stage"] for each in told["stages"]] == LABELS
    assert all(list(each) == ["stage", "state", "seconds", "artifact", "counts"] for each in told["stages"])
    assert {each["state"] for each in told["stages"]} == {"cached"}
    assert (told["domain"], told["labelled"], told["adapted_to"]) == ("shapes", 12, 0)
    assert list(told["scores"]) == ["zero_shot_plain", "zero_shot_centred", "zero_shot_estimated", "latteclip"]
    assert set(told["scores"]["latteclip"]) == {"top1", "interval", "gain", "gain_interval"}
    assert told["kept"]["method"] in ("zero_shot_plain", "latteclip") and list(told["kept"]) == [
        "method",
        "seed",
        "why",
    ]
    assert Path(told["report"]).is_file() and json.loads(Path(told["metrics"]).read_text())["n_test"] == 12
    told = tell("run", "domain.yaml", "--only", "evaluate", "--refresh", "evaluate")
    assert list(told) == ["domain", "stages"]
    assert {each["stage"] for each in told["stages"] if each["state"] == "done"} == {"evaluate"}


def test_a_plan_as_json(tell: Tell, folder: Path) -> None:
    assert tell("plan", "domain.yaml")["seconds"] == 0
    edit(folder, "epochs: 2", "epochs: 3")
    (folder / "train" / "001.png").unlink()
    told = tell("plan", "domain.yaml")
    assert list(told) == [
        "domain", "stages", "images", "texts", "prompt_tokens", "output_tokens", "seconds", "cost", "currency",
    ]  # fmt: skip
    assert told["images"]["train"] == {"new": 0, "kept": 24, "removed": 1}
    stages = {each["stage"]: each for each in told["stages"]}
    assert list(stages) == LABELS
    assert all(
        list(each) == ["stage", "state", "reasons", "artifact", "unit", "work", "at_most", "seconds"]
        for each in stages.values()
    )
    assert stages["shard test"]["state"] == "cached" and len(stages["shard test"]["artifact"]) == 64
    assert stages["tune"]["state"] == "will run" and "latteclip.epochs: 2 -> 3" in stages["tune"]["reasons"]
    assert (stages["tune"]["unit"], stages["tune"]["work"], stages["tune"]["artifact"]) == ("models", 2, None)
    assert (told["prompt_tokens"], told["cost"], told["currency"]) == (0, None, "USD")
    assert told["seconds"] == pytest.approx(sum(each["seconds"] for each in told["stages"]))


def test_artifacts_and_an_image_as_json(tell: Tell, folder: Path) -> None:
    told = tell("show", "domain.yaml")
    assert (list(told), told["domain"]) == (["domain", "artifacts"], "shapes")
    assert sorted(each["stage"] for each in told["artifacts"] if each["current"]) == sorted(LABELS)
    assert list(told["artifacts"][0]) == ["stage", "artifact", "current", "made", "bytes", "counts"]
    assert told["artifacts"][0]["made"].endswith("+00:00")
    told = tell("show", "domain.yaml", "100.png")
    assert (told["domain"], told["path"], told["split"], told["truth"]) == ("shapes", "100.png", "test", "green")
    assert {each["by"] for each in told["predictions"]} >= {"latteclip"}
    assert list(told["pseudo_labels"][0]) == ["by", "class", "probability"]
    assert len(told["artifacts"]["shard test"]) == 64
    told = tell("show", "domain.yaml", "004.png")
    assert list(told["texts"][0]) == ["kind", "text", "flags", "by", "weight"]
    assert told["texts"][0]["text"] == "a [bold]green[/bold] \x1b[1mshape 004"
    assert tell("show", "domain.yaml", HOSTILE)["width"] == 40


def test_champions_as_json(tell: Tell) -> None:
    assert tell("champion", "domain.yaml") == {"domain": "shapes", "champion": None, "earlier": []}
    ref = ArtifactRef("shapes", "tune", "f" * 64, "d" * 64)
    first, second = (
        Champion(ref, ref, "latteclip", seed, 0.5, "about", "2026-11-22T11:52:37+00:00", "why", version=seed + 1)
        for seed in (0, 1)
    )
    told = documents.champions("shapes", [first, second])
    assert told["champion"] == {
        "version": 2, "since": "2026-11-22T11:52:37+00:00", "artifact": "f" * 64, "method": "latteclip", "seed": 1,
        "score": 0.5, "why": "why",
    }  # fmt: skip
    assert [each["version"] for each in told["earlier"]] == [1]


def test_nights_are_told(latteflow: Latteflow, tell: Tell, folder: Path) -> None:
    assert tell("nights", "domain.yaml") == {"domain": "shapes", "nights": []}
    assert "had no night yet" in latteflow("nights", "domain.yaml")[1]
    night = Night(
        "2027-03-28T00:30:01+00:00", "Promoted", "better", 12.0, images=24, new=24, made=("tune",), champion=1
    )
    remember(open_store(Domain.load("domain.yaml")), "shapes", night)
    told = tell("nights", "domain.yaml")["nights"]
    assert [(each["state"], each["images"], each["made"]) for each in told] == [("Promoted", 24, ["tune"])]
    code, said, _ = latteflow("nights", "domain.yaml")
    assert code == 0 and "2027-03-28 00:30" in said and (folder / "runs/shapes/nights.html").exists()


def test_what_verify_finds_as_json(tell: Tell, folder: Path) -> None:
    told = tell("verify", "domain.yaml")
    assert list(told) == ["sound", "objects", "bytes", "damaged"] and told["sound"] and told["objects"] > 50
    harmed = next((folder / "store/shapes/embed/data").glob("shard-00001.*"))
    harmed.write_bytes(harmed.read_bytes()[:-8] + bytes(8))
    told = tell("verify", "--store", "store", status=1)
    assert not told["sound"] and len(told["damaged"]) == 1 and str(harmed) in told["damaged"][0]


@pytest.mark.parametrize("command", ["run", "plan", "show", "champion", "nights", "verify", "doctor"])
def test_a_mistake_is_no_document(latteflow: Latteflow, command: str) -> None:
    code, said, error = latteflow(command, "domian.yaml", "--json")
    assert (code, said) == (1, "") and error.startswith("error: domain file domian.yaml cannot be read")


def test_gc_wants_an_age(latteflow: Latteflow) -> None:
    code, _, error = latteflow("gc", "domain.yaml", "--older-than", "soon")
    assert code == 2 and "--older-than 'soon': give a number and a unit, such as 30m, 12h or 7d" in error


@pytest.mark.parametrize("address", [["domain.yaml"], ["--store", "store"]])
def test_verify_finds_damage_and_the_next_run_repairs_it(
    latteflow: Latteflow, folder: Path, address: list[str]
) -> None:
    code, said, beside = latteflow("verify", *address)
    assert code == 0 and "all sound" in said and beside == ""
    harmed = [
        next((folder / "store/shapes/embed/data").glob("shard-00001.*")),
        next((folder / "store/captions").glob("*/*.parquet")),
    ]
    for path in harmed:
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    code, said, _ = latteflow("verify", *address)
    assert code == 1 and "2 damaged" in said
    assert all(str(path) in said and not path.exists() for path in harmed)
    code, said, _ = latteflow("run", "domain.yaml")
    assert code == 0 and "done" in states(said).values()
    assert latteflow("verify", *address)[0] == 0


def test_replay_is_cached_until_the_limits_change(latteflow: Latteflow, folder: Path) -> None:
    code, said, _ = latteflow("replay", "domain.yaml")
    assert code == 0 and states(said) == {"shard train": "cached", "shard test": "cached"}
    edit(folder, "images: 10", "images: 10, max_aspect: 50")
    code, said, _ = latteflow("replay", "domain.yaml")
    assert code == 0 and states(said) == {"shard train": "done", "shard test": "done"}


def test_the_installed_program_ends_with_the_exit_code(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "latteflow.flows.cli", "run", "nothing.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: domain file nothing.yaml cannot be read") and "Traceback" not in done.stderr
