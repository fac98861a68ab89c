"""Conditional creation, on a real folder and in memory."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from fsspec.spec import AbstractFileSystem
from s3fs.errors import translate_boto_error

from latteflow.storage.drivers import passing
from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.objects import ObjectStore


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_the_first_writer_wins(store: ObjectStore) -> None:
    assert store.put_if_absent("a/b.bin", b"first")
    assert not store.put_if_absent("a/b.bin", b"second")
    assert store.read("a/b.bin") == b"first"
    assert store.read("a/b.bin", 1, 3) == b"ir"


def test_a_store_proves_itself_and_is_as_before(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_if_absent("a", b"1")
    store.prove()
    assert list(store.listing("")) == ["a"]
    monkeypatch.setattr(ObjectStore, "put_if_absent", lambda self, key, data: self.put(key, data) is None)
    with pytest.raises(StorageError, match=r"let 5 of 5 writers create one object, so two workers could overwrite"):
        store.prove()
    assert list(store.listing("")) == ["a"]


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
    assert store.size("d/stage/data/deep/y") == 2 and store.exists("d/stage/data/x")
    assert store.size("d/none") is None and not store.exists("d/stage")


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


def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    old, ahead, running = ("0" * 32, "1" * 32, "2" * 32)
    ages = {old: -90_000, ahead: 10**9, running: -3_000, "of-somebody-else": -90_000}
    for name, age in ages.items():
        (tmp_path / "d" / f".tmp-{name}").write_bytes(b"half")
        os.utime(tmp_path / "d" / f".tmp-{name}", (time.time() + age,) * 2)
    (tmp_path / "d" / "old").write_bytes(b"whole")
    os.utime(tmp_path / "d" / "old", (0, 0))
    ObjectStore(str(tmp_path)).put_if_absent("d/x", b"1")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        f".tmp-{running}", ".tmp-of-somebody-else", "old", "x",
    ]  # fmt: skip


def test_a_folder_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"has no hard links .*single_writer: true"):
        ObjectStore(str(tmp_path)).put_if_absent("x", b"1")
    alone = ObjectStore(str(tmp_path), single_writer=True)
    assert alone.put_if_absent("x", b"1")
    assert not alone.put_if_absent("x", b"2")
    assert alone.read("x") == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_link_that_was_made_twice_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.link

    def over_nfs(*paths: Any) -> None:
        plain(*paths)  # the answer is lost, and the client asks again
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", over_nfs)
    store = ObjectStore(str(tmp_path))
    assert store.put_if_absent("x", b"1")
    assert not store.put_if_absent("x", b"1")


class Remote(AbstractFileSystem):
    """Objects elsewhere; ``failures`` are raised first, before the deed or, with ``late``, after it."""

    protocol = "remote"
    objects: dict[str, bytes]
    failures: list[Exception]
    late = False

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._fail()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        if not self.late:
            self._fail()
        self.objects[path] = value
        self._fail()

    def exists(self, path: str, **_: Any) -> bool:
        return path in self.objects


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Remote:
    fsspec.register_implementation("remote", Remote, clobber=True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    found = fsspec.filesystem("remote", use_listings_cache=False)
    found.objects, found.failures, found.late = {}, [], False
    return found


def answered(code: str, status: int) -> Exception:
    """An S3 server's refusal as s3fs raises it."""
    reply = {"Error": {"Code": code, "Message": "said so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(reply, "GetObject"))


PASSING = [
    ConnectionResetError("reset"),
    TimeoutError(),
    OSError(errno.EIO, "eh"),
    ReadTimeoutError(endpoint_url="http://x"),
    EndpointConnectionError(endpoint_url="http://x"),
    answered("SlowDown", 503),
    answered("InternalError", 500),
    answered("BadGateway", 502),
    answered("ConditionalRequestConflict", 409),
    answered("RequestTimeout", 400),
    answered("TooManyRequests", 429),
]
LASTING = [
    answered("AccessDenied", 403),
    answered("SignatureDoesNotMatch", 403),
    answered("NoSuchKey", 404),
    answered("PreconditionFailed", 412),
    answered("InvalidRequest", 400),
    answered("NotImplemented", 501),
    NoCredentialsError(),
    OSError(errno.ENOSPC, "full"),
    ValueError("ours"),
]


@pytest.mark.parametrize(
    ("error", "expected"), [*((error, True) for error in PASSING), *((error, False) for error in LASTING)], ids=str
)
def test_which_failures_pass_by_themselves(error: Exception, expected: bool) -> None:
    assert passing(error) is expected


def test_passing_failures_are_tried_again(remote: Remote) -> None:
    store = ObjectStore("remote://x", single_writer=True)
    remote.failures = list(PASSING)
    assert store.put_if_absent("key", b"1")
    remote.failures = list(PASSING)
    assert store.read("key") == b"1"
    assert remote.failures == []


def test_lasting_failures_are_said_at_once(remote: Remote) -> None:
    store = ObjectStore("remote://x", single_writer=True)
    for error, words in [
        (LASTING[0], r"access denied \(403 AccessDenied: said so\): check the credentials"),
        (LASTING[6], "NoCredentialsError: Unable to locate credentials"),
        (LASTING[7], "the disk is full"),
    ]:
        remote.failures = [error, ConnectionResetError("never seen")]
        with pytest.raises(StorageError, match=words):
            store.read("key")
        assert len(remote.failures) == 1
    remote.failures = [ValueError("a mistake of ours is not dressed up")]
    with pytest.raises(ValueError, match="ours"):
        store.read("key")


def test_patience_ends(remote: Remote) -> None:
    store = ObjectStore("remote://x", single_writer=True, patience=0)
    remote.failures = [ConnectionResetError("reset by peer")] * 9
    with pytest.raises(StorageError, match=r"cannot read .*reset by peer; tried for 0 s: check the server"):
        store.read("key")
    assert len(remote.failures) == 8


def test_a_create_that_was_carried_out_without_an_answer_is_ours(remote: Remote) -> None:
    store = ObjectStore("remote://x", single_writer=True)
    remote.late, remote.failures = True, [ConnectionResetError("after the deed")]
    assert store.put_if_absent("key", b"mine")
    assert not store.put_if_absent("key", b"yours")


def test_bytes_that_are_not_good_are_read_again(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("remote://x", single_writer=True)
    store.put_if_absent("key", b"whole")
    monkeypatch.setattr(Remote, "info", lambda self, path: {"size": len(self.objects[path]), "type": "file"})
    answers = [b"wh", b"who", b"whole"]
    monkeypatch.setattr(Remote, "cat_file", lambda *_, **__: answers.pop(0))
    assert store.read_sure("key", lambda data: data == b"whole") == (b"whole", True)
    monkeypatch.setattr(Remote, "cat_file", lambda *_, **__: b"wh")  # two reads agree, the size does not
    with pytest.raises(StorageError, match=r"read 5 times .*at last 2 bytes, of 5 in the store.*left alone"):
        store.read_sure("key", lambda data: data == b"whole")
    monkeypatch.setattr(Remote, "cat_file", lambda *_, **__: b"wHole")
    assert store.read_sure("key", lambda data: data == b"whole") == (b"wHole", False)


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


@pytest.mark.parametrize("below", [".", "store"])
def test_a_file_where_the_store_should_be_is_told(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is where a folder should be: choose another `store`"):
        ObjectStore(str(tmp_path / "file" / below)).put_if_absent("x", b"1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission denied"):
        ObjectStore(str(tmp_path)).put_if_absent("x", b"1")
