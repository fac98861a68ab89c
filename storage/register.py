"""A value in the store that changes only by compare-and-set, on any store that can create an object at most once.

Under ``KEY/``: ``00000001.json``, ``00000002.json``, ... The highest number is the value, the others are its history.
To change it is to create the next number, and of many who try with what they read, one succeeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from latteflow.storage.errors import NotFound, StorageError
from latteflow.storage.fingerprint import canonical_json
from latteflow.storage.objects import ObjectStore


class Register:
    """The value under ``key``. Version 0, with an empty record, is that of a register nobody wrote to yet."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key = objects, key

    def read(self) -> tuple[int, dict[str, Any]]:
        """Version and record.

        Raises:
            StorageError: the record is not one.
        """
        while versions := self.versions():
            try:
                return versions[-1], self.record(versions[-1])
            except NotFound:
                continue  # cleared by someone who wrote a newer one
        return 0, {}

    def versions(self) -> list[int]:
        """Versions that are there, oldest first."""
        names = (name.removesuffix(".json") for name in self._objects.names(self._key))
        return sorted(int(name) for name in names if name.isdecimal())

    def record(self, version: int) -> dict[str, Any]:
        """An earlier record.

        Raises:
            NotFound: it was cleared.
            StorageError: it is not a record.
        """
        name = self._name(version)
        try:
            return dict(json.loads(self._objects.read(name)))
        except (ValueError, TypeError) as error:
            raise StorageError(f"{self._objects.address(name)} is not a record ({error}); delete it") from error

    def replace(self, version: int, record: Mapping[str, Any]) -> bool:
        """Set the value, if nobody did since ``version`` was read; returns whether it was set."""
        return self._objects.put_if_absent(self._name(version + 1), canonical_json(dict(record)))

    def amend(self, version: int, record: Mapping[str, Any]) -> None:
        """Write over a record; only for its own author."""
        self._objects.put(self._name(version), canonical_json(dict(record)))

    def clear(self, version: int) -> None:
        """Forget the history before ``version``."""
        for old in self.versions():
            if old < version:
                self._objects.delete(self._name(old))

    def _name(self, version: int) -> str:
        return f"{self._key}/{version:08d}.json"
