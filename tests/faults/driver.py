"""Runs a workload in processes that can be killed.

The parent imports everything once, stays single-threaded, and forks a child for each run, so that a kill costs a tenth
of a second and not an import of torch. It reads one JSON command a line from stdin and answers with one JSON line: for
each worker its exit status (negative: the signal that ended it) and what it printed on stderr.

Commands::

    work      storage | pipeline | embed | compact
    range     shards of `embed`: those of a worker; without it, what the run does that waited for workers
    domain    domain file
    store     URL that replaces the domain file's
    env       environment of the workers (credentials, endpoint)
    workers   how many start at once
    refresh   stages to make anew
    kill      {"moment": before | half | written | linked | after, "commit": n}: SIGKILL to itself at the n-th commit
    seconds   SIGKILL from outside after so long
    clock     what time.time() says, in seconds; "wild" for another answer at every call
    journal   file that gets a line for each commit and each finished part
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

import latteflow.storage.objects
from latteflow.storage.artifacts import ArtifactRef, ArtifactStore, ArtifactWriter
from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import read_index, read_records
from latteflow.storage.tables import parquet, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import anew, open_store, rules, run_stage
from latteflow.tasks.ingest.shard import shard

MOMENTS = ("before", "half", "written", "linked", "after")
"""Before a commit; with half the temporary file written; with all of it; with the object in place and the temporary
file still there; after the commit."""


def storage_work(domain: Domain) -> None:
    """The real `shard` stage, and a stage that describes each image through the caption store, in parts of a shard."""
    store = open_store(domain)
    images = shard(domain, "train")
    describe(store, domain, images.ref)


def describe(store: ArtifactStore, domain: Domain, images: ArtifactRef) -> None:
    """A stage of storage alone: a text for each image, once, whatever happens; another one if it is made anew."""
    shards = store.open(images)
    captions = CaptionStore(store.objects)
    who = describer_id({"kind": "image", "model": "test"})

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        index = read_index(shards)
        for (name,), rows in index.group_by("shard", maintain_order=True):
            inputs = {"members": rows["sha256"].to_list()}
            if writer.find(str(name), inputs) is None:
                keys = {digest: caption_key(who, [digest]) for digest in rows["sha256"]}
                known = set() if anew() else set(captions.get(who, keys.values())["caption_key"])
                new = {
                    record.sha256: {
                        "caption_key": keys[record.sha256], "kind": "image", "members": [record.sha256],
                        "text": f"{len(record.data)} bytes, {record.sha256}{', anew' * anew()}",
                        "flags": [], "model": "test",
                    }
                    for record in read_records(shards, rows)
                    if keys[record.sha256] not in known
                }  # fmt: skip
                if new:
                    captions.add(who, pl.DataFrame(list(new.values()), schema=CAPTION_SCHEMA), anew=anew())
                wanted = rows.select("key", caption_key=pl.col("sha256").replace_strict(keys, return_dtype=pl.String))
                texts = wanted.join(captions.get(who, keys.values()), on="caption_key", maintain_order="left")
                file = parquet(texts.select("key", "text"))
                writer.put(str(name), inputs, {f"{name}.texts.parquet": file}, rows=texts.height)
        return {"texts": index.height}

    run_stage(store, domain, "describe", 1, {"images": images.digest}, body)


def pipeline_work(domain: Domain) -> None:
    """All stages."""
    from latteflow.flows.pipeline import run_plainly

    run_plainly(domain)


def embed_work(domain: Domain, shards: list[int] | None) -> None:
    """A worker's range of features; or, without one, the stage that finishes them."""
    from latteflow.tasks.ingest.embed import embed, embed_range

    images = shard(domain, "train")
    if shards is None:
        embed(domain, images)
    else:
        embed_range(domain, images, *shards)


def compact_work(domain: Domain) -> None:
    """Compaction of all texts of a store."""
    captions = CaptionStore(open_store(domain).objects)
    for who in captions.describers():
        captions.compact(who)


def read_texts(store: ArtifactStore, domain: str) -> list[tuple[str, str]]:
    """What a reader of the `describe` artifact of :func:`storage_work` sees: one row for each image."""
    (artifact,) = store.all(domain, "describe")
    frames = [read_parquet(artifact.read(name)) for name in artifact.names(".texts.parquet")]
    return sorted(row for frame in frames for row in frame.iter_rows())


class Journal:
    """Lines that survive the process: one write to a file opened for appending."""

    def __init__(self, path: str | None) -> None:
        self._handle = os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, *words: str) -> None:
        os.write(self._handle, (" ".join(words) + "\n").encode())


def watch(journal: Journal, kill: Mapping[str, Any] | None) -> None:
    """Count the commits of this process, and end it at the chosen one."""
    moment, chosen = (kill["moment"], kill["commit"]) if kill else ("", -1)
    count = itertools.count()
    now = {"number": -1}

    def die(at: str) -> None:
        if now["number"] == chosen and at == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(self: ObjectStore, key: str, *args: Any) -> Any:
            now["number"] = next(count)
            die("before")
            result = method(self, key, *args)
            if result is not False:
                journal.add(name, key)
            die("after")
            return result

        return call

    for name in ("put_if_absent", "put", "delete"):
        setattr(ObjectStore, name, counted(getattr(ObjectStore, name), name))

    plain_temporary, plain_sync, plain_part = (
        ObjectStore._temporary,
        latteflow.storage.objects._sync_folder,
        ArtifactWriter.put,
    )

    @contextlib.contextmanager
    def temporary(self: ObjectStore, target: Path, data: bytes | Path) -> Iterator[Path]:
        if now["number"] == chosen and moment == "half":
            body = data.read_bytes() if isinstance(data, Path) else data
            with plain_temporary(self, target, body[: len(body) // 2]):
                die("half")
        with plain_temporary(self, target, data) as path:
            die("written")
            yield path

    def sync(folder: Path) -> None:
        plain_sync(folder)
        die("linked")

    def part(self: ArtifactWriter, name: str, inputs: Mapping[str, Any], *args: Any, **named: Any) -> Any:
        journal.add("part", self._stage, name, self.part_fingerprint(name, inputs))
        return plain_part(self, name, inputs, *args, **named)

    ObjectStore._temporary = temporary  # type: ignore[method-assign]
    latteflow.storage.objects._sync_folder = sync
    ArtifactWriter.put = part  # type: ignore[method-assign]


def set_clock(clock: float | str | None) -> None:
    """Let the process believe that it is another time."""
    if clock is not None:
        dice = random.Random(0)
        time.time = lambda: dice.uniform(0, 4e9) if clock == "wild" else float(clock)
        time.time_ns = lambda: int(time.time() * 1e9)


def work(command: Mapping[str, Any]) -> None:
    """What a child does."""
    os.environ.update(command.get("env", {}))
    domain = Domain.load(command["domain"])
    if "store" in command:
        domain = domain.model_copy(update={"store": command["store"]})
    watch(Journal(command.get("journal")), command.get("kill"))
    set_clock(command.get("clock"))
    with rules(refresh=command.get("refresh", ())):
        works: dict[str, Callable[[Domain], None]] = {
            "storage": storage_work,
            "pipeline": pipeline_work,
            "embed": lambda domain: embed_work(domain, command.get("range")),
            "compact": compact_work,
        }
        works[command["work"]](domain)


def fork(command: Mapping[str, Any], stderr: int) -> int:
    """Start a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(stderr, 2)
        work(command)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(command: Mapping[str, Any]) -> dict[str, Any]:
    """Fork the workers, wait for all of them."""
    files = [os.memfd_create("stderr") for _ in range(command.get("workers", 1))]
    children = [fork(command, file) for file in files]
    if "seconds" in command:
        time.sleep(command["seconds"])
        for child in children:
            os.kill(child, signal.SIGKILL)  # not yet waited for, so the id is still its own
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = []
    for file in files:
        with os.fdopen(file, "rb") as stream:
            stream.seek(0)
            said.append(stream.read().decode(errors="replace")[-4000:])
    return {"statuses": statuses, "stderr": said}


def main() -> None:
    late = (
        ("latteflow.flows.adapt", "latteflow.models.methods.latteclip.tuning", "open_clip")
        if "pipeline" in sys.argv[1:]
        else ("s3fs",)
    )
    for name in late:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may speak on stdout
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    print(json.dumps({"threads": sorted(threads)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
