"""Fingerprints: what an artifact was made from, as one digest and as words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8.

    Raises:
        TypeError: the value holds something JSON cannot carry (a set, an object, bytes).
        ValueError: the value holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def sha256(data: bytes) -> str:
    """Digest of bytes, 64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a local file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(stage: str, version: int, inputs: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of the stage, its code version and its named inputs.

    Args:
        stage: name of the stage, for example ``"embed"``.
        version: code version of the stage; raised when the same inputs give other results.
        inputs: everything the result depends on, by name: settings as JSON values, artifacts and files as digests.
    """
    return sha256(canonical_json({"stage": stage, "version": version, "inputs": dict(inputs)}))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Why two fingerprints differ, one line per named input: ``clip.model: "embedded" -> "ViT-B-32"``."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(none)"), new.get(name, "(none)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
