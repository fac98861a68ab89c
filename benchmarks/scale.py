"""What a run costs that finds nearly everything made, by the number of images: time and memory of a process each.

Builds a store of N images with tiny bytes, made-up features and texts, through the product's own writers, and keeps it
for the next time. Then each step runs in a process of its own on every store, and, in turn with it, the same step of an
older commit, so that ratios are of one run.

    python -m benchmarks.scale --images 20000 200000 [--against REV] [--steps plan worker] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

CLASSES = 100
SHARD = 200
"""Images in a shard, so that two million are in 10,000 shards."""
WRITTEN = 20_000
"""Texts in a part of the caption store before it is compacted."""
RANGE = 50
"""Shards of the range whose worker is started: the last ones."""
DOMAIN = """\
name: scale
source: images
classes: [{classes}]
describer: {{kind: openai, url: "http://127.0.0.1:9/v1", model: made-up, revision: "1", prompts: caltech101}}
method: transduction
shard: {{images: {shard}}}
store: store
output: runs
"""

Step = Callable[[Path], object]


# The steps. A further one is a function of the store's folder, and a line in STEPS.


def nothing(folder: Path) -> None:
    """What the imports take."""


def plan_one_new(folder: Path) -> object:
    """`plan`, where one image is new."""
    from latteflow.flows.plan import plan
    from latteflow.tasks.core.domain import Domain

    with _one_new_image(folder):
        planned = plan(Domain.load(folder / "domain.yaml"))
    texts = next(each for each in planned if each.label == "describe")
    assert texts.work in (1, 1 + SHARD), texts  # those of the last shard are not in the caption store
    return texts.work


def resume(folder: Path) -> object:
    """`run`, where everything is there."""
    from latteflow.flows.pipeline import run_plainly
    from latteflow.tasks.core.domain import Domain

    found = run_plainly(Domain.load(folder / "domain.yaml"))
    assert all(each.cached for each in found), [each.label for each in found if not each.cached]
    return len(found)


def worker(folder: Path) -> object:
    """The start of a worker of a range, till it knows which of its texts are missing: those of the last shard."""
    from latteflow.storage.artifacts import ArtifactRef
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import StageResult
    from latteflow.tasks.describe import describe

    domain = Domain.load(folder / "domain.yaml")
    made = json.loads((folder / "made.json").read_text())
    shards, embedded = (StageResult.of(ArtifactRef(**made[name])) for name in ("shard", "embed"))
    last = made["shards"]
    first = max(0, last - RANGE)
    if "first" in inspect.signature(describe.missing_texts).parameters:
        missing = sum(describe.missing_texts(domain, shards, embedded, first, last))
    else:  # of before it could be asked of a range
        asked: Any = describe._Asked(domain, shards, embedded)
        found = [asked.of(number) for number in range(first, last)]
        each = [texts.missing([one[kind] for one in found]) for kind, texts in asked.texts.items()]
        missing = sum(map(sum, each))
    assert missing >= 2 * SHARD, missing  # more where the store was built when other images made a group
    return missing


def labels(folder: Path) -> object:
    """What `embed` does where workers have made the features of all shards: pseudo-labels, into a store of its own.

    The features must be as wide as those of the default model: --dim 1280.
    """
    from latteflow.storage.artifacts import ArtifactRef
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import StageResult
    from latteflow.tasks.ingest.embed import embed

    domain, made = Domain.load(folder / "domain.yaml"), json.loads((folder / "made.json").read_text())
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / "scale/embed").mkdir(parents=True)
        for name in ("shard", "embed/data", "embed/parts"):
            (Path(scratch) / "scale" / name).symlink_to((folder / "store/scale" / name).resolve())
        domain = domain.model_copy(update={"store": scratch})
        found = embed(domain, StageResult.of(ArtifactRef(**made["shard"])))
    assert found.counts["images"] == made["images"]
    return found.counts["images"]


STEPS: Mapping[str, Step] = {
    "imports": nothing,
    "plan": plan_one_new,
    "resume": resume,
    "worker": worker,
    "labels": labels,
}


# The store.


def build(folder: Path, images: int, dim: int) -> Path:
    """A domain whose every stage is in its store, but for the texts of the last shard in the caption store."""
    from latteflow.flows.pipeline import graph
    from latteflow.storage.captions import CaptionStore
    from latteflow.tasks.core.domain import Domain
    from latteflow.tasks.core.stage import NotMade, open_store, rules

    if (folder / "made.json").exists():
        return folder
    os.fsync = lambda handle: None  # type: ignore[assignment, misc]  # a store that may be lost is made much faster
    index = _images(folder, images)
    (folder / "domain.yaml").write_text(
        DOMAIN.format(classes=", ".join(f"thing {number}" for number in range(CLASSES)), shard=SHARD)
    )
    domain = Domain.load(folder / "domain.yaml")
    _remember(domain, index)
    done: dict[Any, Any] = {}
    made = _Made(open_store(domain), domain, index, dim)
    for step in graph(domain):
        try:
            with rules(make=False):
                done[step] = step.call(domain, done.__getitem__)
        except NotMade as missing:
            done[step] = made.stage(missing)
    for kind in ("image", "group"):  # as a run does before it gives ranges to workers
        CaptionStore(open_store(domain).objects).tidy(made.who[kind])
    refs = {step.name: asdict(done[step].ref) for step in done}
    (folder / "made.json").write_text(json.dumps({"images": images, "shards": made.shards, **refs}))
    return folder


def _images(folder: Path, images: int) -> pl.DataFrame:
    """Tars that nobody opens, and what is in them: path, container, place, sha256, key, shard; by shard and key."""
    from latteflow.storage.listing import key_of

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for shard in range(-(-images // SHARD)):
        tar = folder / "images" / f"c-{shard:06d}.tar"
        if not tar.exists():  # a store whose building was stopped is taken up
            tar.write_bytes(b"x")
    number = np.arange(images)
    frame = pl.DataFrame({"place": number}).with_columns(
        sha256=_hex(images, 32, seed=1),
        container=pl.format("c-{}.tar", (pl.col("place") // SHARD).cast(pl.String).str.zfill(6)),
        shard=pl.format("shard-{}", (pl.col("place") // SHARD).cast(pl.String).str.zfill(5)),
    )
    frame = frame.with_columns(path=pl.format("{}/{}.png", "container", pl.col("place").cast(pl.String).str.zfill(8)))
    keys = [key_of(*row) for row in frame.select("path", "sha256").iter_rows()]
    return frame.with_columns(key=pl.Series(keys)).sort(pl.col("place") // SHARD, "key")


def _remember(domain: Any, index: pl.DataFrame) -> None:
    """The stat cache, as if all of it had been read before."""
    from latteflow.storage.listing import Listing, StatCache
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.ingest.shard import open_source

    cache = StatCache(open_store(domain).objects, f"{domain.name}/shard/stat-train.parquet")
    stamps = {entry.path: entry.stamp for entry in open_source(domain, "train").files()}
    rows = index.with_columns(stamp=pl.col("container").replace_strict(stamps, return_dtype=pl.Int64), size=pl.lit(1))
    with Listing() as listing:
        columns = rows.select("path", "stamp", "size", "container", "place", "sha256", "key").sort("path")
        listing.fill("image", columns.iter_rows())
        cache._write(listing)


class _Made:
    """What the stages would have written, with made-up content, one part for each shard."""

    def __init__(self, store: Any, domain: Any, index: pl.DataFrame, dim: int) -> None:
        self._store, self._domain, self._index, self._dim = store, domain, index, dim
        self._by_shard = [(str(name), rows) for (name,), rows in index.group_by("shard", maintain_order=True)]
        self.shards = len(self._by_shard)
        self.who: dict[str, str] = {}
        label = np.random.default_rng(2).integers(CLASSES, size=index.height)
        self._labels = pl.DataFrame({"key": index["key"], "label": label})

    def stage(self, missing: Any) -> Any:
        from latteflow.tasks.core.stage import StageResult

        writer = self._store.writer(self._domain.name, missing.stage, missing.version, missing.inputs)
        fill: Callable[[Any, Mapping[str, Any]], None] = getattr(self, f"_{missing.stage}", self._other)
        fill(writer, missing.inputs)
        artifact = writer.finish({"images": self._index.height})
        if missing.stage == "report":
            self._store.objects.put(f"{artifact.domain}/report/{artifact.fingerprint}/stats.json", b'{"seconds": 1}')
        return StageResult(artifact.ref, missing.label, True, 1.0, artifact.counts)

    def _other(self, writer: Any, inputs: Mapping[str, Any]) -> None:
        writer.put("all", {}, {f"{writer._stage}.html" if writer._stage == "report" else "metrics.json": b"{}"})

    def _shard(self, writer: Any, inputs: Mapping[str, Any]) -> None:
        from latteflow.storage.shards import INDEX_SCHEMA
        from latteflow.storage.tables import parquet

        sizes = {"offset": pl.int_range(pl.len()) * 1024 + 512, "bytes": 1, "width": 1, "height": 1}
        columns = {
            name: (pl.lit(value) if isinstance(value, int) else value).cast(INDEX_SCHEMA[name])
            for name, value in sizes.items()
        }
        for number, (name, rows) in enumerate(self._by_shard):
            table = rows.with_columns(**columns).select(*INDEX_SCHEMA)
            files = {f"{name}.tar": number.to_bytes(8, "big"), f"{name}.index.parquet": parquet(table)}
            writer.put(name, {"images": number}, files, rows=table.height)
        nothing = pl.DataFrame(schema={"key": pl.String, "path": pl.String})
        twice = pl.DataFrame(schema={"key": pl.String, "duplicate_of": pl.String, "dropped": pl.Boolean})
        writer.put("state", {}, {"removed.parquet": parquet(nothing), "duplicates.parquet": parquet(twice)})

    def _embed(self, writer: Any, inputs: Mapping[str, Any]) -> None:
        from latteflow.storage.tables import parquet, safetensors

        random = np.random.default_rng(3)
        for number, (name, rows) in enumerate(self._by_shard):
            features = random.standard_normal((rows.height, self._dim), dtype=np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            table = pl.DataFrame(
                {"key": rows["key"], "norm": np.ones(rows.height, np.float32), "feature": features},
                schema={"key": pl.String, "norm": pl.Float32, "feature": pl.Array(pl.Float32, self._dim)},
            )
            own = {"shard": hashlib.sha256(number.to_bytes(8, "big")).hexdigest(), "clip": inputs["clip"]}
            writer.put(name, own, {f"{name}.features.parquet": parquet(table)}, rows=rows.height)
        labels = self._labels.with_columns(
            labels=pl.concat_list([pl.col("label")] * 5), probabilities=pl.lit([0.2] * 5, pl.List(pl.Float32))
        )
        classes = random.standard_normal((CLASSES, self._dim), dtype=np.float32)
        arrays = safetensors(
            text_features=classes / np.linalg.norm(classes, axis=1, keepdims=True),
            centre=np.zeros(self._dim, np.float32),
            share=np.zeros(1, np.float32),
        )
        files = {"zero_shot.parquet": parquet(labels), "classes.safetensors": arrays}
        writer.put("zero_shot", {}, files, rows=labels.height)

    def _describe(self, writer: Any, inputs: Mapping[str, Any]) -> None:
        from latteflow.storage.captions import caption_key
        from latteflow.storage.tables import parquet

        (prompt,) = self._domain.prompt_pack.image
        who = self._who("image", inputs["describer"])
        keys = [caption_key(who, [content], prompt) for content in self._index["sha256"]]
        self._say("image", prompt, pl.Series(keys))
        table = parquet(pl.DataFrame({"caption_key": [""]}))  # which no step reads
        for name, rows in self._by_shard:
            writer.put(name, {"texts": name}, {f"{name}.captions.parquet": table}, rows=rows.height)

    def _group(self, writer: Any, inputs: Mapping[str, Any]) -> None:
        from latteflow.storage.tables import parquet

        (prompt,) = self._domain.prompt_pack.group
        self._who("group", inputs["describer"])
        self._say("group", prompt, _hex(self._index.height, 32, seed=5))  # about groups that nobody asks about
        writer.put("groups", {}, {"groups.parquet": parquet(pl.DataFrame({"caption_key": [""]}))})

    def _who(self, kind: str, identity: Mapping[str, Any]) -> str:
        from latteflow.storage.captions import describer_id

        self.who[kind] = describer_id({"kind": kind, **identity})
        return self.who[kind]

    def _say(self, kind: str, prompt: str, keys: pl.Series) -> None:
        """Texts of all shards but the last into the caption store, in parts as a worker writes them, then compacted."""
        from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore

        pack, n = self._domain.prompt_pack, self._index.height
        words = [f"a {hashlib.sha256(bytes([number])).hexdigest()[:6]} thing" for number in range(256)]
        said = np.random.default_rng(4).integers(256, size=(3, n))
        table = (
            pl.DataFrame({"caption_key": keys, "members": self._index["sha256"]})
            .with_columns(
                members=pl.concat_list("members"),
                kind=pl.lit(kind),
                text=pl.concat_str([pl.Series(words).gather(row) for row in said], separator=" beside "),
                flags=pl.lit([], pl.List(pl.String)),
                finish_reason=pl.lit("stop"),
                prompt_tokens=pl.lit(300, pl.Int32),
                output_tokens=pl.lit(20, pl.Int32),
                model=pl.lit("made-up"),
                revision=pl.lit("1"),
                prompt_id=pl.lit(pack.id),
                prompt=pl.lit(prompt),
                sampling=pl.lit("{}"),
                engine=pl.lit("none"),
                detail=pl.lit("", pl.String),
            )
            .select(*CAPTION_SCHEMA)
        )
        captions, known = CaptionStore(self._store.objects), n - (n % SHARD or SHARD)
        for start in range(0, known, WRITTEN):
            captions.add(self.who[kind], table[start : min(start + WRITTEN, known)])
        captions.compact(self.who[kind])


def _hex(count: int, size: int, seed: int) -> pl.Series:
    whole = np.random.default_rng(seed).bytes(count * size).hex()
    return pl.Series([whole[start : start + 2 * size] for start in range(0, len(whole), 2 * size)])


@contextmanager
def _one_new_image(folder: Path) -> Iterator[None]:
    """A tar with one image that no run has seen; afterwards all is as before."""
    import io
    import tarfile

    from PIL import Image

    cache = folder / "store/scale/shard/stat-train.parquet"
    before, new = cache.read_bytes(), folder / "images" / "new.tar"
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(out, "PNG")
    with tarfile.open(new, "w") as tar:
        member = tarfile.TarInfo("new.png")
        member.size = len(out.getvalue())
        tar.addfile(member, io.BytesIO(out.getvalue()))
    try:
        yield
    finally:
        new.unlink()
        cache.write_bytes(before)


# Measuring.


def measure(step: str, folder: Path) -> dict[str, float]:
    """Seconds, seconds of processor time, and the most MiB of a step in this process."""
    import latteflow.flows.plan  # what all steps import is not counted
    import latteflow.tasks.describe.describe  # noqa: F401

    begin, busy = time.perf_counter(), time.process_time()
    STEPS[step](folder)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
    # Not ru_maxrss: that goes on from the process before exec.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu": cpu, "mib": int(peak.split()[1]) / 1024}


def _measured(step: str, folder: Path, code: Path) -> dict[str, float]:
    """As :func:`measure`, in a process of its own with the code below a folder."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--step", step, str(folder)],
        stdout=subprocess.PIPE, text=True, check=True, cwd=code, env={**os.environ, "PYTHONPATH": str(code)},
    )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _tree(revision: str) -> Iterator[Path]:
    """The code of a commit, in a folder of its own."""
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "code"
        subprocess.run(["git", "-C", here, "worktree", "add", "--detach", "-q", folder, revision], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "-C", here, "worktree", "remove", "--force", folder], check=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, nargs="+", default=[20_000, 200_000])
    options.add_argument("--against", metavar="REV", help="run the same steps of this commit, in turn")
    options.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS][:-1])
    options.add_argument("--times", type=int, default=1, help="the fastest of so many counts")
    options.add_argument("--dim", type=int, default=512, help="of the features")
    options.add_argument("--folder", type=Path, help="build stores here, and keep them for the next time")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.folder or Path(scratch)
        stores = {images: build(root / str(images), images, chosen.dim) for images in chosen.images}
        if chosen.against:
            with _tree(chosen.against) as before:
                _compare(stores, chosen.steps, chosen.times, {"before": before, "now": Path(__file__).parents[1]})
        else:
            _compare(stores, chosen.steps, chosen.times, {"now": Path(__file__).resolve().parents[1]})


def _compare(stores: Mapping[int, Path], steps: list[str], times: int, codes: Mapping[str, Path]) -> None:
    heads = [f"{images:,}, {name}" for images in stores for name in codes]
    sys.stdout.write(f"| step | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}\n")
    for step in steps:
        cells = []
        for folder in stores.values():
            found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
            for _ in range(times):
                for name, code in codes.items():
                    found[name].append(_measured(step, folder, code))
            for runs in found.values():
                seconds, cpu, mib = (min(run[name] for run in runs) for name in ("seconds", "cpu", "mib"))
                cells.append(f"{seconds:.2f} s ({cpu:.2f}), {mib:.0f} MiB")
        sys.stdout.write(f"| {step} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        sys.stdout.write(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))) + "\n")
    else:
        main()
