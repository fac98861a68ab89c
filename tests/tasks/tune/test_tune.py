"""Several methods in one domain: each model is a part of its own, and a change retrains only what it shapes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latteflow.flows.console import scores
from latteflow.flows.pipeline import run_plainly
from latteflow.flows.plan import plan
from latteflow.models.methods.registry import METHODS
from latteflow.storage.errors import DataError
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core import features
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.stage import StageResult, open_store, rules, statistic
from latteflow.tasks.report.scores import Scores
from latteflow.tasks.ship.export import export_tuned
from latteflow.tasks.tune.models import read_history, read_tuned
from latteflow.tasks.tune.tune import tune

pytestmark = pytest.mark.slow

ALL = [method for method in METHODS if method not in ("clamp", "class_descriptions")]  # in files of their own


def told(domain: Domain, **changes: Any) -> Domain:
    """The domain with some settings changed; those of a section by section__name."""
    update: dict[str, Any] = {}
    for name, value in changes.items():
        section, _, field = name.partition("__")
        update[section] = getattr(domain, section).model_copy(update={field: value}) if field else value
    return domain.model_copy(update=update)


def tuned(domain: Domain) -> StageResult:
    return {result.label: result for result in run_plainly(domain)}["tune"]


def made(domain: Domain) -> int:
    """Models that a run trains, which is also what the plan says before."""
    planned = {each.label: each for each in plan(domain)}["tune"].work
    store = open_store(domain)
    trained = statistic(store, store.open(tuned(domain).ref), "parts_made")
    assert planned == trained
    return planned


def test_a_change_trains_only_what_it_shapes(domain: Domain) -> None:
    assert tuned(domain).counts["models"] == 2
    steps: list[tuple[dict[str, Any], int]] = [
        ({"method": ["latteclip", "transduction"]}, 1),
        ({"method": ALL}, 10),  # two seeds of latteclip_plus, pc_clip, flyp, wise_ft and self_training
        ({"seeds": [0, 1, 2]}, 6),  # transduction has no seed
        ({"latteclip__alpha": 0.2}, 6),  # the baselines have no texts
        ({"transduction__anchor": 5.0}, 4),
        ({"latteclip__epochs": 3}, 15),
        ({"pc_clip__epochs": 1}, 3),
        ({"latteclip__texts_from": "pc_clip"}, 6),
        ({"pairs__budget": 50}, 9),
    ]
    for changes, models in steps:
        domain = told(domain, **changes)
        assert made(domain) == models, changes


def test_features_on_disk_make_the_same_models(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = told(domain, method=["latteclip", "latteclip_plus", "transduction", "self_training"], seeds=[0])
    results = {result.label: result for result in run_plainly(domain)}
    store = open_store(domain)
    expected = {method: read_tuned(store.open(results["tune"].ref), method, 0) for method in domain.method}
    monkeypatch.setattr(features, "MOST_BYTES", 0)
    with rules(refresh=["tune"]):
        again = tune(domain, results["shard train"], results["embed train"], results["screen"])
    for method, model in expected.items():
        found = read_tuned(store.open(again.ref), method, 0)
        np.testing.assert_allclose(found.prototypes, model.prototypes, atol=1e-4)
        assert (found.assignments is None) == (model.assignments is None)
        if model.assignments is not None and found.assignments is not None:
            np.testing.assert_allclose(found.assignments, model.assignments, atol=1e-3)


def test_every_method_is_scored_and_shown(domain: Domain) -> None:
    domain = told(domain, method=["transduction", *(name for name in ALL if name != "transduction")])
    results = {result.label: result for result in run_plainly(domain)}
    store, folder = open_store(domain), Path(domain.output) / "shapes"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["methods"]) == domain.method
    for name, score in metrics["methods"].items():
        assert score["interval"][0] <= score["top1"] <= score["interval"][1]
        assert len(score["seeds"]) == len(domain.seeds_of(name))
        assert score["gain"] == pytest.approx(score["top1"] - metrics["zero_shot"]["top1"])
        assert sum(score["label_free"]["predicted_after"]) == 12
    assert metrics["label_free"] == metrics["methods"]["transduction"]["label_free"]
    assert set(metrics["confusion"]) == {*metrics["zero_shot"]["methods"], *domain.method}
    table = read_parquet(store.open(results["evaluate"].ref).read("predictions.parquet"))
    assert {f"{name}_probability" for name in domain.method} < set(table.columns)
    page = (folder / "report.html").read_text()
    for label in ("LatteCLIP plus", "anchored transduction", "FLYP", "self-training", "PC-CLIP"):
        assert f"<bdi>{label}</bdi>" in page
    assert scores(Scores.model_validate(metrics)).row_count == 10  # type: ignore[union-attr]
    files = store.open(results["tune"].ref)
    assert read_history(files, "transduction", None) == [] and len(read_history(files, "flyp", 1)) == 2
    with pytest.raises(DataError, match="transduction has one model, no seeds"):
        export_tuned(domain, results["tune"], 1, folder / "model")
    with pytest.raises(DataError, match=r"no model by 'clip'; `method` is transduction, latteclip"):
        export_tuned(domain, results["tune"], None, folder / "model", method="clip")
    with pytest.raises(DataError, match=r"no model with seed 7; `seeds` are 0, 1"):
        export_tuned(domain, results["tune"], 7, folder / "model", method="flyp")
    export_tuned(domain, results["tune"], 1, folder / "model", method="latteclip_plus")
    assert (folder / "model" / "classifier.safetensors").exists()


def test_on_its_own_images_transduction_answers_for_all_together(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,class\n000.png,red\n001.png,green\n")
    evaluation = domain.evaluation.model_copy(update={"source": None})  # type: ignore[union-attr]
    domain = told(domain, method=["transduction", "latteclip_plus"], seeds=[0], evaluation=evaluation)
    results = {result.label: result for result in run_plainly(domain)}
    store = open_store(domain)
    table = read_parquet(store.open(results["evaluate"].ref).read("predictions.parquet"))
    for name in domain.method:
        found = read_tuned(store.open(results["tune"].ref), name, 0).assignments
        assert found is not None
        np.testing.assert_array_equal(table[name], found.argmax(1))
        np.testing.assert_allclose(table[f"{name}_probability"], found.max(1), atol=1e-5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("method: [flyp, flyp]", "flyp is named more than once"),
        ("method: [self_training]\nlatteclip: {train: all}", "self_training works on cached features"),
    ],
)
def test_methods_that_cannot_run_are_told_before(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "domain.yaml").write_text(f"name: x\nsource: a\nclasses: [a, b]\n{lines}\n")
    with pytest.raises(ConfigError, match=message):
        Domain.load(tmp_path / "domain.yaml")
