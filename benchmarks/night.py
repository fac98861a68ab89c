"""A night in which nothing is new, by its deployment: wall time and processor time from the worker to the last state.

    python -m benchmarks.night [--nights 5]

A server on SQLite, a worker, 200 images of the demo and the embedded model. Two deployments in turn: `retune`
as prefect.yaml has it, and the same without `command`, as Prefect starts runs if nobody says how. Processor time is
the worker's and of all that it started and that ended; the server's is told beside it. Wall time begins when the
worker takes the run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
HOW = {"retune": "one process", "plain": "Prefect's own way"}


def main() -> None:
    from service.harness import Service, descendants, service, until

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nights", type=int, default=5, help="of each kind")
    nights = options.parse_args().nights
    with tempfile.TemporaryDirectory() as scratch, service(Path(scratch)) as running:
        prefect: Service = running
        prefect.prefect("work-pool", "create", "cpu", "--type", "process", "--overwrite")
        prefect.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(deployments(Path(scratch))))
        worker = prefect.worker("cpu").pid
        domain = write_domain(Path(scratch))
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in HOW}
        for number in range(nights + 1):
            for name, each in found.items():
                own, server = spent(worker), spent(prefect.server.pid)
                prefect.prefect("deployment", "run", f"retune/{name}", "--param", f"domain={domain}")
                run = prefect.ended("retune", len(prefect.runs("retune")) - 1)
                states = {state.name: state.timestamp for state in prefect.client.read_flow_run_states(run.id)}
                until(lambda: descendants(worker) == [worker], "the processes of the run to end")
                assert run.end_time and run.state and (number == 0 or run.state.name == "Unchanged"), run.state
                wall = (run.end_time - states["Pending"]).total_seconds()
                each.append((wall, spent(worker) - own, spent(prefect.server.pid) - server))
        sys.stdout.write(
            "how                wall s  CPU s  server CPU s (medians of nights in which nothing was new)\n"
        )
        for name, each in found.items():
            wall, own, server = (statistics.median(column) for column in zip(*each[1:], strict=True))
            sys.stdout.write(f"{HOW[name]:17}  {wall:6.1f}  {own:5.1f}  {server:5.1f}\n")


def write_domain(folder: Path) -> Path:
    """200 images of the demo."""
    from latteflow.domains.fashion import CLASSES, demo

    (folder / "train").mkdir()
    for picture in itertools.islice(demo(folder), 200):
        (folder / picture.path).write_bytes(picture.png)
    said = {"name": "demo", "source": "train", "classes": list(CLASSES), "method": "transduction"}
    file = folder / "demo.yaml"
    file.write_text(yaml.safe_dump({**said, "clip": {"model": "embedded", "resize": "pad"}, "store": "store"}))
    return file


def deployments(folder: Path) -> Path:
    """`retune` as it is, and without `command`."""
    said = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (retune,) = (each for each in said["deployments"] if each["name"] == "retune")
    plain = {**copy.deepcopy(retune), "name": "plain"}
    del plain["work_pool"]["job_variables"]["command"]
    said["deployments"] = [retune, plain]
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(said))
    return file


def spent(pid: int) -> float:
    """Processor time of a process and of its children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
