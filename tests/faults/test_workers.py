"""Several processes on one stage at once: one artifact, every row once, whoever dies."""

import random
from pathlib import Path

import pytest
from faults.driver import read_texts
from faults.harness import Clean, Driver, Tally, commits, difference, environment, tree
from faults.seaweed import Seaweed, options

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.objects import ObjectStore

pytestmark = pytest.mark.slow


def check(store: ObjectStore, clean: Clean, journal: Path) -> None:
    """One artifact, the same as a single worker makes; each of its rows once; each object created by one of them."""
    assert difference(tree(store), clean.tree) == {}
    seen = [key for key, _ in read_texts(ArtifactStore(store), "shapes")]
    assert len(seen) == len(set(seen)) == 14
    created = [number for line, number in commits(journal).items() if line.startswith("put_if_absent ")]
    assert set(created) == {1}


@pytest.mark.parametrize("workers", [2, 4])
def test_on_a_folder(driver: Driver, small: Path, clean: Clean, tmp_path: Path, tally: Tally, workers: int) -> None:
    for round_ in range(3):
        store, journal = tmp_path / str(round_), tmp_path / f"journal-{round_}"
        tally.inflicted["workers"] += workers
        driver.finish(work="storage", domain=small, store=store, journal=journal, workers=workers)
        check(ObjectStore(str(store)), clean, journal)
        tally.survived["workers"] += workers


@pytest.mark.parametrize("workers", [2, 4])
def test_on_s3(
    driver: Driver,
    small: Path,
    clean: Clean,
    seaweed: Seaweed,
    prefix: str,
    tmp_path: Path,
    tally: Tally,
    workers: int,
) -> None:
    tally.inflicted["workers"] += workers
    env, journal = environment(seaweed.port), tmp_path / "journal"
    driver.finish(work="storage", domain=small, store=prefix, journal=journal, workers=workers, env=env)
    check(ObjectStore(prefix, **options(seaweed.port)), clean, journal)
    tally.survived["workers"] += workers


def test_some_are_killed_and_the_others_go_on(
    driver: Driver, small: Path, clean: Clean, quick: Path, tally: Tally
) -> None:
    dice = random.Random(4)
    for round_ in range(4):
        store, journal = quick / str(round_), quick / f"journal-{round_}"
        tally.inflicted["workers"] += 4
        # All four die after the same number of commits of their own, each at another place of the work.
        kill = {"moment": dice.choice(["before", "after"]), "commit": dice.randrange(2, clean.commits // 2)}
        killed = driver.run(work="storage", domain=small, store=store, journal=journal, workers=4, kill=kill)
        assert -9 in killed["statuses"]
        tally.inflicted["kill random"] += killed["statuses"].count(-9)
        driver.finish(work="storage", domain=small, store=store, journal=journal, workers=2)
        check(ObjectStore(str(store)), clean, journal)
        tally.survived["workers"] += 4
        tally.survived["kill random"] += killed["statuses"].count(-9)


def test_a_part_that_another_worker_just_made_is_taken_over(tmp_path: Path) -> None:
    store = ArtifactStore(ObjectStore(str(tmp_path)))
    early = store.writer("d", "stage", 1, {})  # knows the folder as it is now: empty
    store.writer("d", "stage", 1, {}).put("a", {}, {"a.bin": b"by another"})
    assert early.find("a", {}) is not None
    assert early.finish().read("a.bin") == b"by another"
