"""A bucket behind a bad network: each object created once, read whole, never distrusted for the network's sake."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faults.harness import Clean, Driver, Tally, difference, environment, tree
from faults.proxy import STALL_SECONDS, FaultProxy, first, randomly
from faults.seaweed import BUCKET, Seaweed, options

import latteflow.storage.objects
from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.errors import Damaged, NotFound, StorageError
from latteflow.storage.objects import ObjectStore

pytestmark = pytest.mark.slow
STORM = {
    "drop": 0.05,
    "lost": 0.05,
    "cut": 0.04,
    "500": 0.05,
    "503": 0.05,
    "truncate": 0.05,
    "short": 0.02,
    "mangle": 0.02,
}
BLIND = {"config_kwargs": {"response_checksum_validation": "when_required"}}
"""A client, or a server, that does not compare checksums of its own."""


@pytest.fixture
def store(proxy: FaultProxy, prefix: str) -> ObjectStore:
    """Behind the proxy, after its first write."""
    found = ObjectStore(prefix, **options(proxy.port))
    assert found.put_if_absent("first", b"1")
    return found


def together(calls: int, call: Any) -> list[Any]:
    """Results of ``call(number)`` from as many threads that start at once."""
    barrier = threading.Barrier(calls)

    def wait(number: int) -> Any:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(calls) as pool:
        return list(pool.map(wait, range(calls)))


@pytest.mark.parametrize("fault", ["drop", "lost", "cut", "500", "503", "stall"])
def test_a_create_survives(store: ObjectStore, proxy: FaultProxy, fault: str) -> None:
    proxy.script = first([fault, fault], method="PUT", path="/mine")
    assert store.put_if_absent("mine", b"x" * 50_000)
    proxy.script = first([fault], method="PUT", path="/mine")
    assert not store.put_if_absent("mine", b"y" * 50_000)
    assert store.read("mine") == b"x" * 50_000
    assert proxy.injected[fault] == 3 - (fault == "stall")  # which is no failure, so that there is no second try


@pytest.mark.parametrize("fault", ["drop", "lost", "500", "503", "truncate", "stall"])
def test_a_read_survives(store: ObjectStore, proxy: FaultProxy, tmp_path: Path, fault: str) -> None:
    store.put_if_absent("mine", b"x" * 50_000)
    for read in (store.read, lambda key: store.fetch(key, tmp_path).read_bytes()):
        proxy.script = first([fault], method="GET", path="/mine")
        assert read("mine") == b"x" * 50_000
    assert proxy.injected[fault] == 2


@pytest.mark.parametrize("fault", ["drop", "lost", "500", "503", "truncate"])
def test_listing_and_deleting_survive(store: ObjectStore, proxy: FaultProxy, fault: str) -> None:
    store.put_if_absent("a/mine", b"x")
    proxy.script = first([fault], method="GET", path="list-type=2")
    assert store.sizes("") == {"first": 1, "a/mine": 1}
    proxy.script = first([fault], method="GET", path="list-type=2")
    assert store.names("") == ["a", "first"]
    proxy.script = first([fault], method="HEAD")
    assert store.exists("a/mine") and not store.exists("a/none")
    proxy.script = first([fault], method="DELETE")
    store.delete("a/mine")
    store.delete("a/mine")
    assert not store.exists("a/mine")


def test_a_create_without_an_answer_is_known_as_our_own(store: ObjectStore, proxy: FaultProxy) -> None:
    # The HTTP library repeats a PUT unasked, and the repetition is refused because of our own object.
    proxy.script = first(["lost"], method="PUT")
    assert store.put_if_absent("record", b"mine")
    assert [request.method for request in proxy.seen[-3:]] == ["PUT", "PUT", "HEAD"]
    # The same bytes of another writer are still another writer's.
    other = ObjectStore(store.url, **options(proxy.port))
    proxy.script = first(["lost"], method="PUT")
    assert not other.put_if_absent("record", b"mine")


def test_a_storm(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.script = randomly(5, STORM)
    blocks = {f"part-{number}": random.Random(number).randbytes(20_000) for number in range(60)}

    def work(worker: int) -> list[str]:
        mine = [key for number, key in enumerate(blocks) if number % 3 == worker]
        for key in mine:
            assert store.put_if_absent(key, blocks[key])
            assert store.read(key) == blocks[key]
            assert not store.put_if_absent(key, b"another")
        return mine

    assert sum(len(done) for done in together(3, work)) == 60
    assert set(store.sizes("")) == {"first", *blocks}
    assert proxy.injected.total() > 50


@pytest.mark.parametrize("same", [False, True], ids=["other bytes", "same bytes"])
def test_of_many_writers_one_creates(prefix: str, proxy: FaultProxy, tally: Tally, same: bool) -> None:
    stores = [ObjectStore(prefix, skip_instance_cache=True, **options(proxy.port)) for _ in range(4)]
    assert stores[0].put_if_absent("first", b"1")
    proxy.script = randomly(1, {"lost": 0.3})
    body = [b"x" if same else str(number).encode() * 3000 for number in range(12)]
    for key in ("one", "two", "three"):
        tally.inflicted["races"] += 1
        won = together(12, lambda number, key=key: stores[number % 4].put_if_absent(key, body[number]))
        assert won.count(True) == 1
        assert stores[0].read(key) == body[won.index(True)]
        tally.survived["races"] += 1


def test_large_objects_are_created_in_parts(
    store: ObjectStore, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(latteflow.storage.objects, "_ONE_REQUEST", 6 << 20)
    monkeypatch.setattr(latteflow.storage.objects, "_CHUNK", 5 << 20)
    body = random.Random(0).randbytes(12 << 20)
    (tmp_path / "large").write_bytes(body)
    proxy.script = first(["500", "drop", "cut"], method="PUT", path="partNumber")
    assert store.put_if_absent("bytes", body)
    proxy.script = first(["lost"], method="POST", path="uploadId")  # carried out, and nobody told us
    assert store.put_if_absent("file", tmp_path / "large")
    assert proxy.injected["lost"] == 1
    for key in ("bytes", "file"):
        assert not store.put_if_absent(key, bytes(12 << 20))
        assert store.read(key) == body
    # What we store in parts is named by content: whoever wins, the bytes are the same.
    together(3, lambda _: store.put_if_absent("same", body))
    assert store.read("same") == body


@pytest.fixture
def artifacts(proxy: FaultProxy, prefix: str) -> Iterator[ArtifactStore]:
    store = ArtifactStore(ObjectStore(prefix, patience=20, **options(proxy.port), **BLIND))
    writer = store.writer("d", "stage", 1, {"x": 1})
    writer.put("a", {}, {"a.bin": b"0123456789" * 1000})
    writer.finish()
    yield store
    proxy.script = randomly(0, {})
    # Whatever the network did, nothing was moved away.
    assert store.objects.sizes("d/stage/damaged") == {}
    assert store.load("d", "stage", store.all("d", "stage")[0].fingerprint) is not None


@pytest.mark.parametrize("fault", ["short", "mangle", "truncate"])
def test_bytes_harmed_on_the_way_are_read_again(
    artifacts: ArtifactStore, proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    (found,) = artifacts.all("d", "stage")
    for read in (found.read, lambda name: found.fetch(name, tmp_path).read_bytes()):
        proxy.script = first([fault], method="GET", path="/data/")
        assert read("a.bin") == b"0123456789" * 1000
    assert proxy.injected[fault] == 2
    proxy.script = first([fault], method="GET", path="manifest.json")
    assert artifacts.find("d", "stage", 1, {"x": 1}) is not None


def test_a_connection_that_cuts_everything_is_not_a_damaged_file(artifacts: ArtifactStore, proxy: FaultProxy) -> None:
    (found,) = artifacts.all("d", "stage")
    proxy.script = lambda request: "short" if "/data/a." in request.path and request.method == "GET" else None
    with pytest.raises(StorageError, match=r"never as it was written .*5000 bytes, of 10000.*left alone") as caught:
        found.read("a.bin")
    assert not isinstance(caught.value, Damaged)


def test_a_damaged_object_is_still_found(seaweed: Seaweed, proxy: FaultProxy, prefix: str) -> None:
    store = ArtifactStore(ObjectStore(prefix, **options(proxy.port)))
    writer = store.writer("d", "stage", 1, {"x": 1})
    writer.put("a", {}, {"a.bin": b"good"})
    found = writer.finish()
    (key,) = store.objects.sizes("d/stage/data")
    ObjectStore(prefix, **options(seaweed.port)).put(key, b"bad!")
    with pytest.raises(Damaged, match="moved to d/stage/damaged"):
        found.read("a.bin")
    assert store.find("d", "stage", 1, {"x": 1}) is None


def test_no_server_is_one_clear_error_within_the_budget(proxy: FaultProxy, prefix: str) -> None:
    store = ObjectStore(prefix, patience=1, **options(proxy.port))
    for fault in ("drop", "503", "500"):
        proxy.script = randomly(0, {fault: 1.0})
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"tried for 1 s: check the server .*finished parts are kept"):
            store.read("x") if fault != "drop" else store.put_if_absent("x", b"1")
        assert 1 <= time.monotonic() - begin < 15


def test_wrong_credentials_are_said_at_once(seaweed: Seaweed, proxy: FaultProxy, prefix: str) -> None:
    begin = time.monotonic()
    wrong = ObjectStore(prefix, **{**options(proxy.port), "secret": "wrong"})
    with pytest.raises(StorageError, match=r"access denied \(403 SignatureDoesNotMatch.*check the credentials"):
        wrong.put_if_absent("x", b"1")
    with pytest.raises(StorageError, match="access denied"):
        wrong.read("x")
    ObjectStore(prefix, **options(seaweed.port)).put_if_absent("x", b"1")
    reader = ObjectStore(prefix, **options(proxy.port, "reader"))
    assert reader.read("x") == b"1"
    with pytest.raises(StorageError, match="access denied"):
        reader.put_if_absent("y", b"1")
    assert len(proxy.seen) <= 8 and time.monotonic() - begin < 10


def test_missing_things_are_not_waited_for(proxy: FaultProxy, store: ObjectStore) -> None:
    with pytest.raises(NotFound, match="none does not exist"):
        store.read("none")
    nowhere = ObjectStore("s3://no-such-bucket/x", **options(proxy.port))
    assert nowhere.names("") == [] and nowhere.sizes("") == {}


@pytest.mark.parametrize(
    ("fault", "message"), [("ignore", "ignores the precondition"), ("501", "no conditional create")]
)
def test_a_server_without_conditional_writes_is_refused(
    proxy: FaultProxy, prefix: str, fault: str, message: str
) -> None:
    proxy.script = lambda request: fault if request.method == "PUT" else None
    with pytest.raises(StorageError, match=rf"{message}.*single_writer: true"):
        ObjectStore(prefix, **options(proxy.port)).put_if_absent("x", b"1")
    proxy.script = lambda request: "ignore" if request.method == "PUT" else None
    alone = ObjectStore(prefix, single_writer=True, **options(proxy.port))
    assert alone.put_if_absent("x", b"1")
    assert not alone.put_if_absent("x", b"2")
    assert alone.read("x") == b"1"


def test_a_server_proves_that_it_creates_once(proxy: FaultProxy, prefix: str) -> None:
    store = ObjectStore(prefix, **options(proxy.port))
    store.prove()
    assert list(store.listing("")) == [".latteflow"], "asked before the first write of all"
    proxy.script = lambda request: "ignore" if request.method == "PUT" else None
    with pytest.raises(StorageError, match=r"let 5 of 5 writers create one object, .*single_writer: true"):
        store.prove()
    assert list(store.listing("")) == [".latteflow"]


def test_a_stage_behind_a_storm(
    driver: Driver, small: Path, clean: Clean, seaweed: Seaweed, proxy: FaultProxy, prefix: str
) -> None:
    proxy.script = randomly(11, {**STORM, "stall": 0.01})
    driver.finish(work="storage", domain=small, store=prefix, env=environment(proxy.port))
    assert difference(tree(ObjectStore(prefix, **options(seaweed.port))), clean.tree) == {}
    assert proxy.injected.total() > 10


def test_the_server_is_killed_and_comes_back(
    driver: Driver, small: Path, clean: Clean, seaweed: Seaweed, prefix: str, tally: Tally
) -> None:
    def restart() -> None:
        seaweed.kill()
        time.sleep(1)
        seaweed.start()

    for number, moment in enumerate((0.3, 0.8)):
        tally.inflicted["kill server"] += 1
        timer = threading.Timer(moment, restart)
        timer.start()
        url = f"{prefix}/{number}"
        driver.finish(work="storage", domain=small, store=url, env=environment(seaweed.port))
        timer.join()
        assert difference(tree(ObjectStore(url, **options(seaweed.port))), clean.tree) == {}
        tally.survived["kill server"] += 1


def test_a_stall_is_waited_out(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.script = first(["stall"], method="PUT")
    begin = time.monotonic()
    assert store.put_if_absent("x", b"1")
    assert time.monotonic() - begin >= STALL_SECONDS
    assert [request.method for request in proxy.seen[-1:]] == ["PUT"]
    assert BUCKET in proxy.seen[-1].path
