"""Time and memory of `tune` by the number of images, on made-up features and texts, beside an older commit's.

    python -m benchmarks.scale_tune --images 200000 [--against REV] [--steps latteclip transduction] [--folder FOLDER]

Builds a store with the features of N images and of two texts for each, and keeps it for the next time. Each step trains
one model in a process of its own, in turn with the older commit, so that ratios are of one run. Memory is the most that
the process held, less what it holds after the imports. Nearest images are drawn, not looked for: to look for them takes
a time that grows with the square of N, which `benchmarks.transduction` shows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl

DIM, CLASSES, SHARD = 512, 100, 10_000
STEPS = ("latteclip", "transduction", "latteclip_plus")
DOMAIN = """\
name: scale
source: images
classes: [{classes}]
describer: {{kind: openai, url: "http://127.0.0.1:9/v1", model: made-up, revision: "1"}}
method: [latteclip, transduction, latteclip_plus]
latteclip: {{batch_size: 512, epochs: 1}}
transduction: {{max_steps: 10, tolerance: 0}}
seeds: [0]
store: store
output: runs
"""


def tune(folder: Path, method: str) -> None:
    """One model, anew."""
    from latteflow.storage.artifacts import ArtifactRef
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import StageResult, rules
    from latteflow.tasks.tune.tune import tune

    _without_a_clip()
    _with_drawn_neighbours()
    domain = Domain.load(folder / "domain.yaml").model_copy(update={"method": [method]})
    made = json.loads((folder / "made.json").read_text())
    embedded, screened = (StageResult.of(ArtifactRef(**made[name])) for name in ("embed", "screen"))
    with rules(refresh=["tune"]):
        tune(domain, embedded, embedded, screened)


def _without_a_clip() -> None:
    """Class sentences have drawn features: no towers are loaded, whose memory would hide that of the features."""
    from latteflow.models.towers import clip

    def text_features(texts: Any) -> np.ndarray:
        return _unit(np.random.default_rng(9), len(texts))

    import torch

    module = torch.nn.Linear(1, 1)
    made_up = SimpleNamespace(text_features=text_features, scale=50.0, device=torch.device("cpu"), model=module)
    clip.load = lambda settings: made_up  # type: ignore[assignment, return-value]
    clip.identity = lambda settings: {"model": "made up"}  # type: ignore[assignment]


def _with_drawn_neighbours() -> None:
    import torch

    from latteflow.models.methods.latteclip_plus import beliefs
    from latteflow.models.methods.latteclip_plus import tuning as plus
    from latteflow.models.methods.transduction import tuning

    pair: Any = getattr(tuning, "Neighbours", lambda rows, weights: (rows, weights))

    def nearest(features: Any, k: int) -> Any:
        draws = torch.Generator().manual_seed(0)
        rows = torch.randint(len(features), (len(features), k), generator=draws)
        return pair(rows, torch.full((len(features), k), 1 / k))

    for module in (tuning, beliefs, plus):
        if hasattr(module, "nearest"):
            module.nearest = nearest


def build(folder: Path, images: int) -> Path:
    """The artifacts that `tune` reads."""
    from latteflow.storage.tables import parquet, safetensors
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import open_store

    if (folder / "made.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    classes = ", ".join(f"thing {number}" for number in range(CLASSES))
    (folder / "domain.yaml").write_text(DOMAIN.format(classes=classes))
    store, draws = open_store(Domain.load(folder / "domain.yaml")), np.random.default_rng(0)
    keys = pl.Series("key", [f"{number:064x}" for number in range(images)])
    labels = pl.Series("label", draws.integers(CLASSES, size=images))
    writer = store.writer("scale", "embed", 1, {"images": images})
    centres = _unit(draws, CLASSES)
    for number, first in enumerate(range(0, images, SHARD)):
        own = labels[first : first + SHARD].to_numpy()
        features = centres[own] + 2 * _unit(draws, len(own))
        norms = np.linalg.norm(features, axis=1)
        table = pl.DataFrame(
            {"key": keys[first : first + SHARD], "norm": norms, "feature": features / norms[:, None]},
            schema={"key": pl.String, "norm": pl.Float32, "feature": pl.Array(pl.Float32, DIM)},
        )
        name = f"shard-{number:05d}"
        writer.put(name, {"shard": number}, {f"{name}.features.parquet": parquet(table)})
    zero_shot = pl.DataFrame([keys, labels]).with_columns(
        labels=pl.concat_list([pl.col("label")] * 5), probabilities=pl.lit([0.2] * 5, pl.List(pl.Float32))
    )
    tensors = safetensors(text_features=centres, centre=np.full(DIM, 0.01, np.float32), share=np.ones(1, np.float32))
    writer.put("zero_shot", {}, {"zero_shot.parquet": parquet(zero_shot), "classes.safetensors": tensors})
    embedded = writer.finish().ref
    writer = store.writer("scale", "screen", 1, {"images": images})
    beside = [keys.shift(step, fill_value=keys[0]).alias(f"key {step}") for step in (1, 2, 3)]
    for kind, members in (("images", [keys]), ("groups", [keys, *beside])):
        texts = pl.Series("text", [f"{kind} {number:09d} {'and a thing ' * 8}" for number in range(images)])
        table = pl.DataFrame([keys.alias("caption_key"), labels, texts]).with_columns(
            member_keys=pl.DataFrame(members).select(pl.concat_list(pl.all())).to_series(),
            index=pl.lit(0, pl.Int32),
            weight=pl.lit(1.0, pl.Float32),
        )
        read = pl.DataFrame(
            {"text": texts, "feature": _unit(draws, images)},
            schema={"text": pl.String, "feature": pl.Array(pl.Float32, DIM)},
        )
        writer.put(kind, {}, {f"{kind}.parquet": parquet(table), f"{kind}.features.parquet": parquet(read)})
    made = {"embed": asdict(embedded), "screen": asdict(writer.finish().ref)}
    (folder / "made.json").write_text(json.dumps(made))
    return folder


def _unit(draws: np.random.Generator, n: int) -> np.ndarray:
    rows = draws.standard_normal((n, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def measured(code: Path, folder: Path, step: str) -> dict[str, float]:
    """Seconds, processor seconds and megabytes of a step by the code of a checkout."""
    words = [sys.executable, __file__, "--run", step, "--folder", str(folder)]
    found = subprocess.run(
        words, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=subprocess.PIPE, check=True
    )
    numbers: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return numbers


def _run(step: str, folder: Path) -> None:
    import torch

    from latteflow.tasks.tune import inputs  # noqa: F401

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    before, begun, used = _megabytes(), time.perf_counter(), time.process_time()
    tune(folder, step)
    told = {
        "seconds": time.perf_counter() - begun,
        "processor": time.process_time() - used,
        "megabytes": _megabytes() - before,
    }
    sys.stdout.write(json.dumps(told) + "\n")


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, nargs="+", default=[200_000])
    options.add_argument("--against", help="an older commit")
    options.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "latteflow-scale-tune")
    options.add_argument("--run", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.run:
        _run(chosen.run, chosen.folder)
        return
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as older:
        if chosen.against:
            archive = subprocess.run(["git", "archive", chosen.against], cwd=here, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-x", "-C", older], input=archive.stdout, check=True)
        for images in chosen.images:
            folder = build(chosen.folder / str(images), images)
            for step in chosen.steps:
                codes = {"before": Path(older), "now": here} if chosen.against else {"now": here}
                for name, code in codes.items():
                    found = measured(code, folder, step)
                    sys.stdout.write(
                        f"{images} images, {step}, {name}: {found['seconds']:.1f} s, {found['processor']:.1f} s of "
                        f"processor time, {found['megabytes']:.0f} MB\n"
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
