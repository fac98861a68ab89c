"""Conditional creation, on a real folder and in memory."""

import os
import threading
from pathlib import Path

import pytest

from storage.errors import NotFound, StorageError
from storage.objects import ObjectStore


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_the_first_writer_wins(store: ObjectStore) -> None:
    assert store.put_if_absent("a/b.bin", b"first")
    assert not store.put_if_absent("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"first"
    assert store.read("a/b.bin", 1, 3) == b"ir"


def test_a_file_is_put_like_bytes(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 3_000_000)
    assert store.put_if_absent("big", tmp_path / "source")
    assert store.sizes("") == {"big": 3_000_000}


def test_listing_is_relative_and_misses_are_said(store: ObjectStore) -> None:
    store.put_if_absent("d/stage/data/x", b"1")
    store.put_if_absent("d/stage/data/deep/y", b"22")
    assert store.sizes("d/stage") == {"d/stage/data/x": 1, "d/stage/data/deep/y": 2}
    assert store.names("d/stage/data") == ["deep", "x"]
    assert store.sizes("nothing") == {}
    assert store.names("nothing") == []
    with pytest.raises(NotFound, match="d/none"):
        store.read("d/none")


def test_of_many_threads_one_creates(store: ObjectStore) -> None:
    created: list[int] = []
    barrier = threading.Barrier(16)

    def write(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("same", str(number).encode() * 1000):
            created.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert store.read("same") == str(created[0]).encode() * 1000


def test_unfinished_writes_are_invisible(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    store.put_if_absent("d/x", b"1")
    (tmp_path / "d" / ".tmp-deadbeef").write_bytes(b"half")
    assert store.sizes("d") == {"d/x": 1}
    assert store.names("d") == ["x"]


def test_a_file_system_without_atomic_create_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no atomic create.*single_writer"):
        ObjectStore("http://127.0.0.1/store")
    with pytest.raises(StorageError, match="bogus"):
        ObjectStore("bogus://x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store = ObjectStore(str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"disk is full.*finished parts are kept"):
        store.put_if_absent("x", b"1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        ObjectStore(str(tmp_path)).put_if_absent("x", b"1")
