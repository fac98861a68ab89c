"""Registers and leases: one of many wins, a dead holder is taken over, a living one is not."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import latteflow.storage.lease
from latteflow.storage.errors import StorageError
from latteflow.storage.lease import Busy, lease
from latteflow.storage.objects import ObjectStore
from latteflow.storage.register import Register


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path))


def test_of_many_who_read_the_same_value_one_sets_the_next(objects: ObjectStore) -> None:
    register = Register(objects, "d/champion")
    assert register.read() == (0, {})
    for version in range(3):
        with ThreadPoolExecutor(8) as pool:
            won = [n for n, ok in enumerate(pool.map(lambda n: register.replace(version, {"n": n}), range(8))) if ok]  # noqa: B023
        assert register.read() == (version + 1, {"n": won[0]}) and len(won) == 1
    assert register.versions() == [1, 2, 3]
    register.clear(3)
    assert register.versions() == [3]


def test_what_is_no_record_is_said(objects: ObjectStore) -> None:
    objects.put("d/champion/00000001.json", b"[")
    with pytest.raises(StorageError, match=r"00000001\.json is not a record"):
        Register(objects, "d/champion").read()


def test_a_lease_is_for_one_at_a_time(objects: ObjectStore) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with lease(objects, "d/lock", wait=True, dead_s=10):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1
    assert len(objects.names("d/lock")) == 1


def test_a_living_holder_is_not_taken_over(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latteflow.storage.lease, "BEAT_S", 0.05)
    busy = pytest.raises(Busy, match=rf"process {os.getpid()} on .* is at work")
    with lease(objects, "d/lock", wait=False), busy, lease(objects, "d/lock", wait=False, dead_s=1):
        pass
    with lease(objects, "d/lock", wait=False):
        pass


def _hold(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    with lease(ObjectStore(folder), "d/lock", wait=False):
        ready.set()
        time.sleep(600)


@pytest.mark.parametrize("here", [True, False])
def test_a_dead_holder_is_taken_over(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60) and process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not here:  # as seen from another machine
        monkeypatch.setattr(latteflow.storage.lease.socket, "gethostname", lambda: "elsewhere")
    begin = time.monotonic()
    with lease(objects, "d/lock", wait=False, dead_s=1):
        took = time.monotonic() - begin
    assert took < 0.9 if here else took >= 1
