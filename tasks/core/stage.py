"""What every stage shares: look for the artifact, else make it; say which; keep the numbers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType
from typing import Any

from latteflow.storage.anew import AnewWriter
from latteflow.storage.artifacts import Artifact, ArtifactRef, ArtifactStore, ArtifactWriter
from latteflow.storage.errors import StorageError
from latteflow.storage.fingerprint import fingerprint
from latteflow.storage.lease import holder
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import told_as

log = logging.getLogger("latteflow.tasks")
_LIBRARIES = ("torch", "open_clip_torch", "timm", "transformers", "polars", "pillow", "numpy", "vllm")


@dataclass(frozen=True)
class StageResult:
    """What a stage hands on: a small reference, and how it came about."""

    ref: ArtifactRef
    label: str
    """Stage and, where it runs twice, the split: ``embed test``."""
    cached: bool
    """True if the artifact was there already."""
    seconds: float
    """Wall time of the run that made the artifact."""
    counts: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, ref: ArtifactRef) -> StageResult:
        """The result of a stage that ran elsewhere."""
        return cls(ref, ref.stage, cached=True, seconds=0.0)


class NotMade(Exception):
    """Under ``rules(make=False)``: the stage has no artifact from these inputs, and would run."""

    def __init__(self, label: str, stage: str, version: int, inputs: Mapping[str, Any]) -> None:
        super().__init__(f"{label} is not made yet")
        self.label, self.stage, self.version, self.inputs = label, stage, version, inputs

    def changes(self, old: Artifact) -> set[str]:
        """Names of the inputs that an artifact of the stage does not have as they are now."""
        names = self.inputs.keys() | old.inputs.keys()
        return {name for name in names if self.inputs.get(name) != old.inputs.get(name)}


@dataclass(frozen=True)
class _Rules:
    make: bool = True
    refresh: frozenset[str] = frozenset()


_PLAIN = _Rules()
_rules: ContextVar[_Rules] = ContextVar("rules", default=_PLAIN)
_anew: ContextVar[bool] = ContextVar("anew", default=False)


@contextlib.contextmanager
def rules(*, make: bool = True, refresh: Collection[str] = ()) -> Iterator[None]:
    """How the stages called inside behave.

    Args:
        make: False: a stage whose artifact is not there raises :class:`NotMade` instead of running.
        refresh: stages that are made anew though their artifact is there.
    """
    token = _rules.set(_Rules(make, frozenset(refresh)))
    try:
        yield
    finally:
        _rules.reset(token)


def anew() -> bool:
    """Whether the stage that is running was asked to take nothing from earlier work."""
    return _anew.get()


def open_store(domain: Domain) -> ArtifactStore:
    """The domain's artifact store."""
    return ArtifactStore(ObjectStore(domain.store, single_writer=domain.single_writer))


def run_stage(
    store: ArtifactStore,
    domain: Domain,
    stage: str,
    version: int,
    inputs: Mapping[str, Any],
    body: Callable[[ArtifactWriter], Mapping[str, int]],
    *,
    split: str = "",
    timings: Mapping[str, float] = MappingProxyType({}),
) -> StageResult:
    """Return the artifact made from ``inputs``, making it with ``body`` if it is not there.

    Args:
        version: code version of the stage, raised when the same inputs give other results.
        inputs: everything the artifact depends on, as JSON values and digests; no paths of this machine.
        body: puts parts into the writer and returns the counts that parts do not carry.
        split: shown beside the stage's name where a stage runs once for each split.
        timings: filled by ``body``; kept with the statistics of the run.
    """
    label = f"{stage} {split}".strip()
    asked = _rules.get()
    refresh = stage in asked.refresh
    found = None if refresh else store.find(domain.name, stage, version, inputs)
    if found is not None:
        log.debug("%s cached %s", label, _shown(found.counts))
        return StageResult(found.ref, label, True, seconds_taken(store, found), found.counts)
    if not asked.make:
        raise NotMade(label, stage, version, inputs)
    begin = time.perf_counter()
    write = AnewWriter if refresh else ArtifactWriter
    writer = write(store, domain.name, stage, version, inputs)
    folder = f"{domain.name}/{stage}/{fingerprint(stage, version, inputs)}"
    with _under_way(store.objects, folder), _made_anew(refresh), told_as(label):
        artifact = writer.finish(body(writer), _versions())
    seconds = time.perf_counter() - begin
    made = len(artifact.parts) - writer.reused
    stats = {"seconds": round(seconds, 3), "parts_made": made, "parts_reused": writer.reused}
    stats |= {**artifact.counts, **timings}
    store.objects.put(f"{folder}/stats.json", json.dumps(stats).encode())
    log.info("%s done %s wall_s=%.1f parts_reused=%d", label, _shown(artifact.counts), seconds, writer.reused)
    return StageResult(artifact.ref, label, False, seconds, artifact.counts)


@contextlib.contextmanager
def _under_way(objects: ObjectStore, folder: str) -> Iterator[None]:
    # Seen by `gc`, which leaves a domain alone while one of its stages runs. A killed run leaves it to its successor.
    objects.put(f"{folder}/running.json", json.dumps(holder()).encode())
    try:
        yield
    finally:
        objects.delete(f"{folder}/running.json")


@contextlib.contextmanager
def _made_anew(value: bool) -> Iterator[None]:
    token = _anew.set(value)
    try:
        yield
    finally:
        _anew.reset(token)


def seconds_taken(store: ArtifactStore, artifact: Artifact) -> float:
    """Wall time of the run that made an artifact; 0 where that is not known."""
    return statistic(store, artifact, "seconds") or 0.0


def statistic(store: ArtifactStore, artifact: Artifact, name: str) -> float | None:
    """A number from the statistics of the run that made an artifact; None where there is none."""
    key = f"{artifact.domain}/{artifact.stage}/{artifact.fingerprint}/stats.json"
    try:
        value = float(json.loads(store.objects.read(key))[name])
    except (StorageError, ValueError, KeyError, TypeError):
        return None  # statistics are never trusted, and their loss stops nothing
    return value if math.isfinite(value) else None


def _shown(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}={number}" for name, number in sorted(counts.items()))


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
