"""A Postgres server of the test's own, in a folder; it must be installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from engines.tiny_vlm import free_port


class Postgres:
    """Listens on a free port of this machine, trusts whoever comes, and keeps nothing after `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        self._user = "postgres" if os.geteuid() == 0 else None  # which Postgres refuses to be
        if self._user:
            shutil.chown(folder, self._user)
        subprocess.run(
            ["initdb", "-D", folder / "data", "-U", "prefect", "-A", "trust", "--no-sync"], check=True,
            capture_output=True, user=self._user, cwd=folder,
        )  # fmt: skip
        words = ("-F", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}")
        with (folder.parent / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["postgres", "-D", folder / "data", "-p", str(self.port), *words],
                stdout=log, stderr=log, user=self._user, cwd=folder,
            )  # fmt: skip

    @property
    def url(self) -> str:
        """For Prefect."""
        return f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def ask(self, query: str, database: str = "prefect") -> str:
        """What it answers; columns with `|` between them."""
        words = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "-d", database, "-At", "-c", query]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    def is_up(self) -> bool:
        try:
            return self.ask("SELECT 1", "postgres") == "1"
        except subprocess.CalledProcessError:
            assert self._process.poll() is None, (self.folder.parent / "postgres.log").read_text()[-2000:]
            return False

    def create(self) -> None:
        """The database, as docs/operations.md says."""
        self.ask("CREATE DATABASE prefect", "postgres")
        self.ask("CREATE EXTENSION IF NOT EXISTS pg_trgm")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
