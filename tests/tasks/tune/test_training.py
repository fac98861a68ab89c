"""What surrounds the engine: a model that was cut goes on, in one process or several, and says how far it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from latteflow.flows.pipeline import run_plainly
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import told_as
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.tune.models import read_history, read_tuned
from latteflow.tasks.tune.training import Progress, StoredCheckpoint

pytestmark = pytest.mark.slow


def tuned(domain: Domain) -> StageResult:
    return {result.label: result for result in run_plainly(domain)}["tune"]


def told(domain: Domain, **training: Any) -> Domain:
    section = domain.training.model_copy(update=training)
    return domain.model_copy(update={"training": section, "seeds": [0]})


def checkpoints(domain: Domain) -> list[str]:
    return list(open_store(domain).objects.sizes(f"{domain.name}/tune/checkpoints/"))


def test_a_model_that_was_cut_goes_on(domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(told(domain.model_copy(update={"store": str(tmp_path / "other")})))
    domain = told(domain, checkpoint_s=0)
    writes = iter(range(100))
    write = StoredCheckpoint.write

    def cut(self: StoredCheckpoint, data: bytes) -> None:
        write(self, data)
        if next(writes) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoredCheckpoint, "write", cut)
    with pytest.raises(KeyboardInterrupt):
        run_plainly(domain)
    assert len(checkpoints(domain)) == 1
    steps: list[int] = []
    monkeypatch.setattr(Progress, "__call__", lambda self, done, total, stats: steps.append(done))
    found = tuned(domain)
    assert steps[0] == 3 and not checkpoints(domain)
    assert found.ref.digest == whole.ref.digest


def test_a_damaged_checkpoint_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = ObjectStore(str(tmp_path))
    kept = StoredCheckpoint(objects, "d/tune/checkpoints/x.safetensors")
    assert kept.read() is None
    kept.write(b"state")
    assert kept.read() == b"state"
    path = tmp_path / "d/tune/checkpoints/x.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert kept.read() is None and "begins anew" in caplog.text


def test_two_processes_make_the_model_of_one(domain: Domain, tmp_path: Path) -> None:
    alone = told(domain, tensorboard=True)
    first = tuned(alone)
    events = list((Path(domain.output) / domain.name / "tensorboard").glob("latteclip.seed-0/events.*"))
    assert len(events) == 1 and b"tuned_loss" in events[0].read_bytes()
    both = told(domain.model_copy(update={"store": str(tmp_path / "other")}), processes=2)
    second = tuned(both)
    one, two = (read_tuned(open_store(d).open(r.ref), "latteclip", 0) for d, r in ((alone, first), (both, second)))
    assert one.image_map is not None and two.image_map is not None
    assert abs(one.image_map - two.image_map).max() < 1e-6
    assert abs(one.prototypes - two.prototypes).max() < 1e-6
    histories = [read_history(open_store(d).open(r.ref), "latteclip", 0) for d, r in ((alone, first), (both, second))]
    assert histories[0][-1]["loss"] == pytest.approx(histories[1][-1]["loss"], rel=1e-5)


def test_progress_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 62.0, 63.0])
    monkeypatch.setattr("latteflow.tasks.core.progress.time.monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO)
    with told_as("tune"):
        progress = Progress("latteclip.seed-0", None)
        for done in (21, 50, 51):  # twenty steps were done before
            progress(done, 100, {"loss": 0.5})
    progress(52, 100, {"loss": 0.5})  # nobody's
    assert caplog.messages == ["tune latteclip.seed-0 50 of 100 steps, about 2 min left, loss 0.5000"]
