"""How long `evaluate` and `report` take, how much memory, and how large the page gets.

Tiny pictures are sharded in earnest; what would need a model (features, texts, tuned models) is made up around class
means, and written as the stages would write it. Then both stages run, each in a process of its own.

    python -m benchmarks.report [--images 5000 50000] [--classes 100] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.cached_run import draw
from latteflow.flows.pipeline import Step, graph
from latteflow.storage.captions import CAPTION_SCHEMA
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet, safetensors
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules

DIM = 512
SEEDS = (0, 1, 2)
DOMAIN = """\
name: many
source: images
classes: [{classes}]
evaluation: {{labels: labels.csv}}
describer: {{kind: sidecar, texts: texts.csv}}
method: [latteclip, latteclip_plus]
store: store
output: runs
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, nargs="+", default=[5_000, 50_000])
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--folder", type=Path, help="build here, and keep it for the next time")
    options.add_argument("--stage", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.stage:
        sys.stdout.write(json.dumps(measured(chosen.folder, chosen.stage)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for images in chosen.images:
            folder = (chosen.folder or Path(scratch)) / str(images)
            walk(build(folder, images, chosen.classes), until="evaluate")
            for stage in ("evaluate", "report"):
                command = [sys.executable, "-m", "benchmarks.report", "--folder", str(folder), "--stage", stage]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                told = "".join(f", {name} {value}" for name, value in found.items())
                sys.stdout.write(f"{images:,} images, {chosen.classes} classes, {stage}{told}\n")


def measured(folder: Path, stage: str) -> dict[str, str]:
    """Seconds, peak memory and, of the report, the size of its page."""
    begin, before = time.perf_counter(), time.process_time()
    result = walk(folder / "domain.yaml", until="" if stage == "report" else "report")[stage]
    found = {
        "wall": f"{time.perf_counter() - begin:.1f} s",
        "processor": f"{time.process_time() - before:.1f} s",
        "peak": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB",
    }
    if stage == "report":
        store = open_store(Domain.load(folder / "domain.yaml"))
        found["page"] = f"{len(store.open(result.ref).read('report.html')) / 1e6:.1f} MB"
    return found


def build(folder: Path, images: int, classes: int) -> Path:
    """The domain file of a domain with its pictures and labels."""
    path = folder / "domain.yaml"
    if not path.exists():
        (folder / "images").mkdir(parents=True)
        for number in range(images):
            draw(folder / "images" / f"{number:07d}.png", number)
        rows = "".join(f"images/{number:07d}.png,class {number % classes}\n" for number in range(images))
        (folder / "labels.csv").write_text("path,class\n" + rows)
        (folder / "texts.csv").write_text("path,text\n0000000.png,a picture\n")
        path.write_text(DOMAIN.format(classes=", ".join(f"class {number}" for number in range(classes))))
    return path


def walk(path: Path, until: str) -> dict[str, StageResult]:
    """Run the stages before one, by label; those that need a model are made up."""
    domain = Domain.load(path)
    done: dict[Step, StageResult] = {}
    for step in graph(domain):
        if step.name == until:
            break
        try:
            with rules(make=step.name in ("shard", "evaluate", "report")):
                done[step] = step.call(domain, done.__getitem__)
        except NotMade as missing:
            done[step] = fabricate(domain, missing, next(iter(done.values())))
    return {step.label: result for step, result in done.items()} | {step.name: each for step, each in done.items()}


def fabricate(domain: Domain, missing: NotMade, shards: StageResult) -> StageResult:
    """What the stage would have written, with made-up content."""
    store, generator = open_store(domain), np.random.default_rng(0)
    index, classes = read_index(store.open(shards.ref)), len(domain.classes)
    n = index.height
    means = generator.normal(size=(classes, DIM)).astype(np.float32)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    truth = index["path"].str.strip_suffix(".png").cast(pl.Int64).to_numpy() % classes
    writer = store.writer(domain.name, missing.stage, missing.version, missing.inputs)
    counts = {"images": n, "texts": n, "dropped": 0, "kept_by_floor": 0, "groups": n}
    files: dict[str, bytes] = {}
    if missing.stage == "embed":
        features = means[truth] + 0.12 * generator.normal(size=(n, DIM)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        table = pl.DataFrame({"key": index["key"], "norm": np.ones(n, np.float32), "feature": features})
        labels = {"key": index["key"], "label": truth, "probabilities": [[0.5]] * n}
        files = {
            "all.features.parquet": parquet(table),
            "zero_shot.parquet": parquet(pl.DataFrame(labels)),
            "classes.safetensors": safetensors(text_features=means, centre=features.mean(axis=0)),
        }
    elif missing.stage == "describe":
        rows = [{"member_keys": [key], "text": f"a picture of {key}"} for key in index["key"]]
        schema = {"member_keys": pl.List(pl.String), **CAPTION_SCHEMA}
        files = {"shard-00000.captions.parquet": parquet(pl.DataFrame(rows, schema=schema))}
    elif missing.stage == "screen":
        for kind, size in (("images", 1), ("groups", 4)):
            keys = index["key"].to_list()
            table = pl.DataFrame(
                {
                    "caption_key": [f"{kind}{number}" for number in range(n)],
                    "member_keys": [[keys[(number + i) % n] for i in range(size)] for number in range(n)],
                    "index": [0] * n,
                    "label": truth,
                    "text": [f"a picture of thing {number}" for number in range(n)],
                    "detail": [""] * n,
                    "flags": [["repeats"] if number % 9 == 0 else [] for number in range(n)],
                    "weight": np.arange(n) % 50 > 0,
                    "clip_score": np.full(n, 0.3, np.float32),
                    "clip_score_shuffled": np.full(n, 0.1, np.float32),
                },
                schema_overrides={"flags": pl.List(pl.String), "weight": pl.Float64},
            )
            files[f"{kind}.parquet"] = parquet(table)
    elif missing.stage == "tune":
        for name in [f"{method}.seed-{seed}" for method in domain.method for seed in SEEDS]:
            moved = means + 0.05 * generator.normal(size=means.shape).astype(np.float32)
            moved /= np.linalg.norm(moved, axis=1, keepdims=True)
            scale = np.array([20.0], np.float32)
            files[f"{name}.safetensors"] = safetensors(prototypes=moved, centre=np.zeros(DIM, np.float32), scale=scale)
            files[f"{name}.history.json"] = json.dumps([{"loss": 1.0}] * 5).encode()
    elif missing.stage == "select":
        files = {"selection.json": json.dumps({"models": [], "chosen": None}).encode()}
    if files:
        writer.put("all", {}, files, rows=n)
    artifact = writer.finish(counts)
    return StageResult(artifact.ref, missing.label, True, 1.0, artifact.counts)


if __name__ == "__main__":
    main()
