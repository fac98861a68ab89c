"""How long `run` and `plan` take when everything, or everything but one image, is in the store: our own overhead.

Builds a domain of tiny pictures in 1,000 shards. The shards are real; later stages, which would need a model, are
written through the storage layer as their stages would write them, one part for each shard. No torch anywhere.

    python -m benchmarks.cached_run [--shards 1000] [--images 10] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from latteflow.flows.pipeline import Step, graph
from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.captions import CAPTION_SCHEMA, caption_key
from latteflow.storage.fingerprint import sha256
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules
from latteflow.tasks.report.scores import LabelFree, Scores, ZeroShot

LIMIT = 5.0
"""Seconds, for 1,000 shards."""
DIM = 512
DOMAIN = """\
name: cached
source: images
classes: [one, two]
describer: {{kind: sidecar, texts: texts.csv}}
shard: {{images: {images}}}
store: store
output: runs
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shards", type=int, default=1000)
    options.add_argument("--images", type=int, default=10, help="in a shard")
    options.add_argument("--folder", type=Path, help="build here, and keep it for the next time")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        path = build(folder, chosen.shards, chosen.images)
        measured = {
            "run, all cached": seconds("run", path),
            "plan, all cached": seconds("plan", path),
            "show": seconds("show", path),
        }
        extra = folder / "images" / "new.png"
        draw(extra, chosen.shards * chosen.images)
        measured["plan, one new image"] = seconds("plan", path)
        extra.unlink()
    files = f"{chosen.shards} shards, {chosen.shards * chosen.images} images"
    for what, (wall, cpu) in measured.items():
        share = f"{wall / LIMIT:4.0%} of the limit of {LIMIT:.0f} s"
        sys.stdout.write(f"{what:20} {wall:5.2f} s, {cpu:5.2f} s of processor time, {share} ({files})\n")


def build(folder: Path, shards: int, images: int) -> Path:
    """The domain file of a domain whose every stage is in the store."""
    path = folder / "domain.yaml"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True)
    for number in range(shards * images):
        draw(folder / "images" / f"{number:07d}.png", number)
    (folder / "texts.csv").write_text("path,text\n0000000.png,a picture\n")
    path.write_text(DOMAIN.format(images=images))
    domain = Domain.load(path)
    done: dict[Step, StageResult] = {}
    for step in graph(domain):
        try:
            with rules(make=step.name == "shard"):
                done[step] = step.call(domain, done.__getitem__)
        except NotMade as missing:
            done[step] = fabricate(open_store(domain), domain, missing, next(iter(done.values())))
    return path


def draw(path: Path, number: int) -> None:
    """A picture of its own."""
    pixels = np.frombuffer(number.to_bytes(4, "big") * 3, np.uint8).reshape(2, 2, 3)
    Image.fromarray(pixels).save(path)


def fabricate(store: ArtifactStore, domain: Domain, missing: NotMade, shards: StageResult) -> StageResult:
    """What the stage would have written, with made-up content."""
    writer = store.writer(domain.name, missing.stage, missing.version, missing.inputs)
    counts = {"images": shards.counts["images"]}
    if missing.stage in ("embed", "describe"):
        for (shard,), rows in read_index(store.open(shards.ref)).group_by("shard", maintain_order=True):
            table = features(rows) if missing.stage == "embed" else texts(rows)
            kind = "features" if missing.stage == "embed" else "captions"
            files = {f"{shard}.{kind}.parquet": parquet(table)}
            writer.put(str(shard), {"shard": shard}, files, rows=table.height)
    if missing.stage == "evaluate":
        changed = LabelFree(
            agreement=1, margin_before=0, margin_after=0, entropy_before=0, entropy_after=0,
            predicted_before=[], predicted_after=[],
        )  # fmt: skip
        zero_shot = ZeroShot(plain=None, centred=None, top1=None, better="", methods={})
        scores = Scores(
            domain=domain.name, n_test=0, classes=domain.classes, zero_shot=zero_shot, methods={}, label_free=changed
        )
        writer.put("evaluation", {}, {"metrics.json": scores.written()})
    if missing.stage == "report":
        writer.put("page", {}, {"report.html": b"<p>made up"})
    artifact = writer.finish(counts)
    return StageResult(artifact.ref, missing.label, True, 1.0, artifact.counts)


def features(rows: pl.DataFrame) -> pl.DataFrame:
    vectors = np.random.default_rng(0).normal(size=(rows.height, DIM)).astype(np.float32)
    return pl.DataFrame({"key": rows["key"], "norm": np.ones(rows.height, np.float32), "feature": vectors})


def texts(rows: pl.DataFrame) -> pl.DataFrame:
    made = [
        {
            "member_keys": [key],
            "caption_key": caption_key(sha256(b""), [content]),
            "members": [content],
            "text": "a text",
        }
        for key, content in rows.select("key", "sha256").iter_rows()
    ]
    return pl.DataFrame(made, schema={"member_keys": pl.List(pl.String), **CAPTION_SCHEMA})


def seconds(command: str, path: Path) -> tuple[float, float]:
    """Wall time and processor time of the command in a process of its own, the better of two."""
    times = []
    for _ in range(2):
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "latteflow.flows.cli", command, str(path)], check=True, capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times.append((time.perf_counter() - wall, cpu))
    return min(times)


if __name__ == "__main__":
    main()
