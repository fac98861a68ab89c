"""A store on abfs://, on a real server: Azurite, from npm (`npm install -g azurite`)."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.seaweed import free_ports

from storage.errors import NotFound, StorageError
from storage.objects import ObjectStore

adlfs = pytest.importorskip("adlfs", reason="the extra `abfs` is not installed")
PROGRAM = shutil.which("azurite-blob")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="needs azurite-blob of the npm package azurite"),
]
# The account that every Azurite has; Microsoft prints its key in the manual.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
WRONG = "bm8="


def connection(port: int, key: str) -> str:
    account = f"AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    return f"DefaultEndpointsProtocol=http;{account}"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server with an empty container."""
    (found,) = free_ports(1)
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(found), "--location", str(tmp_path_factory.mktemp("azurite"))]
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([str(PROGRAM), *options, *place], stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", found)).close()
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.1)
        adlfs.AzureBlobFileSystem(connection_string=connection(found, KEY)).mkdir("box")
        yield found
    finally:
        process.terminate()
        process.wait()


def test_a_store(port: int, tmp_path: Path) -> None:
    store = ObjectStore("abfs://box/store", connection_string=connection(port, KEY))
    assert store.put_if_absent("d/a", b"first") and not store.put_if_absent("d/a", b"second")
    assert store.read("d/a", 1, 3) == b"ir" and store.fetch("d/a", tmp_path).read_bytes() == b"first"
    assert store.sizes("d") == {"d/a": 5} and store.names("") == ["d"]
    assert abs(store.listing("d")["d/a"].modified - time.time()) < 600
    store.put("d/a", b"third")
    store.delete("d/a")
    store.delete("d/a")
    assert not store.exists("d/a")
    with pytest.raises(NotFound):
        store.read("d/a")


@pytest.mark.parametrize("key", [WRONG, "not base64!"])
def test_a_wrong_key_is_said_at_once_in_one_line(port: int, key: str) -> None:
    store = ObjectStore("abfs://box/store", connection_string=connection(port, key))
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


def test_a_container_that_is_missing(port: int) -> None:
    store = ObjectStore("abfs://nowhere/store", connection_string=connection(port, KEY))
    with pytest.raises(StorageError, match=r"404 ContainerNotFound.*create it first"):
        store.put_if_absent("x", b"1")
