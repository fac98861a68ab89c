"""Workers of ranges of shards that die, again and again, and whose shards are emptied meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.harness import Clean, Driver, Tally, commits, difference, repeated_parts, tree

from conftest import Domain
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import ShardSettings
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.ingest.embed import embed, embed_range, missing_features
from latteflow.tasks.ingest.shard import shard

pytestmark = pytest.mark.slow
KILLED = -9
RANGE = [0, 3]


@pytest.fixture(scope="module")
def trained() -> Iterator[Driver]:
    """Processes that have the model's libraries."""
    found = Driver("pipeline")
    yield found
    found.close()


@pytest.fixture
def file(domain: Domain, tmp_path: Path) -> Path:
    """A domain of five shards."""
    path = tmp_path / "domain.yaml"
    path.write_text(path.read_text().replace("{images: 10}", "{images: 5}"))
    return path


@pytest.fixture
def sharded(trained: Driver, file: Path, quick: Path) -> Path:
    """A store without features."""
    trained.finish(work="embed", domain=file, store=quick / "sharded", range=[0, 0])
    return quick / "sharded"


@pytest.fixture
def whole(trained: Driver, file: Path, sharded: Path, quick: Path) -> Clean:
    """What one process makes that knows of no workers, and the commits of a range."""
    shutil.copytree(sharded, quick / "whole")
    trained.finish(work="embed", domain=file, store=quick / "whole")
    shutil.copytree(sharded, quick / "range")
    trained.finish(work="embed", domain=file, store=quick / "range", range=RANGE, journal=quick / "range.journal")
    return Clean(tree(ObjectStore(str(quick / "whole"))), commits(quick / "range.journal").total())


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_worker_that_is_killed_twice(
    trained: Driver, file: Path, sharded: Path, whole: Clean, quick: Path, tally: Tally, moment: str
) -> None:
    assert whole.commits == 6  # the file and the record of each of three shards
    for commit in range(whole.commits):
        store, journal = quick / f"{commit}", quick / f"{commit}.journal"
        shutil.copytree(sharded, store)
        command = {"work": "embed", "domain": file, "store": store, "journal": journal}
        kills = 0
        for kill in ({"moment": moment, "commit": commit}, {"moment": "before", "commit": 0}):
            kills += trained.run(**command, range=RANGE, kill=kill)["statuses"] == [KILLED]
        assert kills == 2 or (kills, moment, commit) == (1, "after", whole.commits - 1)
        tally.inflicted["kill range"] += kills
        trained.finish(**command, range=RANGE)
        assert repeated_parts(journal) <= kills
        trained.finish(**command)
        assert difference(tree(ObjectStore(str(store))), whole.tree) == {}
        tally.survived["kill range"] += kills


def test_workers_side_by_side_on_one_range(
    trained: Driver, file: Path, sharded: Path, whole: Clean, tally: Tally
) -> None:
    tally.inflicted["workers"] += 3
    trained.finish(work="embed", domain=file, store=sharded, range=RANGE, workers=3)
    trained.finish(work="embed", domain=file, store=sharded)
    assert difference(tree(ObjectStore(str(sharded))), whole.tree) == {}
    tally.survived["workers"] += 3


def test_a_range_whose_images_are_gone_meanwhile(domain: Domain, tmp_path: Path) -> None:
    """The worker is given the shards of its run; a later run has none of the images of the first one."""
    domain = domain.model_copy(update={"shard": ShardSettings(images=5)})
    before = shard(domain, "train")
    for path in read_index(open_store(domain).open(before.ref), only=["shard-00000"])["path"]:
        (tmp_path / "train" / path).unlink()
    after = shard(domain, "train")
    assert after.counts["removed"] == 5
    shutil.copytree(domain.store, tmp_path / "plain")
    assert embed_range(domain, before, 0, 2) == {"images": 10}
    assert missing_features(domain, after) == missing_features(domain, before) == [0, 0, 5, 5, 4]
    pooled = embed(domain, after)
    plain = embed(domain.model_copy(update={"store": str(tmp_path / "plain")}), after)
    assert pooled.ref == plain.ref and pooled.counts["images"] == 19
    assert difference(*(tree(ObjectStore(str(store))) for store in (domain.store, tmp_path / "plain"))) == {}
