"""What was made before: a domain's artifacts, newest first, how long they took, and why a stage is none of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.fingerprint import difference
from latteflow.storage.inventory import Inventory, Made
from latteflow.tasks.core.stage import NotMade

SPLIT_STAGES = ("shard", "embed")
"""Stages that run once for each split."""
_RUNS = 20
"""Earlier runs of a stage that an estimate looks at."""


class History:
    """The artifacts of a domain. Nothing is read before it is asked for."""

    def __init__(self, store: ArtifactStore, domain: str) -> None:
        self.store, self.domain = store, domain

    @functools.cached_property
    def inventory(self) -> Inventory:
        return Inventory(self.store, self.domain)

    @functools.cached_property
    def _by_digest(self) -> dict[str, Artifact]:
        return {made.artifact.ref.digest: made.artifact for made in reversed(self.inventory.all())}

    def newest(self, stage: str, split: str = "train") -> Made | None:
        """The newest complete artifact of a stage (of this split, where the stage runs for each split)."""
        return next((made for made in self.inventory.made(stage) if self._is_of(made.artifact, split)), None)

    def newest_run(self) -> dict[str, Artifact]:
        """The artifacts of the newest complete run by label, as its report names them; empty if there is none."""
        for made in self.inventory.made("report"):
            found = {
                label: artifact
                for label, digest in made.artifact.inputs["stages"].items()
                if (artifact := self._by_digest.get(digest)) is not None
            }
            if len(found) == len(made.artifact.inputs["stages"]):
                return {**found, "report": made.artifact}
        return {}

    def label(self, artifact: Artifact) -> str:
        """Stage and, where it runs for each split, the split."""
        if artifact.stage == "shard":
            return f"shard {artifact.inputs['split']}"
        if artifact.stage == "embed":
            images = self._by_digest.get(artifact.inputs["shards"])
            return f"embed {images.inputs['split']}" if images is not None else "embed"
        return artifact.stage

    def find(self, name: str) -> Artifact:
        """The artifact that somebody means by a label (its newest), the beginning of a fingerprint, or STAGE/beginning.

        Raises:
            DataError: there is none, or there are several.
        """
        stage, _, split = name.partition(" ")
        for made in self.inventory.made(stage):
            if not split or self.label(made.artifact) == name:
                return made.artifact
        stage, _, prefix = name.removeprefix(f"{self.domain}/").rpartition("/")
        every = [made.artifact for made in self.inventory.all()]
        found = [each for each in every if each.fingerprint.startswith(prefix) and stage in ("", each.stage)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise DataError(
                f"domain {self.domain!r} has no artifact {name!r}; give a stage ({', '.join(self.inventory.stages)}) "
                "or the beginning of a fingerprint, as `latteflow show` lists them"
            )
        some = ", ".join(f"{each.stage}/{each.fingerprint[:12]}" for each in found[:5])
        raise DataError(f"{name!r} fits {len(found)} artifacts: {some}; give more of the fingerprint")

    def in_words(self, value: Any) -> Any:
        """Inputs with their digests as words: ``shard train 1a2b3c4d5e6f`` where the artifact is still there."""
        if isinstance(value, Mapping):
            return {name: self.in_words(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.in_words(each) for each in value]
        if isinstance(value, str) and len(value) == 64:
            artifact = self._by_digest.get(value)
            return f"{self.label(artifact)} {artifact.fingerprint[:12]}" if artifact is not None else value[:12]
        return value

    def difference(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """Why two fingerprints differ, one line for each named input, digests as words."""
        return difference(self.in_words(old), self.in_words(new))

    def why(self, missing: NotMade, split: str, told: Collection[str] = ()) -> list[str]:
        """Why a stage has no artifact: how its inputs differ from those of its newest one.

        Args:
            told: inputs that need no further words.
        """
        newest = self.newest(missing.stage, split)
        if newest is None:
            return ["not made yet"]
        old, new = (
            {name: value for name, value in inputs.items() if name not in told}
            for inputs in (newest.artifact.inputs, missing.inputs)
        )
        lines = self.difference(old, new)
        if newest.artifact.manifest["version"] != missing.version:
            lines.insert(0, f"code of the stage: version {newest.artifact.manifest['version']} -> {missing.version}")
        return lines or ([] if told else ["its files are gone"])

    def seconds_per(self, stage: str, unit: str) -> float | None:
        """Seconds for each image, text or model in earlier runs of a stage; None where nobody knows.

        Of texts those that a describer wrote, without the start of its engine, where it was told. Small runs are mostly
        start-up, and texts that came from the caption store cost nothing: so the slowest of the runs that did at least
        a tenth of the work of the largest.
        """
        rates = []
        for stats in self._stats(stage):
            done = float(stats.get(unit, 1 if unit == "run" else 0))
            made, reused = float(stats.get("parts_made", 1)), float(stats.get("parts_reused", 0))
            work, seconds = done * made / max(made + reused, 1.0), float(stats["seconds"])
            if unit == "texts" and "writing_seconds" in stats:
                work, seconds = float(stats.get("texts_written", 0)), float(stats["writing_seconds"])
            if work > 0:
                rates.append((work, seconds / work))
        largest = max((work for work, _ in rates), default=0.0)
        return max((rate for work, rate in rates if work >= largest / 10), default=None)

    def _stats(self, stage: str) -> Iterator[Mapping[str, Any]]:
        keys = [
            (-stored.modified, key)
            for key, stored in self.inventory.objects.items()
            if key.startswith(f"{self.domain}/{stage}/") and key.endswith("/stats.json")
        ]
        for _, key in sorted(keys)[:_RUNS]:
            try:
                found = json.loads(self.store.objects.read(key))
                float(found["seconds"])
                yield found
            except (StorageError, ValueError, KeyError, TypeError):
                continue  # statistics are never trusted, and their loss stops nothing

    def _is_of(self, artifact: Artifact, split: str) -> bool:
        if artifact.stage not in SPLIT_STAGES:
            return True
        if artifact.stage == "shard":
            return bool(artifact.inputs["split"] == split)
        same = (made.artifact for made in self.inventory.made("shard"))
        return any(each.ref.digest == artifact.inputs["shards"] for each in same if self._is_of(each, split))
