"""gc and verify: what goes, in which order, and what is found broken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.captions import CaptionStore
from latteflow.storage.inventory import Inventory
from latteflow.storage.lease import holder
from latteflow.storage.objects import ObjectStore, Stored
from latteflow.storage.upkeep import Loose, garbage, leftovers, verify

DAY = 86400.0
HALF = f".tmp-{'0' * 32}"
"""The name of a write that was not finished."""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(ObjectStore(str(tmp_path)))


def make(store: ArtifactStore, stage: str, inputs: dict[str, object], **parts: bytes) -> Artifact:
    writer = store.writer("d", stage, 1, inputs)
    put(writer, **parts)
    return writer.finish()


def put(writer: ArtifactWriter, **parts: bytes) -> None:
    for name, data in parts.items():
        if writer.find(name, {"content": data.decode()}) is None:
            writer.put(name, {"content": data.decode()}, {f"{name}.bin": data})


def chain(store: ArtifactStore, number: int) -> tuple[Artifact, Artifact]:
    """Two stages; runs share part ``a`` of the first."""
    first = make(store, "first", {"n": number}, a=b"same", b=b"%d" % number)
    return first, make(store, "last", {"first": first.ref.digest}, x=b"of %d" % number)


def age(store: ArtifactStore, days: float, under: str = "d") -> None:
    then = time.time() - days * DAY
    for path in Path(store.objects.path(under)).rglob("*"):
        os.utime(path, (then, then))


def loose(store: ArtifactStore, *roots: Artifact, older_than: float = DAY) -> list[Loose]:
    return garbage(Inventory(store, "d"), roots, older_than)


def test_what_the_roots_were_made_from_is_kept_and_the_rest_goes(store: ArtifactStore) -> None:
    old, new = chain(store, 1), chain(store, 2)
    age(store, 2)
    going = loose(store, new[1])
    assert [each.kind for each in going] == ["artifact"] * 2 + ["part"] * 2 + ["file"] * 2
    for each in going:
        store.objects.delete(each.key)
    assert [store.load("d", each.stage, each.fingerprint) for each in old] == [None, None]
    assert [store.open(each.ref).ref for each in new] == [each.ref for each in new]
    assert store.open(new[0].ref).read("a.bin") == b"same"
    assert loose(store, new[1]) == []


def test_nothing_young_goes_nor_what_it_was_made_from(store: ArtifactStore) -> None:
    first = make(store, "first", {"n": 1}, a=b"1")
    age(store, 2)
    make(store, "last", {"first": first.ref.digest}, x=b"2")
    assert loose(store) == []
    assert {each.key.split("/")[1] for each in loose(store, older_than=0)} == {"first", "last"}


def test_old_bytes_of_a_part_that_was_just_finished_stay(store: ArtifactStore) -> None:
    make(store, "first", {"n": 1}, a=b"1")
    age(store, 2)
    store.writer("d", "first", 1, {"n": 2}).put("b", {}, {"a.bin": b"1"})  # the same content, not written again
    assert [each.kind for each in loose(store)] == ["artifact", "part"]


@pytest.mark.parametrize("deleted", range(7))
def test_killed_at_any_deletion_what_is_visible_is_whole(store: ArtifactStore, deleted: int) -> None:
    _, new = chain(store, 1), chain(store, 2)
    age(store, 2)
    for each in loose(store, new[1])[:deleted]:
        store.objects.delete(each.key)
    for made in Inventory(store, "d").all():
        assert all(made.artifact.read(name) for name in made.artifact.files)
    put(writer := store.writer("d", "first", 1, {"n": 1}), a=b"same", b=b"1")
    assert writer.finish().read("b.bin") == b"1"


def test_what_killed_processes_left_goes_when_it_is_old(store: ArtifactStore) -> None:
    _, last = chain(store, 1)
    store.writer("d", "first", 1, {"n": 9}).put("c", {}, {"c.bin": b"orphan"})
    places = [Path(store.objects.path(f"{folder}/{HALF}")) for folder in ("d/first/data", "captions/x")]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    store.objects.put(f"captions/damaged/{'0' * 12}-y.parquet", b"bad")
    assert loose(store, last) == leftovers(store, DAY) == []
    age(store, 2, under="")
    assert [each.kind for each in loose(store, last)] == ["part", "file", "unfinished"]
    found = [each.key for each in leftovers(store, DAY)]
    assert found == [f"captions/damaged/{'0' * 12}-y.parquet", f"captions/x/{HALF}"]


def test_what_others_put_into_a_store_is_none_of_its_business(store: ArtifactStore) -> None:
    chain(store, 1)
    theirs = [
        "top.txt", "photos/a.jpg", "photos/data/b.jpg", "photos/birds/data/c.jpg", "d/notes.txt", "d/first/notes.txt",
        "d/first/data/my.jpg", "d/first/parts/list.json", "d/first/damaged/car.jpg", "d/first/.tmp-mine",
        f"d/first/{'0' * 64}/photo.jpg", "d/data/x/y.bin", "captions/damaged/book.txt", "captions/x/.tmp-mine",
    ]  # fmt: skip
    for key in theirs:
        path = Path(store.objects.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    age(store, 2, under="")
    going = [*loose(store), *leftovers(store, DAY)]
    assert going and not {each.key for each in going} & set(theirs)
    assert not {each for name in ("photos", "top.txt") for each in Inventory(store, name).objects}
    assert verify(Inventory(store, "d")) == []
    store.writer("d", "first", 1, {}).put("a", {}, {"a.bin": b"1"})  # and sweeps its folders
    assert all(Path(store.objects.path(key)).read_bytes() == b"mine" for key in theirs)


def test_a_stage_is_under_way_while_it_writes(store: ArtifactStore) -> None:
    store.objects.put(f"d/first/{'0' * 64}/running.json", b"{}")
    assert Inventory(store, "d").under_way(DAY) == ["first"]
    age(store, 2)
    assert Inventory(store, "d").under_way(DAY) == []
    store.writer("d", "first", 1, {}).put("a", {}, {"a.bin": b"a long run, and still at work"})
    assert Inventory(store, "d").under_way(DAY) == ["first"]


def test_a_stage_whose_process_is_dead_is_not_under_way(store: ArtifactStore) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, expected in ((os.getpid(), ["first"]), (ended.pid, [])):
        store.objects.put(f"d/first/{'0' * 64}/running.json", json.dumps({**holder(), "pid": pid}).encode())
        assert Inventory(store, "d").under_way(DAY) == expected


def test_ages_are_known_in_memory_too() -> None:
    objects = ObjectStore("memory://ages")
    objects.put("d/a", b"12")
    found = objects.listing("d")
    assert found.keys() == {"d/a"} and found["d/a"].bytes == 2
    assert abs(found["d/a"].modified - time.time()) < 60
    assert objects.listing("nowhere") == {} and isinstance(found["d/a"], Stored)


def broken(store: ArtifactStore, pattern: str) -> Path:
    path = next(Path(store.objects.path("d/first")).glob(pattern))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return path


@pytest.mark.parametrize("pattern", ["data/b.*", "parts/*", "*/manifest.json"])
def test_a_flipped_byte_is_found_set_aside_and_made_again(store: ArtifactStore, pattern: str) -> None:
    first, _ = chain(store, 1)
    assert verify(Inventory(store, "d")) == []
    path = broken(store, pattern)
    lines = verify(Inventory(store, "d"))
    assert len(lines) == 1 and str(path) in lines[0] and "d/first/damaged" in lines[0]
    assert not path.exists() and len(store.objects.names("d/first/damaged")) == 1
    assert verify(Inventory(store, "d")) in ([], [f"{path} is missing"])
    assert chain(store, 1)[0].ref == first.ref
    assert verify(Inventory(store, "d")) == []


def test_bytes_that_no_record_names_are_verified_by_their_name(store: ArtifactStore) -> None:
    store.writer("d", "first", 1, {}).put("a", {}, {"a.bin": b"1"})
    for record in store.objects.names("d/first/parts"):
        store.objects.delete(f"d/first/parts/{record}")
    assert verify(Inventory(store, "d")) == []
    broken(store, "data/*")
    assert len(verify(Inventory(store, "d"))) == 1
    assert make(store, "first", {}, a=b"1").read("a.bin") == b"1"


def test_verify_tells_how_far_it_is(store: ArtifactStore) -> None:
    chain(store, 1)
    read: list[int] = []
    verify(Inventory(store, "d"), read.append)
    assert sum(read) == len(b"same" + b"1" + b"of 1")


def test_captions_are_no_domain(store: ArtifactStore) -> None:
    from latteflow.storage.inventory import domains

    chain(store, 1)
    store.objects.put("captions/x/y.parquet", b"")
    assert domains(store.objects) == ["d"]
    assert CaptionStore(store.objects).describers() == []
