"""The caption store: every text once, whoever wrote it how often, wherever it lies."""

import contextlib
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from latteflow.storage.errors import StorageError
from latteflow.storage.fingerprint import sha256
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import parquet, read_parquet

WHO = describer_id({"kind": "image", "model": "m", "revision": "1"})


def rows(texts: dict[str, str]) -> pl.DataFrame:
    made = [
        {
            "caption_key": caption_key(WHO, [image]), "kind": "image", "members": [image], "text": text, "flags": [],
            "finish_reason": "stop", "prompt_tokens": 3, "output_tokens": 4,
            "model": "m", "revision": "1", "prompt_id": "p",
        }
        for image, text in texts.items()
    ]  # fmt: skip
    return pl.DataFrame(made, schema=CAPTION_SCHEMA)


def texts(captions: CaptionStore, images: str) -> dict[str, str]:
    """Image -> visible text, each key checked to be there once."""
    found = captions.get(WHO, [caption_key(WHO, [image]) for image in images])
    assert found["caption_key"].is_unique().all()
    return dict(zip(found["members"].list.first(), found["text"], strict=True))


def parts(objects: ObjectStore) -> list[Path]:
    return sorted(Path(objects.path(f"captions/{WHO}")).glob("*.parquet"))


def directories(objects: ObjectStore) -> list[Path]:
    return sorted(Path(objects.path(f"captions/{WHO}")).glob("*.keys"))


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path))


def test_a_text_is_seen_once_however_often_it_was_written(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one", "b": "two"}))
    captions.add(WHO, rows({"b": "two", "a": "one"}))
    assert len(parts(objects)) == 1
    captions.add(WHO, rows({"b": "another worker said this", "c": "three"}))
    found = texts(captions, "abcd")
    assert found == {"a": "one", "b": "another worker said this", "c": "three"}
    assert texts(CaptionStore(objects), "abcd") == found


def test_two_describers_never_mix(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one"}))
    other = describer_id({"kind": "image", "model": "m", "revision": "2"})
    assert captions.get(other, [caption_key(other, ["a"]), caption_key(WHO, ["a"])]).height == 0


@given(st.lists(st.text(), min_size=1, max_size=4), st.text())
def test_a_key_is_of_content_order_and_question(members: list[str], prompt: str) -> None:
    key = caption_key(WHO, members, prompt)
    assert len(key) == 64
    assert key != caption_key(WHO, members, prompt + "?")
    assert key != caption_key(WHO, [*members, "x"], prompt)
    assert (key == caption_key(WHO, members[::-1], prompt)) == (members == members[::-1])


def test_an_error_is_asked_again_and_gives_way_to_a_text(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    keys = {image: caption_key(WHO, [image]) for image in "ab"}
    error = rows({"a": "", "b": ""}).with_columns(finish_reason=pl.lit("error"), detail=pl.lit("no memory"))
    captions.add(WHO, error)
    assert captions.known(WHO, keys.values()) == set()
    assert captions.get(WHO, keys.values())["detail"].to_list() == ["no memory"] * 2
    captions.add(WHO, rows({"a": "zebra"}))
    assert captions.known(WHO, keys.values()) == {keys["a"]}
    assert texts(captions, "ab") == {"a": "zebra", "b": ""}


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.dictionaries(any_text, any_text, min_size=1, max_size=8))
def test_any_text_comes_back(said: dict[str, str]) -> None:
    captions = CaptionStore(ObjectStore(f"memory://{uuid.uuid4()}"))
    captions.add(WHO, rows(said))
    found = captions.get(WHO, [caption_key(WHO, [image]) for image in said])
    assert dict(zip(found["members"].list.first(), found["text"], strict=True)) == said


class Killed(BaseException):
    pass


def compact_and_die(objects: ObjectStore, deletes: int) -> None:
    """A compaction that is killed after so many of its deletes."""
    left = [deletes]

    def delete(key: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        ObjectStore.delete(objects, key)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(objects, "delete", delete)
        CaptionStore(objects).compact(WHO)


said = st.dictionaries(st.sampled_from("abcdef"), any_text, min_size=1)
events = st.tuples(st.sampled_from(["add", "anew"]), said) | st.tuples(st.just("compact"), st.integers(0, 4))


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(events, max_size=10))
def test_any_history_shows_one_row_for_each_key(history: list[tuple[str, Any]]) -> None:
    """Against a dictionary: additions by racing workers, texts asked for anew, compactions killed half-way."""
    objects = ObjectStore(f"memory://{uuid.uuid4()}")
    captions = CaptionStore(objects)
    stored: dict[str, list[tuple[int, str]]] = {}
    for what, value in history:
        if what == "compact":
            compact_and_die(objects, deletes=value)
        else:
            captions.add(WHO, rows(value), anew=what == "anew")
            if what == "anew":
                newest = max((-order for image in value for order, _ in stored.get(image, [])), default=-1) + 1
            else:
                newest = 0
            for image, text in value.items():
                stored.setdefault(image, []).append((-newest, text))
        expected = {image: min(each)[1] for image, each in stored.items()}
        assert texts(captions, "abcdef") == texts(CaptionStore(objects), "abcdef") == expected


def test_compaction_leaves_one_part_and_every_text(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    for number, image in enumerate("abcdef"):
        captions.add(WHO, rows({image: f"text {number}", "a": "zero"}))
    before = texts(captions, "abcdef")
    assert captions.compact(WHO) == 5
    assert len(parts(objects)) == 1
    assert texts(captions, "abcdef") == texts(CaptionStore(objects), "abcdef") == before
    assert read_parquet(parts(objects)[0].read_bytes())["caption_key"].is_unique().all()
    assert captions.compact(WHO) == 0


@pytest.mark.parametrize("moment", ["put_if_absent", "delete"])
@pytest.mark.parametrize("deed", range(6))
def test_a_compaction_that_is_killed_loses_nothing(objects: ObjectStore, moment: str, deed: int) -> None:
    """Killed before each of its deeds: the directory, the part, every deletion; the next compaction ends it."""
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "error"}).with_columns(finish_reason=pl.lit("error")))
    for number, image in enumerate("bcdef"):
        captions.add(WHO, rows({image: f"text {number}"}))
    before, keys = texts(captions, "abcdef"), [caption_key(WHO, [image]) for image in "abcdef"]
    deeds = iter(range(100))

    def killed(key: str, *data: Any) -> Any:
        if next(deeds) == deed:
            raise Killed
        return getattr(ObjectStore, moment)(objects, key, *data)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(objects, moment, killed)
        CaptionStore(objects).compact(WHO)
    for reader in (captions, CaptionStore(objects)):
        assert texts(reader, "abcdef") == before
        assert reader.known(WHO, keys) == set(keys[1:]) and reader.known(WHO, keys, failed=True) == set(keys)
    CaptionStore(objects).compact(WHO)
    assert texts(CaptionStore(objects), "abcdef") == before
    assert len(parts(objects)) == len(directories(objects)) == 1


def test_what_is_there_is_told_by_directories_alone(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    for image in "abcd":
        captions.add(WHO, rows({image: "one"}))
    captions.compact(WHO)
    (part,) = parts(objects)
    part.write_bytes(b"nobody reads this")
    keys = [caption_key(WHO, [image]) for image in "ax"]
    assert CaptionStore(objects).known(WHO, keys) == {keys[0]}
    assert CaptionStore(objects).get(WHO, keys[1:]).height == 0 and part.exists()


@pytest.mark.parametrize("damage", [b"", b"something else"])
def test_a_damaged_directory_is_only_a_longer_way(objects: ObjectStore, damage: bytes) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one"}))
    captions.add(WHO, rows({"b": "two"}))
    captions.compact(WHO)
    (directory,) = directories(objects)
    directory.write_bytes(damage)
    keys = [caption_key(WHO, [image]) for image in "abc"]
    assert CaptionStore(objects).known(WHO, keys) == set(keys[:2]) and not directory.exists()
    assert texts(CaptionStore(objects), "abc") == {"a": "one", "b": "two"}
    assert CaptionStore(objects).verify(WHO) == []


def test_workers_merge_what_they_added_and_a_run_merges_the_rest(objects: ObjectStore) -> None:
    """A store with many small parts, as earlier versions and killed workers left them."""
    said = {f"{number}": f"text {number}" for number in range(100)}
    one, another = CaptionStore(objects), CaptionStore(objects)
    for image, text in said.items():
        (one if int(image) < 90 else another).add(WHO, rows({image: text}))
    another.settle(WHO)
    assert len(parts(objects)) == 100  # ten are not many
    one.settle(WHO)
    assert len(parts(objects)) == 11 and len(directories(objects)) == 1
    for image, text in said.items():
        CaptionStore(objects).add(WHO, rows({image: text}))
    one.tidy(WHO)
    assert len(parts(objects)) == len(directories(objects)) == 1
    found = CaptionStore(objects).scan(WHO).select(pl.col("members").list.first(), "text").collect()
    assert dict(found.iter_rows()) == said


def test_readers_see_every_text_while_it_is_compacted(objects: ObjectStore) -> None:
    """A reader loops while a writer adds small parts and compacts them away under its hands."""
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(40):
                CaptionStore(objects).add(WHO, rows({f"new {number}": "x"}))
                CaptionStore(objects).compact(WHO)
        finally:
            done.set()

    CaptionStore(objects).add(WHO, rows({"a": "one", "b": "two"}))
    writer = threading.Thread(target=write)
    writer.start()
    reader, reads = CaptionStore(objects), 0
    while not done.is_set():
        assert texts(reader, "ab") == {"a": "one", "b": "two"}
        reads += 1
    writer.join()
    assert reads > 0
    assert len(parts(objects)) == 1


def test_an_artifact_of_long_ago_reads_its_own_texts(objects: ObjectStore) -> None:
    captions, artifacts = CaptionStore(objects), ArtifactStore(objects)
    refs = []
    for text in ("as it was", "asked anew"):
        captions.add(WHO, rows({"a": text}), anew=True)
        writer = artifacts.writer("d", "describe", 1, {"text": text})
        writer.put("s", {"text": text}, {"captions.parquet": parquet(captions.get(WHO, [caption_key(WHO, ["a"])]))})
        refs.append(writer.finish().ref)
    captions.compact(WHO)
    told = [read_parquet(artifacts.open(ref).read("captions.parquet"))["text"].item() for ref in refs]
    assert told == ["as it was", "asked anew"]
    assert texts(captions, "a") == {"a": "asked anew"}


@pytest.mark.parametrize("version", [1, 2])
def test_parts_of_the_versions_before_are_read(objects: ObjectStore, version: int) -> None:
    table = rows({"a": "old", "b": "old"}).drop("prompt", "sampling", "engine", "detail")
    data = parquet(table if version == 1 else table.with_columns(generation=pl.lit(0, pl.Int32)))
    objects.put(f"captions/{WHO}/{sha256(data)[:32]}{'' if version == 1 else '.v2'}.parquet", data)
    captions = CaptionStore(objects)
    assert texts(captions, "ab") == {"a": "old", "b": "old"}
    captions.add(WHO, rows({"b": "newer"}), anew=True)
    assert texts(captions, "ab") == {"a": "old", "b": "newer"}
    assert dict(captions.scan(WHO).select("text", "caption_key").collect().iter_rows()).keys() == {"old", "newer"}
    assert captions.compact(WHO) == 1
    assert texts(captions, "ab") == {"a": "old", "b": "newer"}


def test_a_store_with_a_directory_is_read_on(tmp_path: Path) -> None:
    """Written when directories were version 3's: a compacted part, its directory, and a later part without one."""
    shutil.copytree(Path(__file__).parent / "compacted_store", tmp_path / "store")
    objects = ObjectStore(str(tmp_path / "store"))
    keys = {image: caption_key(WHO, [image]) for image in "abcdefg"}
    said = {"a": "text a anew", "b": "text b", "c": "text c anew", "d": "text d", "e": "", "f": "text f"}
    assert len(parts(objects)) == 2 and len(directories(objects)) == 1
    for _ in range(2):
        captions = CaptionStore(objects)
        assert texts(captions, "abcdefg") == said
        assert captions.known(WHO, keys.values()) == {keys[image] for image in "abcdf"}
        assert captions.known(WHO, keys.values(), failed=True) == {keys[image] for image in "abcdef"}
        captions.compact(WHO)
        assert len(parts(objects)) == len(directories(objects)) == 1


def test_a_newer_schema_is_an_error_and_not_an_empty_store(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one"}))
    part = parts(objects)[0]
    part.rename(part.with_name(part.name.replace(".v3.", ".v4.")))
    for act in (lambda: texts(captions, "a"), lambda: captions.scan(WHO), lambda: captions.compact(WHO)):
        with pytest.raises(StorageError, match="has caption schema 4, this latteflow reads 1 to 3: upgrade"):
            act()


def test_a_damaged_part_is_set_aside_and_its_texts_are_asked_for_again(objects: ObjectStore) -> None:
    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "one"}))
    captions.add(WHO, rows({"b": "two"}))
    for part in parts(objects):
        if "one" in read_parquet(part.read_bytes())["text"].to_list():
            part.write_bytes(part.read_bytes()[:-9] + bytes(9))
    assert texts(CaptionStore(objects), "ab") == {"b": "two"}
    assert len(parts(objects)) == len(objects.names("captions/damaged")) == 1
    captions.add(WHO, rows({"a": "one"}))
    assert texts(captions, "ab") == {"a": "one", "b": "two"}


def test_a_part_that_lost_its_tail_is_written_again(objects: ObjectStore) -> None:
    CaptionStore(objects).add(WHO, rows({"a": "one"}))
    part = parts(objects)[0]
    part.write_bytes(part.read_bytes()[:20])
    CaptionStore(objects).add(WHO, rows({"a": "one"}))
    assert texts(CaptionStore(objects), "a") == {"a": "one"}


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    captions = CaptionStore(ObjectStore(str(tmp_path / "what[1]*?")))
    captions.add(WHO, rows({"a": "one"}))
    assert captions.scan(WHO).collect()["text"].to_list() == ["one"]


@pytest.mark.parametrize("compacted", [False, True])
def test_parts_are_plain_parquet(objects: ObjectStore, compacted: bool) -> None:
    """polars lazily, DuckDB and pandas read the folder without latteflow."""
    import duckdb
    import pandas as pd

    captions = CaptionStore(objects)
    captions.add(WHO, rows({"a": "ünï", "b": "two"}))
    captions.add(WHO, rows({"c": "three"}))
    if compacted:
        captions.compact(WHO)
    folder = objects.path("captions")
    expected = {"ünï", "two", "three"}
    lazy = captions.scan(WHO)
    assert isinstance(lazy, pl.LazyFrame)
    assert set(lazy.filter(pl.col("output_tokens") == 4).select("text").collect()["text"]) == expected
    assert set(pl.scan_parquet(f"{folder}/*/*.parquet").select("text").collect()["text"]) == expected
    query = f"select text, members from read_parquet('{folder}/*/*.parquet', union_by_name = true)"
    assert {text for text, _ in duckdb.sql(query).fetchall()} == expected
    assert set(pd.concat(pd.read_parquet(part) for part in parts(objects))["text"]) == expected
