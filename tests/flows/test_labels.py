"""The firewall: labels change the evaluation and the report, and nothing else, and nothing else needs them."""

import json
from pathlib import Path

import pytest

from latteflow.flows.pipeline import run_plainly
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain

pytestmark = pytest.mark.slow
OPENS_LABELS = {"evaluate", "report"}


def digests(domain: Domain, store: Path) -> dict[str, str]:
    """By label, of all artifacts of a run in a store of its own, without those that may know a label."""
    results = run_plainly(domain.model_copy(update={"store": str(store), "output": str(store / "out")}))
    return {each.label: each.ref.digest for each in results if each.label not in OPENS_LABELS}


def metrics(domain: Domain) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((Path(domain.output) / "shapes" / "metrics.json").read_text(), parse_constant=refuse)


def test_poisoned_labels_reach_nothing_but_the_evaluation(domain: Domain, tmp_path: Path) -> None:
    right = digests(domain, tmp_path / "right")
    labels = tmp_path / "labels.csv"
    turned = {"red": "green", "green": "blue", "blue": "red"}
    rows = [line.split(",") for line in labels.read_text().splitlines()[1:]]
    labels.write_text("path,class\n" + "".join(f"{path},{turned[name]}\n" for path, name in rows))
    poisoned = digests(domain, tmp_path / "poisoned")
    without = digests(domain.model_copy(update={"evaluation": None}), tmp_path / "without")
    assert right == poisoned
    assert without == {label: digest for label, digest in right.items() if not label.endswith(" test")}


def test_labels_that_are_not_there_yet_stop_nothing_before_the_evaluation(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").rename(tmp_path / "locked.csv")
    with pytest.raises(DataError, match=r"labels.csv. does not exist$"):
        run_plainly(domain)
    (tmp_path / "locked.csv").rename(tmp_path / "labels.csv")
    assert {each.label for each in run_plainly(domain) if not each.cached} == OPENS_LABELS


def test_a_single_class_and_images_without_labels(domain: Domain, tmp_path: Path) -> None:
    lines = (tmp_path / "labels.csv").read_text().splitlines(True)
    (tmp_path / "labels.csv").write_text("".join(lines[:1] + [line for line in lines if ",red" in line][:3]))
    assert domain.evaluation
    evaluation = domain.evaluation.model_copy(update={"few_labels": True})
    run_plainly(domain.model_copy(update={"evaluation": evaluation}))
    found = metrics(domain)
    assert found["n_test"] == 3 and list(found["methods"]["latteclip"]["per_class"]) == ["0"]
    assert found["few_labels"]["top1"]["linear_probe"][0] == [1.0] * 5


def test_what_the_evaluation_says_adds_up(domain: Domain) -> None:
    run_plainly(domain)
    found = metrics(domain)
    assert found["format"] == 3
    score, zero_shot = found["methods"]["latteclip"], found["zero_shot"]["methods"][found["zero_shot"]["better"]]
    for label, own in score["per_class"].items():
        assert own["gain"] == pytest.approx(own["top1"] - zero_shot["per_class"][label]["top1"])
    assert sum(n for *_, n in found["confusion"]["latteclip"]) == 12
    wrong = {(i, j): n for i, j, n in found["confusion"]["latteclip"] if i != j}
    for pair in found["confused"]["latteclip"]:
        assert pair["n"] == wrong[pair["truth"], pair["answer"]] >= len(pair["keys"]) > 0
    test = score["mcnemar"]
    first = score["seeds"][0] - zero_shot["seeds"][0]
    assert test["only_adapted"] - test["only_zero_shot"] == pytest.approx(12 * first)
    for each in ("as_is", "matched"):
        assert sum(bin["n"] for bin in score["calibration"][each]["bins"]) == 24
    assert score["calibration"]["matched"]["confidence"] == pytest.approx(score["label_free"]["agreement"], abs=0.2)
    for by in {each["by"] for each in found["slices"]}:
        parts = [each for each in found["slices"] if each["by"] == by]
        assert sum(each["n"] for each in parts) == 12
        assert sum(each["n"] * each["top1"]["latteclip"] for each in parts) == pytest.approx(12 * score["top1"])
