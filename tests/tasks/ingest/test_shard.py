"""shard: what a change of the domain file does to images that are packed or refused already."""

import shutil
from pathlib import Path

import pytest

from conftest import draw
from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_quarantine
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.ingest import shard as stage
from latteflow.tasks.ingest.shard import replay, shard


def changed(domain: Domain, **settings: object) -> Domain:
    return domain.model_copy(update={"shard": domain.shard.model_copy(update=settings)})


def opened(domain: Domain, result: StageResult) -> Artifact:
    return open_store(domain).open(result.ref)


def test_raised_limits_take_refused_images_up(domain: Domain, tmp_path: Path) -> None:
    draw(1, "red").resize((80, 64)).save(tmp_path / "train" / "large.png")
    strict = changed(domain, max_pixels=2000)
    assert shard(strict, "train").counts["quarantined"] == 1
    result = shard(domain, "train")
    assert (result.counts["quarantined"], result.counts["images"]) == (0, 25)
    assert "large.png" in read_index(opened(domain, result))["path"].to_list()
    assert shard(domain, "train").cached
    assert shard(strict, "train").counts["quarantined"] == 1  # and the old answer is still the old answer


def test_replay_needs_no_source(domain: Domain, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no shards of the train split yet"):
        replay(domain, "train")
    draw(1, "red").resize((80, 64)).save(tmp_path / "train" / "large.png")
    (tmp_path / "train" / "text.png").write_text("not a picture")
    strict = changed(domain, max_pixels=2000)
    shard(strict, "train")
    kept = shutil.copytree(tmp_path / "train", tmp_path / "kept", copy_function=shutil.copy2)
    shutil.rmtree(tmp_path / "train")
    assert replay(strict, "train").cached  # nothing was fixed
    result = replay(domain, "train")
    assert (result.counts["quarantined"], result.counts["images"]) == (1, 25)
    kept.rename(tmp_path / "train")
    again = shard(domain, "train")
    assert again.cached and again.ref == result.ref


def test_a_new_decoder_looks_at_what_the_old_one_refused(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train" / "text.png").write_text("not a picture")
    before = shard(domain, "train")
    monkeypatch.setattr(stage, "decoder_version", lambda: "pillow 99")
    after = shard(domain, "train")
    assert not after.cached and after.counts["quarantined"] == 1
    assert after.ref.digest == before.ref.digest  # nothing came of it, so nothing after it runs
    assert read_quarantine(opened(domain, after))["reason"].to_list() == ["not_an_image"]


def test_duplicates_are_dropped_from_training_only(domain: Domain, tmp_path: Path) -> None:
    for split in ("train", "test"):
        first = min((tmp_path / split).iterdir())
        shutil.copy(first, tmp_path / split / "copy.png")
    dropping = changed(domain, drop_duplicates=True)
    assert [shard(dropping, split).counts["images"] for split in ("train", "test")] == [24, 13]
    assert [shard(domain, split).counts["images"] for split in ("train", "test")] == [25, 13]
    assert shard(dropping, "train").counts["duplicates"] == 1
