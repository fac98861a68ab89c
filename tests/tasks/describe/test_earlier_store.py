"""A store that the version before directories of keys wrote is read on: 12 images in 3 shards, texts in small parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import pytest

from latteflow.models.texts.describers import EngineStopped, Item, Kind, Text
from latteflow.storage.artifacts import ArtifactRef
from latteflow.storage.captions import CaptionStore
from latteflow.storage.errors import Damaged, StorageError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_labels
from latteflow.tasks.core.stage import StageResult, open_store, rules
from latteflow.tasks.describe.describe import describe, missing_texts, tidy_texts, write_range

HERE = Path(__file__).parent / "small_store"


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    """On a copy of the store. Its describer is gone, so that whoever asks it fails."""
    shutil.copytree(HERE / "store", tmp_path / "store")
    asked = {"kind": "openai", "url": "http://127.0.0.1:9", "model": "tiny", "revision": "1", "prompts": "caltech101"}
    return Domain.model_validate(
        {
            "name": "small", "source": str(tmp_path / "gone"), "classes": ["red", "green", "blue"],
            "clip": {"model": "gone", "resize": "pad", "centre": False}, "describer": {**asked, "patience_s": 0},
            "shard": {"images": 5}, "store": str(tmp_path / "store"), "output": str(tmp_path / "runs"),
        }
    )  # fmt: skip


@pytest.fixture
def made() -> dict[str, StageResult]:
    found = json.loads((HERE / "made.json").read_text())
    return {label.split()[0]: StageResult.of(ArtifactRef(**ref)) for label, ref in found.items()}


def test_nothing_is_missing_and_nothing_is_asked_again(domain: Domain, made: dict[str, StageResult]) -> None:
    groups = missing_texts(domain, made["shard"], made["embed"])
    assert sum(groups) < 12  # other images make a group now, but no image and not every group is asked about
    with rules(make=False):
        assert describe(domain, made["shard"], made["embed"]).ref == made["describe"].ref
    for compacted in (False, True):
        shutil.rmtree(Path(domain.store) / "small/describe")
        again = describe(domain, made["shard"], made["embed"])
        assert again.ref == made["describe"].ref and not again.cached
        if not compacted:
            captions = CaptionStore(open_store(domain).objects)
            assert [captions.compact(who) for who in captions.describers()] == [0, 1]
            tidy_texts(domain, made["embed"])
    assert missing_texts(domain, made["shard"], made["embed"]) == groups
    assert missing_texts(domain, made["shard"], made["embed"], 1, 2) == groups[1:2]


def test_a_part_that_broke_after_it_was_found_is_damage_and_not_an_empty_text(
    domain: Domain, made: dict[str, StageResult]
) -> None:
    captions = CaptionStore(open_store(domain).objects)
    groups = missing_texts(domain, made["shard"], made["embed"])
    for who in captions.describers():
        captions.compact(who)
        captions.add(who, captions.sample(who).head(1))
        captions.compact(who)  # into a part with a directory
    shutil.rmtree(Path(domain.store) / "small/describe")
    for part in Path(domain.store, "captions").glob("*/*.parquet"):
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match=r"texts of shard-0000. were in the caption store and are gone"):
        describe(domain, made["shard"], made["embed"])
    missing = missing_texts(domain, made["shard"], made["embed"])
    assert [each - of_groups for each, of_groups in zip(missing, groups, strict=True)] == [5, 5, 2]


class Dying:
    """A describer that gives two texts, one at a time, and dies."""

    engine = "fake"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def describe(self, kind: Kind, items: Sequence[Item]) -> Iterator[Mapping[int, Text]]:
        for place, item in enumerate(items[:2]):
            self.asked.append(f"{kind} {item.seed}")
            yield {place: Text("a shape")}
        if len(items) > 2:
            raise EngineStopped("it died")


def test_a_worker_of_a_range_that_dies_again_and_again_asks_for_each_text_once(
    domain: Domain, made: dict[str, StageResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(Path(domain.store) / "captions")
    describer, deaths = Dying(), 0
    monkeypatch.setattr("latteflow.tasks.describe.texts.open_describer", lambda *_, **__: describer)
    while True:
        try:
            assert write_range(domain, made["shard"], made["embed"], 0, 2) == {"class": 0, "image": 10, "group": 10}
            break
        except EngineStopped:
            deaths += 1
    assert deaths >= 2 and len(describer.asked) == len(set(describer.asked)) == 20
    assert missing_texts(domain, made["shard"], made["embed"]) == [0, 0, 4]


def test_a_range_whose_images_are_gone_meanwhile_has_no_texts(domain: Domain, made: dict[str, StageResult]) -> None:
    """The worker is given the artifacts of its run, and a later run those without the images."""
    shutil.rmtree(Path(domain.store) / "captions")
    store = open_store(domain)
    before = store.open(made["shard"].ref)
    writer = store.writer("small", "shard", 2, {**before.inputs, "images": "fewer"})
    for part in before.parts:
        writer.adopt(part)
    gone = read_index(before, only=["shard-00000"]).select("key", "path")
    twice = before.read("duplicates.parquet")
    writer.put("state", {"gone": 5}, {"removed.parquet": parquet(gone), "duplicates.parquet": twice})
    after = StageResult.of(writer.finish({"images": 7}).ref)
    labels = read_labels(store.open(made["embed"].ref)).filter(~pl.col("key").is_in(gone["key"].implode()))
    embed = store.writer("small", "embed", 2, {"shards": after.ref.digest})
    embed.put("zero_shot", {}, {"zero_shot.parquet": parquet(labels.drop("number"))})
    assert missing_texts(domain, after, StageResult.of(embed.finish().ref)) == [0, 10, 4]
    assert write_range(domain, after, StageResult.of(embed.finish().ref), 0, 1)["image"] == 0
    assert missing_texts(domain, made["shard"], made["embed"]) == [10, 10, 4]


def test_a_newer_manifest_is_an_error_that_names_its_version(domain: Domain, made: dict[str, StageResult]) -> None:
    ref = made["shard"].ref
    path = Path(domain.store) / ref.domain / ref.stage / ref.fingerprint / "manifest.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    record["format"] = 2
    path.write_bytes(canonical_json({**record, "sha256": sha256(canonical_json(record))}))
    with pytest.raises(StorageError, match=r"manifest.json has format 2 of a newer latteflow, this one reads 1: upgr"):
        missing_texts(domain, made["shard"], made["embed"])
    assert path.exists()
