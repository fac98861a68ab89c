"""How fast images become shards, beside a plain loop over webdataset and beside the limit, and in how much memory.

    loop    read, decode with Pillow, webdataset.ShardWriter, one image after the other; neither hashed nor indexed
    limit   `tar cf` of the folder, and all images decoded in as many threads as there are processors
    ours    list, hash, inspect, pack, index, record duplicates; every file flushed to disk

Contestants take turns in processes of their own, on the same files; imports do not count. Ratios are of one round each,
and the median over the rounds is what is said, with the smallest and the largest.
Memory is the sum of the peaks of the process and its children.

    python -m benchmarks.shard [--images 20000] [--side 128] [--rounds 5] [--memory 10000 200000] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

LOOP_GOAL, LIMIT_GOAL, GROWTH_GOAL = 3.0, 1.5, 0.20
PER_SHARD = 1000
DEMO = Path(__file__).parents[1] / "data" / "demo"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--side", type=int, default=128, help="pixels")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--memory", type=int, nargs="*", default=[], help="numbers of tiny images to measure memory at"
    )
    options.add_argument("--folder", type=Path, help="scratch; default: a temporary folder")
    options.add_argument("--contestant", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.contestant:
        say(json.dumps(measured(chosen.contestant, chosen.folder)))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        if chosen.images:
            speed(Path(scratch) / "photos", chosen.images, chosen.side, chosen.rounds)
        if chosen.memory:
            memory(Path(scratch), sorted(chosen.memory))


def speed(folder: Path, images: int, side: int, rounds: int) -> None:
    """Seconds of each contestant on the same photos, and their ratios."""
    size = photos(folder, images, side)
    say(f"{images:,} JPEGs of {side} x {side} pixels, {size / images / 1000:.1f} kB each, {os.cpu_count()} processors")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(alone(name, folder))
    best = {name: min(found, key=lambda run: run["seconds"]) for name, found in runs.items()}
    for name, run in best.items():
        say(
            f"{name:6} {images / run['seconds']:8,.0f} images/s  {run['seconds']:6.2f} s  "
            f"processor {run['processor'] / images * 1e6:4.0f} us/image  peak {run['peak_mb']:.0f} MB"
        )
    faster = [loop["seconds"] / own["seconds"] for loop, own in zip(runs["loop"], runs["ours"], strict=True)]
    slower = [own["seconds"] / limit["seconds"] for limit, own in zip(runs["limit"], runs["ours"], strict=True)]
    met = verdict(statistics.median(faster) >= LOOP_GOAL), verdict(statistics.median(slower) <= LIMIT_GOAL)
    say(f"{shown(faster)} x as fast as the plain loop (goal {LOOP_GOAL} x): {met[0]}")
    say(f"{shown(slower)} x the time of the limit (goal {LIMIT_GOAL} x): {met[1]}")


def shown(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def memory(scratch: Path, counts: list[int]) -> None:
    """Peak memory at growing numbers of images."""
    peaks = []
    for count in counts:
        folder = scratch / f"tiny-{count}"
        tiny(folder, count)
        run = alone("ours", folder)
        peaks.append(run["peak_mb"])
        say(f"{count:8,} images: peak {run['peak_mb']:.0f} MB, {count / run['seconds']:,.0f} images/s")
    growth = peaks[-1] / peaks[0] - 1
    say(f"memory grows by {growth:.0%} (goal below {GROWTH_GOAL:.0%}): {verdict(growth < GROWTH_GOAL)}")


def plain_loop(folder: Path, out: Path) -> None:
    """What a short script does."""
    import webdataset

    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()  # verify() would not notice a JPEG that breaks off
                width, height = image.size
            writer.write(
                {"__key__": path.stem, "jpg": data, "json": {"path": path.name, "width": width, "height": height}}
            )


def tar_and_decode(folder: Path, out: Path) -> None:
    """No sharding tool can do less: every byte into a tar, every image decoded."""
    paths = sorted(folder.iterdir())

    def decode(some: list[Path]) -> None:
        for path in some:
            with Image.open(path) as image:
                image.load()

    packing = subprocess.Popen(["tar", "cf", str(out / "all.tar"), "-C", str(folder), "."])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, [paths[start : start + 100] for start in range(0, len(paths), 100)]))
    assert packing.wait() == 0


def ours(folder: Path, out: Path) -> None:
    """What the `shard` stage does on a source it has not seen."""
    from latteflow.storage.artifacts import ArtifactStore
    from latteflow.storage.images import ImageLimits
    from latteflow.storage.listing import StatCache
    from latteflow.storage.objects import ObjectStore
    from latteflow.storage.shards import Packing, write_shards
    from latteflow.storage.sources import Source

    store = ArtifactStore(ObjectStore(str(out)))
    source, packing = Source([str(folder)]), Packing(PER_SHARD, ImageLimits())
    with StatCache(store.objects, "benchmark/shard/stat").digested(source, packing.limits) as images:
        writer = store.writer("benchmark", "shard", 1, {"images": images.digest})
        counts = write_shards(writer, source, images, None, packing)
        writer.finish(counts)
        assert counts["images"] == len(images), counts


CONTESTANTS: dict[str, Callable[[Path, Path], None]] = {"loop": plain_loop, "limit": tar_and_decode, "ours": ours}
IMPORTS = {
    "loop": ["webdataset"],
    "limit": [],
    "ours": ["latteflow.storage.listing", "latteflow.storage.shards", "pyarrow.parquet"],
}


def alone(name: str, folder: Path) -> dict[str, float]:
    """Runs a contestant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.shard", "--contestant", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measured(name: str, folder: Path) -> dict[str, float]:
    """Wall time and processor time in seconds, and peak memory in MB, children included."""
    for module in IMPORTS[name]:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=folder.parent) as out, Peaks() as peaks:
        begin = time.perf_counter()
        CONTESTANTS[name](folder, Path(out))
        seconds = time.perf_counter() - begin
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "processor": sum(each.ru_utime + each.ru_stime for each in (own, children)),
        "peak_mb": sum(peaks.kilobytes.values()) / 1024,
    }


class Peaks:
    """The peak memory of this process and of each of its children, looked up ten times a second (Linux)."""

    def __init__(self) -> None:
        self.kilobytes: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(0.1)
            processes = {str(os.getpid())}
            for thread in Path("/proc/self/task").iterdir():
                with contextlib.suppress(OSError):  # it may have ended by now
                    processes |= {*(thread / "children").read_text().split()}
            for process in processes:
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{process}/status").read_text().splitlines():
                        if line.startswith("VmHWM:"):  # unlike ru_maxrss, not inherited from the parent
                            self.kilobytes[process] = int(line.split()[1])


def photos(folder: Path, count: int, side: int) -> int:
    """Photos of clothes, enlarged, each with a brightness and noise of its own; returns their bytes."""
    folder.mkdir(parents=True)
    originals = [Image.open(path).convert("L") for path in sorted(DEMO.rglob("*.png"))]
    if not originals:
        raise SystemExit(f"{DEMO} is missing: run `python -m domains.prepare demo` first")
    draw = np.random.default_rng(0)
    total = 0
    for number in range(count):
        pixels = np.asarray(originals[number % len(originals)].resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noise = draw.integers(-8, 9, (side, side, 3), np.int16)
        image = Image.fromarray((pixels[..., None] + noise + number % 31).clip(0, 255).astype(np.uint8))
        path = folder / f"{number:06d}.jpg"
        image.save(path, quality=85)
        total += path.stat().st_size
    return total


def tiny(folder: Path, count: int) -> None:
    """Different files of a few hundred bytes."""
    folder.mkdir(parents=True)
    out = io.BytesIO()
    Image.new("L", (16, 16), 128).save(out, "JPEG")
    for number in range(count):
        (folder / f"{number:07d}.jpg").write_bytes(out.getvalue() + number.to_bytes(4, "big"))


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
