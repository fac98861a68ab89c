"""The whole pipeline on a tiny CLIP: what runs, what is cached, what a mistake costs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from conftest import COLOURS, call, draw, draw_folder
from latteflow.flows.pipeline import repaired, run_plainly
from latteflow.models.judge.metrics import seen_note
from latteflow.models.judge.shift import centre_share
from latteflow.storage.errors import DataError
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_features
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.tune.models import read_tuned


def ran(results: list[StageResult]) -> set[str]:
    return {result.label for result in results if not result.cached}


ALL = {
    "shard train", "shard test", "embed train", "embed test", "describe", "group", "screen", "tune", "select",
    "evaluate", "report",
}  # fmt: skip


def test_a_run_leaves_metrics_and_a_report(domain: Domain) -> None:
    results = run_plainly(domain)
    assert ran(results) == ALL
    folder = Path(domain.output) / "shapes"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["domain"] == "shapes" and metrics["n_test"] == 12
    zero_shot = metrics["zero_shot"]
    assert zero_shot["top1"] == max(zero_shot["plain"], zero_shot["centred"], zero_shot["estimated"])
    adapted = metrics["methods"]["latteclip"]
    assert adapted["interval"][0] <= adapted["top1"] <= adapted["interval"][1]
    assert adapted["top1"] == pytest.approx(sum(adapted["seeds"]) / 2)
    assert adapted["gain"] == pytest.approx(adapted["top1"] - zero_shot["top1"])
    assert "shapes" in (folder / "report.html").read_text()


@pytest.mark.parametrize("centre", [None, True, False])
def test_everything_starts_from_the_zero_shot_that_the_domain_has(domain: Domain, centre: bool | None) -> None:
    """By default as much of the centre is taken out as the images speak for; features are not made again for that."""
    run_plainly(domain)
    domain = domain.model_copy(update={"clip": domain.clip.model_copy(update={"centre": centre})})
    results = {result.label: result for result in run_plainly(domain)}
    store, metrics = open_store(domain), json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text())
    found = read_features(store.open(results["embed train"].ref))
    embeds, texts = torch.from_numpy(found.embeds), torch.from_numpy(found.class_features)
    expected = centre_share(embeds, texts, 100.0) if centre is None else float(centre)
    assert found.share == metrics["centre_share"] == pytest.approx(expected, abs=1e-5)
    tuned = read_tuned(store.open(results["tune"].ref), "latteclip", domain.seeds[0])
    assert tuned.centre == pytest.approx(found.share * found.centre)
    own = {None: "zero_shot_estimated", True: "zero_shot_centred", False: "zero_shot_plain"}[centre]
    assert metrics["zero_shot"]["own"] == own
    test = read_features(store.open(results["embed test"].ref))
    table = read_parquet(store.open(results["evaluate"].ref).read("predictions.parquet"))
    answers = dict(table.select("key", own).iter_rows())
    moved = test.embeds - found.share * found.centre
    assert [answers[key] for key in test.keys] == (moved @ test.class_features.T).argmax(1).tolist()


def test_the_second_run_makes_nothing(domain: Domain, tmp_path: Path) -> None:
    first = run_plainly(domain)
    (tmp_path / "train" / "000.png").touch()
    (tmp_path / "unrelated.txt").touch()
    second = run_plainly(domain)
    assert ran(second) == set()
    assert [result.ref for result in second] == [result.ref for result in first]


@pytest.mark.slow
def test_one_new_image_runs_what_depends_on_it(domain: Domain, tmp_path: Path) -> None:
    before = {result.label: result for result in run_plainly(domain)}
    draw(500, "red").save(tmp_path / "train" / "new.png")
    after = {result.label: result for result in run_plainly(domain)}
    assert ran(list(after.values())) == ALL - {"shard test", "embed test"}
    assert after["embed train"].counts["images"] == 25
    store = Path(domain.store) / "shapes"
    old = [path for path in (store / "embed" / "parts").iterdir() if "shard-0000" in path.read_text()]
    assert len(old) == 3 + 1 + 2  # three old shards and the new one; two of the test split
    assert before["embed train"].ref != after["embed train"].ref


@pytest.mark.slow
def test_other_seeds_or_classes_do_not_embed_again(domain: Domain) -> None:
    run_plainly(domain)
    more = run_plainly(domain.model_copy(update={"seeds": [0, 1, 2]}))
    assert ran(more) == {"tune", "select", "evaluate", "report"}
    store = Path(domain.store) / "shapes"
    features = {path.name for path in (store / "embed" / "data").glob("*.features.parquet")}
    run_plainly(domain.model_copy(update={"classes": ["red", "green", "blue", "grey"]}))
    assert features == {path.name for path in (store / "embed" / "data").glob("*.features.parquet")}


@pytest.mark.slow
def test_labels_change_nothing_but_the_evaluation(domain: Domain, tmp_path: Path) -> None:
    run_plainly(domain)
    labels = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(labels.replace(",red", ",x").replace(",green", ",red").replace(",x", ",green"))
    assert ran(run_plainly(domain)) == {"evaluate", "report"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "n_test", "n_seen", "headline"),
    [
        ("source: train, ", 24, 24, "On the images it was adapted to: "),
        ("", 24, 24, "On the images it was adapted to: "),
        ("source: both, ", 15, 3, "On images, 20.0% of which it was adapted to: "),
    ],
)
def test_images_that_it_was_adapted_to_are_told_first(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, n_test: int, n_seen: int,
    headline: str,
) -> None:  # fmt: skip
    shutil.copytree(tmp_path / "test", tmp_path / "both")
    for name in ("000.png", "001.png", "002.png"):  # under other names, which is another key
        shutil.copy(tmp_path / "train" / name, tmp_path / "both" / f"again-{name}")
    paths = [path for folder in ("train", "both") for path in (tmp_path / folder).iterdir()]
    rows = "".join(f"{path.relative_to(tmp_path)},{list(COLOURS)[int(path.stem[-3:]) % 3]}\n" for path in paths)
    (tmp_path / "all.csv").write_text("path,class\n" + rows)
    file = tmp_path / "domain.yaml"
    text = file.read_text().replace("source: test, labels: labels.csv", f"{source}labels: all.csv")
    file.write_text(text.replace("seeds: [0, 1]", "seeds: [0]"))
    assert call("run", file) == 0
    metrics = json.loads((tmp_path / "runs/shapes/metrics.json").read_text())
    assert (metrics["n_test"], metrics["n_seen"]) == (n_test, n_seen)
    assert list(metrics).index("n_seen") < list(metrics).index("methods")
    said = capsys.readouterr().out
    note = seen_note(n_seen, n_test)
    assert note in said and said.index(note) < said.index("gain over the better zero-shot")
    page = (tmp_path / "runs/shapes/report.html").read_text()
    assert headline in page and note in page and page.index(headline) < page.index("is right on")
    assert call("export", file, tmp_path / "model", "--method", "zero_shot") == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Mind that {note}." in card and card.index(note) < card.index("| top-1 |") and "top-5" not in card
    assert "the text tower's reading of the class names (plain zero-shot) |" in card


@pytest.mark.slow
def test_which_zero_shot_is_kept_is_told(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "domain.yaml"
    for centre, name in (("true", "domain-centred zero-shot"), ("false", "plain zero-shot")):
        file.write_text(re.sub("resize: pad.*}", f"resize: pad, centre: {centre}}}", file.read_text()))
        told = f"{name}: without labels, no model is preferred"
        assert call("run", file) == 0 and f"kept     {told}" in capsys.readouterr().out
        assert told in (tmp_path / "runs/shapes/report.html").read_text()
        assert call("export", file, tmp_path / name) == 0 and f"kept     {told}" in capsys.readouterr().out
        card = (tmp_path / name / "README.md").read_text()
        assert told in card and f"({name}) |" in card


def test_without_labels_nothing_is_claimed(domain: Domain) -> None:
    results = run_plainly(domain.model_copy(update={"evaluation": None}))
    assert ran(results) == ALL - {"shard test", "embed test"}
    metrics = json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text())
    assert metrics["n_test"] == 0
    assert metrics["zero_shot"]["top1"] is None and metrics["methods"]["latteclip"]["top1"] is None
    assert 0 <= metrics["label_free"]["agreement"] <= 1


@pytest.mark.slow
def test_bad_images_are_counted_and_the_run_goes_on(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "train" / "zero.png").write_bytes(b"")
    (tmp_path / "train" / "text.jpg").write_text("not a picture")
    results = {result.label: result for result in run_plainly(domain)}
    assert results["shard train"].counts["quarantined"] == 2
    assert results["tune"].counts["models"] == 2


@pytest.mark.slow
def test_a_damaged_file_is_set_aside_and_made_again(domain: Domain) -> None:
    first = run_plainly(domain)
    store = Path(domain.store) / "shapes"
    features = next((store / "embed" / "data").glob("shard-00000.*.features.parquet"))
    good = features.read_bytes()
    features.write_bytes(good[:-100] + bytes(100))
    again = repaired(run_plainly, domain.model_copy(update={"seeds": [5]}))
    assert features.read_bytes() == good
    assert next((store / "embed" / "damaged").iterdir()).read_bytes() != good
    assert {result.label: result.ref for result in again}["embed train"] == first[2].ref


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("path,class\ntest/100.png,rad\n", r"'rad' \(1 images\), did you mean 'red'\?"),
        ("path,label\ntest/100.png,red\n", "has no column 'class'; its columns are path, label"),
        ("path,class\nelsewhere/1.png,red\n", r"no class for any of the 12 images: its paths look like"),
        ("", "is not a table"),
    ],
)
def test_bad_labels_are_one_clear_error(domain: Domain, tmp_path: Path, labels: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(labels)
    with pytest.raises(DataError, match=message):
        run_plainly(domain)


@pytest.mark.slow
def test_a_class_with_one_image_and_a_few_images_in_all(domain: Domain, tmp_path: Path) -> None:
    for path in sorted((tmp_path / "train").iterdir())[2:]:
        path.unlink()
    assert {result.label for result in run_plainly(domain)} == ALL


@pytest.mark.slow
def test_images_are_their_own_test_set_without_another(domain: Domain, tmp_path: Path) -> None:
    truth = draw_folder(tmp_path / "train", 24)
    rows = "".join(f"train/{path},{name}\n" for path, name in truth.items())
    (tmp_path / "labels.csv").write_text("path,class\n" + rows)
    evaluation = domain.evaluation.model_copy(update={"source": None})  # type: ignore[union-attr]
    run_plainly(domain.model_copy(update={"evaluation": evaluation}))
    assert json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text())["n_test"] == 24
