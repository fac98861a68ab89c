"""Nights: what is new is taken in, a better model is served, a worse one is not, and a quiet night makes nothing."""

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from PIL import Image
from prefect.testing.utilities import prefect_test_harness

import latteflow.storage.lease
from conftest import draw_folder
from latteflow.flows.pipeline import run_plainly
from latteflow.flows.retune import Found, retune
from latteflow.flows.tidy import tidy
from latteflow.models.judge import selection
from latteflow.storage.artifacts import Artifact
from latteflow.storage.lease import lease
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.ship.nights import nights
from latteflow.tasks.ship.promote import champions, promote, read_champion, rollback
from latteflow.tasks.tune.select import Views

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def nightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Domain:
    """A domain whose models all pass for better than zero-shot, which is right about all of its images."""
    judged = selection.judge
    monkeypatch.setattr(selection, "judge", lambda *args: replace(judged(*args), accepted=True, reason="(in a test)"))
    draw_folder(tmp_path / "train", 48)
    (tmp_path / "domain.yaml").write_text(
        "name: night_shapes\nsource: train\nclasses: [red, green, blue]\n"
        "clip: {model: embedded, resize: pad, centre: true}\nmethod: transduction\nshard: {images: 10}\n"
        "store: store\noutput: runs\n"
    )
    return Domain.load(tmp_path / "domain.yaml")


def noise(folder: Path, count: int) -> None:
    for number in range(count):
        pixels = random.Random(number).randbytes(40 * 32 * 3)
        Image.frombytes("RGB", (40, 32), pixels).save(folder / f"poison{number:03d}.png")


def night(domain: Domain) -> tuple[str, Found]:
    state = retune(domain, return_state=True)
    return state.name, state.result()


def share_right(domain: Domain, tuned: Artifact) -> float:
    """Of the images that are no noise; their numbers say their classes."""
    history = History(open_store(domain), domain.name)
    images, features = (found.artifact for stage in ("shard", "embed") if (found := history.newest(stage, "train")))
    clean = dict(read_index(images).filter(~pl.col("path").str.contains("poison")).select("key", "path").iter_rows())
    views = Views(domain, images, features, set(clean))
    truth = [int(clean[key][-7:-4]) % 3 for key in views.keys]
    return float((views.logits(tuned, "transduction", None).argmax(1) == truth).mean())


def test_three_nights(server: None, nightly: Domain, tmp_path: Path) -> None:
    name, first = night(nightly)
    assert name == "Promoted" and first.new == 48 and first.decision.champion is None

    draw_folder(tmp_path / "train", 6, first=48)
    (tmp_path / "train" / "003.png").unlink()
    name, grown = night(nightly)
    assert name in ("Promoted", "Kept") and (grown.new, grown.removed, grown.retired) == (6, 1, 1)
    assert grown.decision.champion is not None
    store = open_store(nightly).objects
    records = [store.read(key) for key in store.sizes("night_shapes/embed/parts")]
    assert sum(b'"name":"shard-' in record for record in records) == 6  # five old shards and a new one, each once

    served = read_champion(nightly)
    begin = time.monotonic()
    name, quiet = night(nightly)
    assert time.monotonic() - begin < 30
    assert name == "Unchanged" and quiet.made == () and (quiet.new, quiet.removed) == (0, 0)
    assert read_champion(nightly) == served

    noise(tmp_path / "train", 90)
    name, poisoned = night(nightly)
    assert name == "Kept" and poisoned.new == 90 and not poisoned.decision.promote
    assert "with the champion" in poisoned.decision.reason and read_champion(nightly) == served
    told = nights(open_store(nightly), nightly.name)
    assert [each.state for each in told][2:] == ["Unchanged", "Kept"]
    assert [(each.images, each.new, each.removed) for each in told] == [
        (48, 48, 0),
        (53, 6, 1),
        (53, 0, 0),
        (143, 90, 0),
    ]
    assert told[-1].champion == served.version if served else False
    challenger = History(open_store(nightly), nightly.name).newest("tune")
    assert challenger is not None and served is not None
    assert share_right(nightly, challenger.artifact) < 0.5
    assert share_right(nightly, open_store(nightly).open(served.tuned)) > 0.9


def test_a_night_leaves_a_run_alone_and_does_not_pile_up(
    server: None, nightly: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latteflow.storage.lease, "BEAT_S", 0.1)
    with lease(open_store(nightly).objects, "night_shapes/lock", wait=False):
        state = retune(nightly, return_state=True)
    assert state.name == "Skipped" and "is at work on this" in state.message
    assert read_champion(nightly) is None


def test_a_night_that_fails_is_told_as_well(server: None, nightly: Domain, tmp_path: Path) -> None:
    for each in (tmp_path / "train").iterdir():
        each.unlink()
    assert retune(nightly, return_state=True).is_failed()
    (told,) = nights(open_store(nightly), nightly.name)
    assert told.state == "Failed" and "train" in told.why and told.champion == 0


def test_tidy_takes_what_is_old_and_leaves_what_is_served(
    server: None, nightly: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(nightly)
    served = read_champion(nightly)
    for count in (48, 54):
        draw_folder(tmp_path / "train", 6, first=count)
        run_plainly(nightly)
    store = open_store(nightly)
    before, texts = store.objects.sizes("night_shapes"), store.objects.sizes("captions")
    assert tidy(nightly, return_state=True).message.startswith("0 objects deleted")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86400)
    assert tidy(nightly, return_state=True).is_completed()
    after = store.objects.sizes("night_shapes")
    assert len(after) < len(before) and store.objects.sizes("captions").keys() == texts.keys()
    assert served is not None and store.open(served.tuned) and all(each.cached for each in run_plainly(nightly))
    assert len(nights(store, "night_shapes")) == 1


def test_a_rolled_back_model_is_not_chosen_again(nightly: Domain, tmp_path: Path) -> None:
    def tuned() -> list[StageResult]:
        found = {each.label: each for each in run_plainly(nightly)}
        return [found[name] for name in ("shard train", "embed train", "screen", "tune")]

    assert promote(nightly, *tuned()).promote
    first = read_champion(nightly)
    draw_folder(tmp_path / "train", 6, first=48)
    decision = promote(nightly, *tuned())
    assert decision.promote, decision.reason
    assert first is not None and rollback(nightly).tuned == first.tuned
    again = promote(nightly, *tuned())
    assert not again.promote and again.reason == "it was rolled back from"
    served = champions(open_store(nightly), nightly.name)
    assert [each.tuned == first.tuned for each in served] == [True, False, True]
    draw_folder(tmp_path / "train", 6, first=60)
    decision = promote(nightly, *tuned())
    assert decision.promote, decision.reason
    assert rollback(nightly).tuned == first.tuned
