"""`latteflow serve` under load, beside `predict` and the bare model on the same images.

    python -m benchmarks.load [--model ViT-S-32] [--images 512] [--clients 1 8 64] [--seconds 20] [--rounds 2]

Needs Locust (`pip install 'locust>=2.40,<3'`). A model with random weights, JPEGs of 320 x 240; each client sends the
next image when the answer is here. All take turns in one run, on one machine, the clients included: processor time per
image (of the service with its decoders, without the clients; of predict with its own) says on a busy machine what
images per second say on an idle one. *bare* is the forward pass and the answers of one batch of pixels, nothing else.

Then, with the second number of clients: the model is exported anew and SIGHUP sent under load, and at last SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.predict import clocks, export_random, photos
from latteflow.models.ship.predictor import Predictor
from latteflow.tasks.ship.predict import classify


def main() -> None:
    """Print the table, and what became of requests while the service was told to reload and to end."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="ViT-S-32")
    options.add_argument("--images", type=int, default=512)
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--seconds", type=int, default=20)
    options.add_argument("--rounds", type=int, default=2)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_random(chosen.model, folder / "model")
        photos(folder / "images", chosen.images, (320, 240))
        table(folder, chosen)
        changes(folder, chosen)


def table(folder: Path, chosen: argparse.Namespace) -> None:
    """Everything in turn, and a line for each."""
    predictor = Predictor.load(folder / "model")
    predicted: list[tuple[float, float]] = []
    bare: dict[int, list[float]] = {1: [], 8: []}
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in chosen.clients}
    with serving(folder / "model") as (process, url):
        load(url, folder, 8, 5)  # decoders are started, memory is there
        for _ in range(chosen.rounds):
            begin = clocks()
            classify(lambda: predictor, str(folder / "images"), batch=64)
            wall, cpu = clocks() - begin
            predicted.append((chosen.images / wall, cpu / chosen.images))
            for size, times in bare.items():
                times += bare_times(predictor, size)
            for number, each in found.items():
                before = used(process)
                told = load(url, folder, number, chosen.seconds)
                each.append({**told, "cpu": (used(process) - before) / told["all_answers"]})
    rate, own = np.median(predicted, axis=0)
    one, eight = (1000 * float(np.median(times)) for times in bare.values())
    say(f"predict: {rate:.1f} images/s, {1000 * own:.1f} ms of processor time per image")
    say(f"bare: {one:.1f} ms for one image, {eight:.1f} ms for eight together; {torch.get_num_threads()} threads")
    say("clients  errors  p50 ms  p99 ms  p99/bare 1  p99/bare 8  images/s  of predict  cpu ms  predict's/own")
    for number, each in found.items():
        times = np.concatenate([one_round["times"] for one_round in each])
        p50, p99 = np.percentile(times, [50, 99])
        speed, cpu = (float(np.median([one_round[name] for one_round in each])) for name in ("rate", "cpu"))
        errors = sum(sum(one_round["errors"].values()) for one_round in each)
        say(
            f"{number:7} {errors:7} {p50:7.0f} {p99:7.0f} {p99 / one:11.1f} {p99 / eight:11.1f} {speed:9.1f} "
            f"{speed / rate:11.2f} {1000 * cpu:7.1f} {own / cpu:14.2f}"
        )


def changes(folder: Path, chosen: argparse.Namespace) -> None:
    """Another model, and the end, while clients ask."""
    number = chosen.clients[1]
    with serving(folder / "model") as (process, url), clients(url, folder, number, 600) as asking:
        time.sleep(10)
        export_random(chosen.model, folder / "model")
        process.send_signal(signal.SIGHUP)
        time.sleep(10)
        process.terminate()
        process.wait(30)
        time.sleep(1)
        asking.terminate()
        asking.wait()
    told = figures(folder)
    refused = sum(times for error, times in told["errors"].items() if "Connection refused" in error)
    lost = {error: times for error, times in told["errors"].items() if "Connection refused" not in error}
    say(f"reload and SIGTERM under {number} clients: {told['answers']} answers, lost {lost or 0}, too late {refused}")


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service, and its address."""
    command = [sys.executable, "-m", "latteflow.flows.cli", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def clients(url: str, folder: Path, number: int, seconds: int) -> Iterator[subprocess.Popen[bytes]]:
    """So many that ask all the time."""
    command = [sys.executable, "-m", "locust", "--headless", "--only-summary", "--loglevel", "ERROR", "--host", url]
    command += ["-f", str(Path(__file__).with_name("load_user.py")), "--users", str(number)]
    command += ["--spawn-rate", str(number), "--run-time", f"{seconds}s", "--stop-timeout", "30"]
    here = {"LOAD_IMAGES": str(folder / "images"), "LOAD_FIGURES": str(folder / "figures.json")}
    process = subprocess.Popen(
        command, env={**os.environ, **here}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def load(url: str, folder: Path, number: int, seconds: int) -> dict[str, Any]:
    """What so many clients saw."""
    with clients(url, folder, number, seconds) as process:
        process.wait()
    return figures(folder)


def figures(folder: Path) -> dict[str, Any]:
    """Answers, errors, and the time of each answer in ms."""
    told: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    times = [(float(ms), number) for ms, number in told["times_ms"].items()]
    told["times"] = np.repeat(*np.array(times).T.astype(int)) if times else np.zeros(0)
    return {**told, "rate": told["answers"] / told["seconds"], "all_answers": max(told["answers"], 1)}


def bare_times(predictor: Predictor, size: int, times: int = 20) -> list[float]:
    """Seconds for a batch of pixels, some times."""
    pixels = torch.rand(size, 3, 224, 224)
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        predictor.answers(pixels)
        found.append(time.perf_counter() - begin)
    return found


def used(process: subprocess.Popen[str]) -> float:
    """Seconds of processor time of a process and those that it has begun."""
    own = psutil.Process(process.pid)
    return sum(sum(each.cpu_times()[:2]) for each in [own, *own.children(recursive=True)])


def say(line: str) -> None:
    """At once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
