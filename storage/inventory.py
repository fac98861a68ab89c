"""What a store holds, from one listing of a domain: artifacts by age, what they were made of, and what is nobody's."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import Damaged, NotFound
from latteflow.storage.lease import is_gone
from latteflow.storage.objects import ObjectStore, Stored, is_unfinished

_OWN = re.compile(
    r"[^/]+/[^/]+/(?:[0-9a-f]{64}/(?:manifest|stats|running)\.json|parts/[0-9a-f]{64}\.json"
    r"|data/[^/.]*\.[0-9a-f]{16}(?:\.[^/]*)?|damaged/[^/]*[0-9a-f]{16}[^/]*|checkpoints/[0-9a-f]+\.safetensors)"
)
"""Keys of what stages write, in a domain."""
log = logging.getLogger("latteflow.storage")
CAPTIONS = "captions"
"""The one folder of a store that is not a domain."""


@dataclass(frozen=True)
class Made:
    """An artifact and when its manifest was written."""

    artifact: Artifact
    modified: float


def domains(objects: ObjectStore) -> list[str]:
    """Folders of a store that may be domains; see :attr:`Inventory.is_domain`."""
    return [name for name in objects.names("") if name != CAPTIONS]


class Inventory:
    """One domain of a store, as it was when this object was made. What others put there is left out."""

    def __init__(self, store: ArtifactStore, domain: str) -> None:
        self.store, self.domain = store, domain
        found = store.objects.listing(domain).items()
        self.objects = {key: stored for key, stored in found if _OWN.fullmatch(key) or is_unfinished(key)}
        self._manifests: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._read: dict[str, Artifact | None] = {}
        for key, stored in self.objects.items():
            match key.split("/"):
                case [_, stage, folder, "manifest.json"] if len(folder) == 64:
                    self._manifests[stage].append((-stored.modified, key))

    @property
    def is_domain(self) -> bool:
        """Whether a stage wrote here."""
        return any(map(_OWN.fullmatch, self.objects))

    @property
    def stages(self) -> list[str]:
        """Stages with at least one manifest."""
        return sorted(self._manifests)

    def made(self, stage: str) -> Iterator[Made]:
        """The complete artifacts of a stage, newest first; each is read when it is asked for."""
        for age, key in sorted(self._manifests.get(stage, [])):
            if key not in self._read:
                self._read[key] = self._load(key)
            artifact = self._read[key]
            if artifact is not None:
                yield Made(artifact, -age)

    def all(self) -> list[Made]:
        """The complete artifacts of all stages."""
        return [made for stage in self.stages for made in self.made(stage)]

    def reachable(self, roots: Iterable[Artifact]) -> list[Artifact]:
        """Artifacts, and all that they were made from, as far as it is still there."""
        by_digest: dict[str, list[Artifact]] = defaultdict(list)
        for made in self.all():
            by_digest[made.artifact.ref.digest].append(made.artifact)
        found: dict[tuple[str, str], Artifact] = {}
        open_ = list(roots)
        while open_:
            artifact = open_.pop()
            if (artifact.stage, artifact.fingerprint) not in found:
                found[artifact.stage, artifact.fingerprint] = artifact
                open_ += [each for digest in digests(artifact.inputs) for each in by_digest.get(digest, [])]
        return list(found.values())

    def under_way(self, younger_than: float, now: float | None = None) -> list[str]:
        """Stages that were begun, not ended, and wrote something less than so many seconds ago.

        Those that a process of this machine began that is no more do not count: it may never be begun again.
        """
        limit = (time.time() if now is None else now) - younger_than
        marks = [key for key in self.objects if key.endswith("/running.json")]
        begun = {key.split("/")[1] for key in marks if not self._is_left(key)}
        alive = {key.split("/")[1] for key, stored in self.objects.items() if stored.modified > limit}
        return sorted(begun & alive)

    def _is_left(self, key: str) -> bool:
        try:
            return is_gone(json.loads(self.store.objects.read(key)))
        except NotFound:
            return True
        except (ValueError, AttributeError):
            return False

    def _load(self, key: str) -> Artifact | None:
        """The artifact of a manifest; None, with a warning, if it cannot be used."""
        base = key.rsplit("/", 2)[0]
        try:
            artifact = self.store.read_artifact(key)
        except NotFound:
            return None
        except (Damaged, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be used: %s", self.store.objects.address(key), error)
            return None
        nothing = Stored(-1, 0.0)
        whole = all(
            self.objects.get(f"{base}/data/{file.object}", nothing).bytes == file.bytes
            for _, file in artifact.files.values()
        )
        return artifact if whole else None


def digests(value: Any) -> Iterator[str]:
    """Every sha256 that is a value somewhere inside the inputs of an artifact."""
    if isinstance(value, str):
        if len(value) == 64:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from digests(each)
    elif isinstance(value, Collection):
        for each in value:
            yield from digests(each)
