"""Making an artifact that exists a second time, without a moment at which there is none.

The new attempt keeps its parts apart from those of the old one, and only :meth:`AnewWriter.finish` replaces the
manifest, in one atomic write. An attempt that dies leaves the old artifact as it was, and the next attempt takes up its
parts. Data files are named by content, so whoever still reads the old artifact goes on reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from storage.artifacts import Artifact, ArtifactStore, ArtifactWriter, sealed
from storage.errors import NotFound
from storage.fingerprint import canonical_json, fingerprint, sha256


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
        store, self._store = self._store, _Replacing(self._store.objects)
        for name, part in self._parts.items():
            part = replace(part, fingerprint=self._plain.get(part.fingerprint, part.fingerprint))
            self._store.commit(self._base, f"{self._base}/parts/{part.fingerprint}.json", asdict(part))
            self._parts[name] = part
        manifest = super().finish(counts, versions).manifest
        for name in own:
            store.objects.delete(f"{self._base}/parts/{name}.json")
        return Artifact(store, manifest)

    def _part_fingerprint(self, name: str, inputs: Mapping[str, Any]) -> str:
        plain = super()._part_fingerprint(name, inputs)
        own = sha256(f"{plain} in place of {self._replaces}".encode())
        self._plain[own] = plain
        return own


class _Replacing(ArtifactStore):
    def commit(self, base: str, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(canonical_json(record))
        self.objects.put(key, sealed(plain))
        return plain
