"""A method and a describer of a package that somebody installed, from the domain file to answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from latteflow.tasks.core.domain import Domain

ROOT, PLUGIN = Path(__file__).parents[2], Path(__file__).parent / "plugin"
pytestmark = pytest.mark.slow


def latteflow(*words: object, packages: Path = PLUGIN) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (packages, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "latteflow.flows.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def write(domain: Domain, file: Path, **more: object) -> Path:
    """JSON is YAML."""
    assert domain.evaluation is not None
    told = domain.model_dump(
        mode="json", include={"name", "source", "classes", "clip", "store", "output", "evaluation"}
    )
    file.write_text(json.dumps({**told, **more}))
    return file


def test_a_method_and_a_describer_of_another_package(domain: Domain, tmp_path: Path) -> None:
    asked = {
        "method": ["medoids", "transduction"],
        "medoids": {"images": 3},
        "describer": {"kind": "brightness", "word": "sunny"},
    }
    file = write(domain, tmp_path / "domain.yaml", **asked)
    done = latteflow("run", file)
    assert done.returncode == 0, done.stderr
    told = json.loads((Path(domain.output) / domain.name / "metrics.json").read_text())
    assert list(told["methods"]) == ["medoids", "transduction"]
    page = (Path(domain.output) / domain.name / "report.html").read_text()
    assert "Medoids" in page and "sunny" in page
    done = latteflow("export", file, tmp_path / "model", "--method", "medoids")
    assert done.returncode == 0, done.stderr
    assert "medoids of a test package" in (tmp_path / "model" / "README.md").read_text()
    # Whoever has the folder needs no package but ours.
    out = tmp_path / "answers.parquet"
    done = latteflow("predict", tmp_path / "model", tmp_path / "test", "--out", out, packages=ROOT)
    assert done.returncode == 0, done.stderr
    answers = dict(pl.read_parquet(out).select("path", "class").iter_rows())
    (evaluated,) = Path(domain.store).glob("shapes/evaluate/data/predictions.*.parquet")
    expected = pl.read_parquet(evaluated).select("path", "medoids").iter_rows()
    assert answers == {path: domain.classes[label] for path, label in expected}

    write(domain, file, **{**asked, "medoids": {"images": 4}})
    again = latteflow("plan", file)
    assert "medoids.images" in again.stdout, "its settings shape its models, and nothing before them"


def test_the_schema_has_what_the_package_brings() -> None:
    own, ours = (json.loads(latteflow("schema", packages=each).stdout) for each in (PLUGIN, ROOT))
    assert "medoids" in own["properties"] and "medoids" not in ours["properties"]
    assert "brightness" in json.dumps(own["$defs"]) and "brightness" not in json.dumps(ours["$defs"])


def test_mistakes_name_what_the_package_brings(domain: Domain, tmp_path: Path) -> None:
    file = write(domain, tmp_path / "domain.yaml", method="medoid", medoids={"images": 0}, describer={"kind": "bright"})
    done = latteflow("plan", file)
    assert done.returncode == 1
    for expected in ("did you mean medoids?", "`medoids.images`", "brightness"):
        assert expected in done.stderr
    assert "is none of" in latteflow("plan", file, packages=ROOT).stderr


def test_a_package_that_cannot_be_loaded_is_named(domain: Domain, tmp_path: Path) -> None:
    broken = tmp_path / "broken-2.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (broken / "entry_points.txt").write_text("[latteflow.methods]\nnone = json:dumps\n")
    done = latteflow("plan", write(domain, tmp_path / "domain.yaml"), packages=tmp_path)
    assert done.returncode == 1 and "'json:dumps' of the package broken is no Method but function" in done.stderr
    assert "Traceback" not in done.stderr
