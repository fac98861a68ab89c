"""The paper's table in one command: two data sets of the paper's layout stand for the ten, a tiny CLIP for its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.paper import commands, markdown
from conftest import draw_folder
from latteflow.domains import paper

ROOT = Path(__file__).parent.parent.parent
TINY = {
    r"templates: .*": "templates: ['a {} shape.']",
    r"describer: .*": "describer: {kind: tags}",
    r"batch_size: 512": "batch_size: 8",
    r"epochs: \d+": "epochs: 2",
    r"warmup: \d+": "warmup: 1",
    r"micro_batch: 256": "micro_batch: 4",
}


def prepare(name: str, folder: Path, tiny_clip: Path, first: int, tiny: bool = True) -> Path:
    """The folder of a data set as `python -m domains.paper` makes it; ``tiny``: with small settings."""
    truth = draw_folder(folder / "given" / name, 36, first)
    rows = [[path, sorted(set(truth.values())).index(colour), colour] for path, colour in truth.items()]
    split = folder / f"{name}.json"
    split.write_text(json.dumps({"train": rows[:20], "val": rows[20:24], "test": rows[24:]}))
    images = str(folder / "given" / name)
    with pytest.raises(SystemExit, match="0"):
        paper.main([name, "--images", images, "--split", str(split), "--data", str(folder / "data")])
    file = folder / "data" / name / "domain.yaml"
    text = file.read_text()
    for pattern, small in {**TINY, r"clip: .*": f"clip: {{model: {tiny_clip}}}"}.items() if tiny else ():
        text, count = re.subn(pattern, small, text)
        assert count, f"the settings have no {pattern}"
    file.write_text(text)
    return file.parent


def start(folder: Path, *sets: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.paper", "--sets", *sets]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "nothing")}
    heard = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, start_new_session=True, **heard)


def ended(process: subprocess.Popen[str], code: int) -> tuple[list[str], str]:
    """Lines on standard output, and standard error."""
    out, said = process.communicate(timeout=300)
    assert process.returncode == code, said[-4000:]
    return out.splitlines(), said


@pytest.mark.slow
def test_a_killed_table_goes_on(tmp_path: Path, tiny_clip: Path) -> None:
    prepare("dtd", tmp_path, tiny_clip, first=0)
    eurosat = prepare("eurosat", tmp_path, tiny_clip, first=300)
    killed, limit = start(tmp_path, "dtd", "eurosat"), time.monotonic() + 300
    while not list((tmp_path / "runs/store/dtd/tune/parts").glob("*.json")):
        assert killed.poll() is None and time.monotonic() < limit, killed.communicate()[1][-4000:]
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.communicate()[0] == "" and not (tmp_path / "runs/dtd").exists()

    # It goes on; a set that fails and one that is not there are named, and leave the other its row.
    labels = (eurosat / "labels.csv").read_text()
    (eurosat / "labels.csv").write_text(labels.replace("red", "mauve"))
    table, said = ended(start(tmp_path, "dtd", "eurosat", "sun397"), 1)
    assert re.search(r"tune done models=6 \S+ parts_reused=[1-6].*\ngroup +cached ", said, re.DOTALL), said
    assert [row.split(" | ")[0] for row in table[2:4]] == ["| dtd", "| mean of these 1"]
    why = "data sets in data/ (python -m domains.paper): sun397; see above why these failed: eurosat"
    assert said.splitlines()[-1] == f"error: not in the table: {why}"

    # What was done is kept: of the first nothing runs, of the other only what its labels shape.
    (eurosat / "labels.csv").write_text(labels)
    whole, said = ended(start(tmp_path, "dtd", "eurosat"), 0)
    assert re.findall(r"INFO +(\w+) done", said) == ["evaluate", "report"]
    assert whole[:3] == table[:3]
    for name, row in zip(("dtd", "eurosat"), whole[2:4], strict=True):
        metrics = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
        gain = 100 * (metrics["methods"]["latteclip"]["top1"] - metrics["zero_shot"]["plain"])
        assert row.startswith(f"| {name} | 12 | ") and row.split(" | ")[6] == f"{gain:+.1f}"


@pytest.mark.slow
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, tiny_clip: Path) -> None:
    vllm = "an environment with vLLM (docs/describers.md): .venv-gpu/bin/python"
    weights = f"weights of ViT-B-32 laion2b_s34b_b79k; weights of llava-hf/llava-v1.6-mistral-7b-hf; {vllm}"
    nothing = "error: not on this machine: data sets in data/ (python -m domains.paper): "
    assert ended(start(tmp_path, "dtd", "eurosat"), 1) == ([], f"{nothing}dtd, eurosat; {weights}\n")
    prepare("dtd", tmp_path, tiny_clip, first=0, tiny=False)
    assert ended(start(tmp_path, "dtd"), 1) == ([], f"error: not on this machine: {weights}\n")


def test_one_program_at_a_time_has_the_gpu() -> None:
    ours, theirs = (
        [sys.executable, "-m", "latteflow.flows.cli", "run", "file"],
        ["vllm", "-m", "latteflow.flows.cli", "run", "file"],
    )
    assert list(commands(Path("file"), Path("vllm"), writes=False)) == [ours]
    assert list(commands(Path("file"), Path("vllm"), writes=True)) == [
        [*ours, "--only", "shard"],
        [*ours, "--only", "embed"],
        [*theirs, "--only", "describe"],
        [*theirs, "--only", "group"],
        ours,
    ]


def test_the_table() -> None:
    def metrics(zero_shot: float, flyp: list[float], latteclip: list[float]) -> dict:
        plain = {"zero_shot_plain": {"seeds": [zero_shot]}}
        methods = {"flyp": {"seeds": flyp}, "latteclip": {"seeds": latteclip}}
        return {"n_test": 9, "zero_shot": {"methods": plain}, "methods": methods}

    found = {"dtd": metrics(0.5, [0.51, 0.53], [0.55, 0.57]), "ucf101": metrics(0.6, [0.6], [0.625])}
    assert markdown(found).splitlines()[2:] == [
        "| dtd | 9 | 55.69 | 50.0 | 52.0 ± 1.4 | 56.0 ± 1.4 | +6.0 | +4.0 |",
        "| ucf101 | 9 |  | 60.0 | 60.0 | 62.5 | +2.5 | +2.5 |",
        "| mean of these 2 | | | 55.0 | 56.0 | 59.2 | +4.25 | +3.25 |",
        "| LatteCLIP's paper, mean of 10 | | | | | | +4.74 | +3.45 over others |",
    ]
