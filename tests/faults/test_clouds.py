"""Stores on abfs:// and gs://, on servers: what the store asks of them, and whole runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.clouds import CLOUDS, NO_GRPC, ROOT, Cloud

from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.domain import Domain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    program, started = CLOUDS[request.param]
    if program() is None:
        pytest.skip(f"there is no {request.param} on this machine")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_GRPC.items():  # read when gcsfs is imported
            patch.setenv(name, value)
        pytest.importorskip({"azurite": "adlfs", "gcs": "gcsfs"}[request.param])
        with started(tmp_path_factory.mktemp(request.param)) as found:  # type: ignore[attr-defined]
            yield found


def opened(cloud: Cloud, place: str, **other: str) -> ObjectStore:
    return ObjectStore(f"{cloud.url}/{place}", **{**cloud.options, **other})


def test_a_store(cloud: Cloud, tmp_path: Path) -> None:
    store = opened(cloud, "store")
    assert store.put_if_absent("d/a", b"first") and not store.put_if_absent("d/a", b"second")
    assert store.read("d/a", 1, 3) == b"ir" and store.fetch("d/a", tmp_path).read_bytes() == b"first"
    assert store.sizes("d") == {"d/a": 5} and store.names("") == ["d"]
    assert abs(store.listing("d")["d/a"].modified - time.time()) < 600
    store.put("d/a", b"third")
    assert store.read("d/a") == b"third"
    store.delete("d/a")
    store.delete("d/a")
    assert not store.exists("d/a") and store.sizes("d") == {}
    with pytest.raises(NotFound):
        store.read("d/a")


def test_of_many_who_create_one_wins(cloud: Cloud) -> None:
    store, won = opened(cloud, "race"), []

    def create(number: int) -> None:
        # More than a driver sends at once, so that a writer has parts of its own under way.
        if store.put_if_absent("one", bytes([number]) * (9 << 20)):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(won) == 1 and store.read("one") == bytes(won) * (9 << 20)


def test_a_bucket_that_is_missing(cloud: Cloud) -> None:
    nowhere = Cloud(cloud.url.replace("box", "nowhere"), cloud.options, {})
    with pytest.raises(StorageError, match="create it first") as caught:
        opened(nowhere, "store").put_if_absent("x", b"1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["bm8=", "not base64!"])
def test_a_wrong_key_is_said_at_once_in_one_line(cloud: Cloud, key: str) -> None:
    if "connection_string" not in cloud.options:
        pytest.skip("this server asks for no key")
    right = cloud.options["connection_string"]
    wrong = f"{right[: right.index('AccountKey=')]}AccountKey={key};{right[right.index('BlobEndpoint') :]}"
    store = opened(cloud, "store", connection_string=wrong)
    for call in (
        lambda: store.put_if_absent("x", b"1"),
        lambda: store.read("x"),
        lambda: store.listing(""),
        lambda: store.delete("x"),
        lambda: store.size("x"),
    ):
        with pytest.raises(StorageError, match=r"access denied \(.*check the credentials") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_run_that_is_killed_goes_on_and_ends_as_on_a_disk(cloud: Cloud, domain: Domain, tmp_path: Path) -> None:
    def file(store: str, output: str) -> Path:
        told = (tmp_path / "domain.yaml").read_text().replace("store: store", f"store: {store}")
        path = tmp_path / f"{output}.yaml"
        path.write_text(told.replace("output: runs", f"output: {output}"))
        return path

    def started(path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "latteflow.flows.cli", "run", str(path)], text=True, cwd=ROOT,
            env={**os.environ, **cloud.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ended(path: Path) -> str:
        process = started(path)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    there, store = file(f"{cloud.url}/runs", "there"), opened(cloud, "runs")
    for stage in ("embed", "tune"):  # killed while each is under way
        process, end = started(there), time.monotonic() + 120
        while not any(f"/{stage}/" in key for key in store.sizes("shapes")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    ended(there)
    again = ended(there)
    assert "done" not in again and "cached" in again, again
    ended(file(str(tmp_path / "disk"), "here"))
    here, away = (json.loads((tmp_path / name / "shapes" / "metrics.json").read_text()) for name in ("here", "there"))
    assert here == away
