"""A Prefect server and workers of the test's own: real processes on a free port of this machine, ended by their ids."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines.tiny_vlm import ROOT, free_port
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "OMP_NUM_THREADS": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
}
WAIT_S = 420.0


def descendants(pid: int) -> list[int]:
    """A process and all below it, as far as they live."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += descendants(int(child))
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """As if the machine had lost its power: the process and all below it, by their ids."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def until(true: Callable[[], Any], what: str, limit_s: float = WAIT_S, every_s: float = 0.2) -> Any:
    """What ``true`` returns when it returns something."""
    limit = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < limit, f"waited {limit_s:.0f} s for {what}"
        time.sleep(every_s)
    return found


class Service:
    """A server, and whatever workers a test starts; all logs in ``folder``."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ, **QUIET,
            "PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": self.url, "LATTEFLOW_HOME": str(ROOT),
            "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment,
        }  # fmt: skip
        self.client = SyncPrefectClient(self.url)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.serve()

    def serve(self) -> None:
        """Start the server, the first time or after its end."""
        self.server = self.start(
            "server", sys.executable, "server", "start", "--host", "127.0.0.1", "--port", self.port
        )
        until(self._is_up, "the server")

    def start(self, log: str, python: str, *words: Any, **environment: str) -> subprocess.Popen[bytes]:
        """A `prefect` command that goes on, its output in a file."""
        with (self.folder / f"{log}.log").open("ab") as out:
            process = subprocess.Popen(
                [python, "-m", "prefect", *map(str, words)],
                env={**self.environment, **environment}, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def worker(self, pool: str, python: str = sys.executable, **environment: str) -> subprocess.Popen[bytes]:
        one = ("--limit", 1) if pool == "gpu" else ()  # as in docs/operations.md
        return self.start(f"worker-{pool}", python, "worker", "start", "--pool", pool, *one, **environment)

    def prefect(self, *words: str, fails: bool = False) -> str:
        """A `prefect` command; returns what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words], env={**self.environment, "COLUMNS": "200"}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=WAIT_S,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def deploy(self) -> None:
        for pool in ("cpu", "gpu", "train"):
            self.prefect("work-pool", "create", pool, "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all")

    def runs(self, flow: str, *states: str) -> list[FlowRun]:
        """Runs of a flow, newest last; those in one of the states, if any are given."""
        flows = {each.id: each.name for each in self.client.read_flows()}
        wanted = FlowRunFilter.model_validate({"state": {"name": {"any_": list(states)}}}) if states else None
        found = [run for run in self.client.read_flow_runs(flow_run_filter=wanted) if flows[run.flow_id] == flow]
        return sorted(found, key=lambda run: (run.expected_start_time, run.created))

    def ended(self, flow: str, number: int = -1) -> FlowRun:
        """A run of a flow, when it has come to its end."""

        def final() -> FlowRun | None:
            found = self.runs(flow)
            if number >= len(found):
                return None
            run = found[number]
            return run if run.state is not None and run.state.is_final() else None

        return until(final, f"the end of {flow}", every_s=1.0)

    def logs(self, run: FlowRun) -> str:
        from prefect.client.schemas.filters import LogFilter

        wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        return "\n".join(each.message for each in self.client.read_logs(wanted))

    def close(self) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                kill(process)

    def _is_up(self) -> bool:
        assert self.server.poll() is None, (self.folder / "server.log").read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextlib.contextmanager
def service(folder: Path) -> Iterator[Service]:
    folder.mkdir(parents=True, exist_ok=True)
    running = Service(folder)
    try:
        yield running
    finally:
        running.close()
