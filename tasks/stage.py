"""What every stage shares: look for the artifact, else make it; say which; keep the numbers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from storage.artifacts import Artifact, ArtifactRef, ArtifactStore, ArtifactWriter
from storage.errors import StorageError
from storage.objects import ObjectStore
from tasks.domain import Domain

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
) -> StageResult:
    """Return the artifact made from ``inputs``, making it with ``body`` if it is not there.

    Args:
        version: code version of the stage, raised when the same inputs give other results.
        inputs: everything the artifact depends on, as JSON values and digests; no paths of this machine.
        body: puts parts into the writer and returns the counts that parts do not carry.
        split: shown beside the stage's name where a stage runs once for each split.
    """
    label = f"{stage} {split}".strip()
    found = store.find(domain.name, stage, version, inputs)
    if found is not None:
        log.info("%s cached %s", label, _shown(found.counts))
        return StageResult(found.ref, label, True, _seconds(store, found), found.counts)
    begin = time.perf_counter()
    writer = store.writer(domain.name, stage, version, inputs)
    counts = body(writer)
    artifact = writer.finish(counts, _versions())
    seconds = time.perf_counter() - begin
    stats = {"seconds": round(seconds, 3), "parts_reused": writer.reused, **artifact.counts}
    store.objects.put(f"{domain.name}/{stage}/{artifact.fingerprint}/stats.json", json.dumps(stats).encode())
    log.info("%s done %s wall_s=%.1f parts_reused=%d", label, _shown(artifact.counts), seconds, writer.reused)
    return StageResult(artifact.ref, label, False, seconds, artifact.counts)


def _seconds(store: ArtifactStore, artifact: Artifact) -> float:
    key = f"{artifact.domain}/{artifact.stage}/{artifact.fingerprint}/stats.json"
    try:
        return float(json.loads(store.objects.read(key))["seconds"])
    except (StorageError, ValueError, KeyError, TypeError):
        return 0.0  # statistics are never trusted, and their loss stops nothing


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
