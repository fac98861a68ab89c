"""Making an artifact that exists a second time, without a moment at which there is none.

The new attempt keeps its parts apart from those of the old one, and only :meth:`AnewWriter.finish` replaces the
manifest, in one atomic write. An attempt that dies leaves the old artifact as it was, and the next attempt takes up its
parts. Data files are named by content, so whoever still reads the old artifact goes on reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.errors import NotFound
from latteflow.storage.fingerprint import fingerprint, sha256


class AnewWriter(ArtifactWriter):
    """An :class:`ArtifactWriter` that takes nothing from the artifact it replaces.

    Its parts are recorded under names that depend on the old manifest: the same attempt, resumed, finds them; the next
    one does not.
    """

    def __init__(self, store: ArtifactStore, domain: str, stage: str, version: int, inputs: Mapping[str, Any]) -> None:
        super().__init__(store, domain, stage, version, inputs)
        try:
            old = store.objects.read(f"{self._base}/{fingerprint(stage, version, inputs)}/manifest.json")
        except NotFound:
            old = b""
        self._replaces = sha256(old)
        self._plain: dict[str, str] = {}

    def finish(self, counts: Mapping[str, int] | None = None, versions: Mapping[str, str] | None = None) -> Artifact:
        """Put the new parts and the new manifest in the place of the old ones."""
        own = [part.fingerprint for part in self._parts.values() if part.fingerprint in self._plain]
        for name, part in self._parts.items():
            part = replace(part, fingerprint=self._plain.get(part.fingerprint, part.fingerprint))
            self._store.replace(f"{self._base}/parts/{part.fingerprint}.json", asdict(part))
            self._parts[name] = part
        artifact = super().finish(counts, versions)
        for name in own:
            self._store.objects.delete(f"{self._base}/parts/{name}.json")
        return artifact

    def part_fingerprint(self, name: str, inputs: Mapping[str, Any]) -> str:
        """Of this attempt alone."""
        plain = super().part_fingerprint(name, inputs)
        own = sha256(f"{plain} in place of {self._replaces}".encode())
        self._plain[own] = plain
        return own

    def _commit(self, key: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        return self._store.replace(key, manifest)
