"""Killed at any instant, a re-run ends with the same bytes and repeats at most the part in flight."""

import random
import re
import shutil
from pathlib import Path

import pytest
from faults.driver import MOMENTS, read_texts
from faults.harness import Clean, Driver, Tally, commits, difference, environment, repeated_parts, tree
from faults.seaweed import Seaweed, options

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.captions import CaptionStore
from latteflow.storage.inventory import Inventory
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import parquet, read_parquet
from latteflow.storage.upkeep import garbage
from latteflow.tasks.core.domain import Domain

pytestmark = pytest.mark.slow
KILLED = -9
RANDOM_KILLS = 50


def check(store: ObjectStore, clean: Clean, journal: Path, kills: int) -> None:
    """The same bytes, every image described once, and no part made more often than it was killed in."""
    assert difference(tree(store), clean.tree) == {}
    stored = [read_parquet(data) for key, data in tree(store).items() if key.startswith("captions/")]
    keys = [key for frame in stored for key in frame["caption_key"]]
    seen = [key for key, _ in read_texts(ArtifactStore(store), "shapes")]
    assert len(keys) == len(set(keys)) == 13  # the copy of a picture is described with it
    assert len(seen) == len(set(seen)) == 14
    assert repeated_parts(journal) <= kills
    created = [number for line, number in commits(journal).items() if line.startswith("put_if_absent ")]
    assert set(created) == {1}


@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_commit_point(
    driver: Driver, small: Path, clean: Clean, quick: Path, tally: Tally, moment: str
) -> None:
    kills = 0
    for commit in range(clean.commits):
        store, journal = quick / str(commit), quick / f"journal-{commit}"
        kill = {"moment": moment, "commit": commit}
        status = driver.run(work="storage", domain=small, store=store, journal=journal, kill=kill)["statuses"][0]
        if status == 0 and moment not in ("before", "after"):
            continue  # what may be replaced is not linked, what is deleted is not written
        assert status == KILLED
        kills += 1
        tally.inflicted["kill commit"] += 1
        driver.finish(work="storage", domain=small, store=store, journal=journal)
        check(ObjectStore(str(store)), clean, journal, kills=1)
        tally.survived["kill commit"] += 1
    assert kills >= 0.7 * clean.commits


def test_at_random_moments(driver: Driver, small: Path, clean: Clean, quick: Path, tally: Tally) -> None:
    dice = random.Random(20261122)
    done = 0
    for round_ in range(100):
        store, journal = quick / str(round_), quick / f"journal-{round_}"
        kills = 0
        for _ in range(dice.randint(1, 4)):  # a run that is killed again and again
            command = {"work": "storage", "domain": small, "store": store, "journal": journal}
            kills += driver.run(**command, seconds=dice.uniform(0.01, 0.3))["statuses"][0] == KILLED
        tally.inflicted["kill random"] += kills
        driver.finish(work="storage", domain=small, store=store, journal=journal)
        check(ObjectStore(str(store)), clean, journal, kills)
        tally.survived["kill random"] += kills
        done += kills
        if done >= RANDOM_KILLS:
            return
    pytest.fail(f"only {done} of {RANDOM_KILLS} kills met a running process")


@pytest.mark.parametrize("stage", ["shard", "describe"])
def test_while_a_stage_is_made_anew(driver: Driver, small: Path, quick: Path, tally: Tally, stage: str) -> None:
    """Until the new artifact is committed the old one is there, and whoever opened it goes on reading."""
    refresh = {"work": "storage", "domain": small, "refresh": [stage]}
    driver.finish(work="storage", domain=small, store=quick / "old")
    shutil.copytree(quick / "old", quick / "new")
    driver.finish(**refresh, store=quick / "new", journal=quick / "new.journal")
    old, new = contents(artifact(quick / "old", stage)), contents(artifact(quick / "new", stage))
    assert (old == new) == (stage == "shard")  # the other one gives other texts
    points = [
        (moment, commit)
        for moment in ("half", "written", "after")
        for commit in range(commits(quick / "new.journal").total())
    ]
    kills = 0
    for moment, commit in points:
        store, journal = quick / f"{moment}-{commit}", quick / f"{moment}-{commit}.journal"
        shutil.copytree(quick / "old", store)
        opened = artifact(store, stage)
        kill = {"moment": moment, "commit": commit}
        status = driver.run(**refresh, store=store, journal=journal, kill=kill)["statuses"][0]
        if status == 0 and moment != "after":
            continue  # what is deleted is not written
        assert status == KILLED
        kills += 1
        tally.inflicted["kill refresh"] += 1
        committed = f"put shapes/{stage}/{opened.fingerprint}/manifest.json" in commits(journal)
        assert contents(artifact(store, stage)) == (new if committed else old)
        driver.finish(**refresh, store=store, journal=journal)
        assert committed or repeated_parts(journal) <= 1
        assert difference(needed(store), needed(quick / "new")) == {}
        assert contents(opened) == old and contents(artifact(store, stage)) == new
        tally.survived["kill refresh"] += 1
    assert kills >= 0.6 * len(points)


def artifact(store: Path, stage: str) -> Artifact:
    (found,) = ArtifactStore(ObjectStore(str(store))).all("shapes", stage)
    return found


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.read(name) for name in artifact.files}


def needed(store: Path) -> dict[str, bytes]:
    """What stays when rubbish is removed, with the texts that readers see in the place of the parts they lie in."""
    objects = ObjectStore(str(store))
    inventory, captions = Inventory(ArtifactStore(objects), "shapes"), CaptionStore(objects)
    loose = {each.key for each in garbage(inventory, [made.artifact for made in inventory.all()], older_than=-60)}
    found = {key: data for key, data in tree(objects).items() if key not in loose and not key.startswith("captions/")}
    return found | {who: parquet(captions.scan(who).collect()) for who in captions.describers()}


def test_while_writing_to_s3(
    driver: Driver, small: Path, clean: Clean, seaweed: Seaweed, prefix: str, tmp_path: Path, tally: Tally
) -> None:
    dice = random.Random(3)
    env = environment(seaweed.port)
    for number in range(8):
        url, journal = f"{prefix}/{number}", tmp_path / f"journal-{number}"
        how = (
            {"kill": {"moment": dice.choice(["before", "after"]), "commit": dice.randrange(clean.commits)}}
            if number % 2
            else {"seconds": dice.uniform(0.2, 0.8)}
        )
        answer = driver.run(work="storage", domain=small, store=url, journal=journal, env=env, **how)
        kills = answer["statuses"].count(KILLED)
        tally.inflicted["kill s3"] += kills
        driver.finish(work="storage", domain=small, store=url, journal=journal, env=env)
        check(ObjectStore(url, **options(seaweed.port)), clean, journal, kills)
        tally.survived["kill s3"] += kills


def test_the_whole_pipeline(domain: Domain, tmp_path: Path, quick: Path, tally: Tally) -> None:
    dice = random.Random(7)
    pipeline = Driver("pipeline")
    command = {"work": "pipeline", "domain": tmp_path / "domain.yaml"}
    try:
        pipeline.finish(**command, store=quick / "clean", journal=quick / "clean.journal")
        count = commits(quick / "clean.journal").total()
        command |= {"store": quick / "store", "journal": quick / "journal"}
        for _ in range(5):  # one run after the other, each some commits further
            kill = {
                "moment": dice.choice(["before", "half", "written", "after"]),
                "commit": dice.randrange(2, count // 5),
            }
            assert pipeline.run(**command, kill=kill)["statuses"] == [KILLED]
            tally.inflicted["kill pipeline"] += 1
        pipeline.finish(**command)
        wanted = tree(ObjectStore(str(quick / "clean")))
        assert difference(tree(ObjectStore(str(quick / "store"))), wanted) == {}
        assert repeated_parts(quick / "journal") <= 5
        tally.survived["kill pipeline"] += 5
    finally:
        pipeline.close()


def test_leftovers_are_invisible_and_harmless(driver: Driver, small: Path, clean: Clean, quick: Path) -> None:
    for commit in range(0, clean.commits, 4):
        kill = {"moment": "half", "commit": commit}
        driver.run(work="storage", domain=small, store=quick / "store", kill=kill)
    left = list((quick / "store").rglob(".tmp-*"))
    assert left
    driver.finish(work="storage", domain=small, store=quick / "store")
    store = ObjectStore(str(quick / "store"))
    assert difference(tree(store), clean.tree) == {}
    assert all(re.search(r"/\.tmp-", f"/{path}") for path in left)
    assert not any(".tmp-" in key for key in store.sizes(""))
