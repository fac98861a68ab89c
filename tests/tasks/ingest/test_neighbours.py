"""A second tower in the stages: what it adds to `embed`, who reads it, and that nothing else is made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latteflow.flows.pipeline import run_plainly
from latteflow.flows.plan import plan
from latteflow.models.settings import NeighbourSettings
from latteflow.models.towers import neighbours
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_embeds, read_features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard
from latteflow.tasks.tune.inputs import Inputs, Stages


@pytest.fixture
def with_tower(domain: Domain, tiny_clip: Path) -> Domain:
    return domain.model_copy(update={"neighbours": NeighbourSettings(model=str(tiny_clip), resize="crop")})


def test_training_images_have_features_of_both_towers(domain: Domain, with_tower: Domain) -> None:
    store, images = open_store(domain), shard(domain, "train")
    before, made = (store.open(embed(each, images).ref) for each in (domain, with_tower))
    added = [name for name in made.files if name not in before.files]
    assert added == [f"shard-0000{number}.near.parquet" for number in range(3)]
    kept = [name for name in before.files if name.endswith(".features.parquet")]
    assert all(made.files[name][1] == before.files[name][1] for name in kept)  # taken, not made again

    found = read_features(made)
    theirs = np.concatenate([read_parquet(made.read(name))["feature"].to_numpy() for name in added])
    moved = theirs - theirs.mean(0)
    assert found.near_features == pytest.approx(moved / np.linalg.norm(moved, axis=1, keepdims=True), abs=1e-5)
    assert np.array_equal(np.asarray(read_embeds(made).near_features), found.near_features)
    assert np.array_equal(found.at(np.array([3, 5])).near_features, found.near_features[[3, 5]])
    assert read_features(before).near_features is None

    test = shard(domain, "test")
    assert embed(with_tower, test).ref == embed(domain, test).ref


def test_an_image_that_the_second_tower_cannot_take(with_tower: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = neighbours.read(with_tower.neighbours)
    seen = iter(range(100))

    class Picky:
        dim, image_embeds = tower.dim, tower.image_embeds

        def preprocess(self, image):
            if next(seen) == 4:
                raise OSError("cannot be taken")
            return tower.preprocess(image)

    monkeypatch.setattr(neighbours, "read", lambda settings: Picky())
    near = read_features(open_store(with_tower).open(embed(with_tower, shard(with_tower, "train")).ref)).near_features
    assert near.shape == (24, tower.dim)
    assert (~near.any(1)).sum() == 1
    assert np.linalg.norm(near[near.any(1)], axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_a_whole_run(with_tower: Domain) -> None:
    domain = with_tower.model_copy(update={"method": ["latteclip_plus", "transduction"]})
    made = {each.label: each for each in run_plainly(domain)}
    stages = Stages(made["shard train"], made["embed train"], made["screen"])
    given = Inputs(domain, stages).of(domain.methods[0])
    assert given.near_features.shape == (24, 32)
    assert given.take(np.array([1, 3])).near_features.equal(given.near_features[[1, 3]])
    assert made["report"].ref
    assert all(each.cached for each in run_plainly(domain))


@pytest.mark.slow
def test_a_plan_says_that_every_training_image_is_to_be_seen(domain: Domain, with_tower: Domain) -> None:
    run_plainly(domain)
    planned = {each.label: each for each in plan(with_tower)}
    assert planned["embed train"].work == 24
    assert "neighbours" in " ".join(planned["embed train"].reasons)
    assert not planned["embed test"].reasons
