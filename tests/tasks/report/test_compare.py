"""Two runs side by side, on the tiny domain."""

import re
from pathlib import Path

import pytest

from conftest import call
from latteflow.flows.pipeline import run_plainly
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.report.compare import compare, page_of, read_run

pytestmark = pytest.mark.slow


@pytest.fixture
def file(domain: Domain, tmp_path: Path) -> Path:
    """The file of a domain that was run with two settings; the newest has the lower rate."""
    file = tmp_path / "domain.yaml"
    (tmp_path / "other.yaml").write_text(
        file.read_text().replace("epochs: 2", "epochs: 1, lr: 0.3").replace("seeds: [0, 1]", "seeds: [0]")
    )
    run_plainly(Domain.load(tmp_path / "other.yaml"))
    run_plainly(domain)
    return file


def test_two_runs_of_a_domain(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = file.parent / "store" / "shapes" / "evaluate"
    newest = read_run(str(file))
    old = next(p.name for p in store.iterdir() if len(p.name) == 64 and p.name != newest.scores.fingerprint)
    found = compare(read_run(f"{file}@{old[:10]}"), newest)
    assert found.n == found.labelled == 12 and found.top1 is not None and found.gain is not None
    assert found.gain.gain == pytest.approx(found.top1[1] - found.top1[0])
    assert found.gain.gain_interval[0] <= found.gain.gain <= found.gain.gain_interval[1]
    assert sum(row.n or 0 for row in found.per_class) == 12
    assert sum(found.counts.values()) == round(12 * (1 - found.agreement)) == len(found.changed)
    settings = {name: (one, other) for name, one, other in found.settings}
    assert settings["evaluate seeds"] == ("[0]", "[0, 1]")
    same = {label for label, one, other in found.lineage if one == other}
    assert {"shard train", "shard test", "embed train", "embed test"} <= same and "evaluate" not in same
    assert call("compare", f"{file}@{old[:10]}", file, "--out", file.parent / "compare.html") == 0
    said = capsys.readouterr().out
    assert "12 labelled of 12 shared images" in said and f"B        {newest.name}\n" in said
    assert newest.name == f"shapes, latteclip, evaluation {newest.scores.fingerprint[:12]}, by {file}"
    assert (file.parent / "compare.html").read_text() == page_of(found)


def test_two_methods_of_a_run(file: Path) -> None:
    plain, adapted = read_run(f"{file}:zero_shot_plain"), read_run(f"{file}:latteclip")
    found = compare(plain, adapted)
    assert found.top1 is not None
    for run, top1 in zip((plain, adapted), found.top1, strict=True):
        rows = run.answers.explode("labels")
        assert top1 == pytest.approx((rows["labels"] == rows["truth"]).mean())
    assert found.settings == [] and all(one == other for _, one, other in found.lineage)


def test_zero_shot_is_the_one_that_the_domain_keeps(file: Path) -> None:
    kept = read_run(f"{file}:zero_shot")
    assert kept.method == "zero_shot_plain"
    assert kept.answers.equals(read_run(f"{file}:zero_shot_plain").answers)


def test_a_file_may_be_called_like_a_method(file: Path) -> None:
    assert read_run(str(file.rename(file.with_name("own:zero_shot")))).method == "latteclip"


def test_what_cannot_be_compared_is_said(file: Path) -> None:
    with pytest.raises(DataError, match=r"A and B are both shapes, latteclip, .*, by .*; give FILE@FINGERPRINT"):
        compare(read_run(str(file)), read_run(f"{file}:latteclip"))
    with pytest.raises(DataError, match="no model by 'clamp' was evaluated; there are latteclip, zero_shot, "):
        read_run(f"{file}:clamp")
    with pytest.raises(DataError, match="no model by 'lateclip' was evaluated; did you mean latteclip"):
        read_run(f"{file}:lateclip")
    with pytest.raises(DataError, match="has no artifact 'evaluate/ffffffff'"):
        read_run(f"{file}@ffffffff")
    other = file.parent / "third.yaml"
    other.write_text(re.sub("name: shapes", "name: third", file.read_text()))
    with pytest.raises(DataError, match="was not evaluated yet; run it first"):
        read_run(str(other))


def test_without_labels_only_answers_are_compared(domain: Domain, tmp_path: Path) -> None:
    text = re.sub("evaluation: .*\n", "", (tmp_path / "domain.yaml").read_text())
    (tmp_path / "plain.yaml").write_text(text)
    run_plainly(Domain.load(tmp_path / "plain.yaml"))
    found = compare(read_run(f"{tmp_path}/plain.yaml:zero_shot_plain"), read_run(f"{tmp_path}/plain.yaml"))
    assert found.verdict == "unknown" and found.n == 24 and found.labelled == 0
    assert set(found.counts) <= {"other"} and "nobody can say here which is better" in page_of(found)
