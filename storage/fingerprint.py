"""Fingerprints: what an artifact was made from, as one digest and as words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    """Why two fingerprints differ, one line per named input.

    ``clip.model: "embedded" -> "ViT-B-32"``, and of lists what came and went: ``classes: added "grey"``.
    """
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "(none)"), new.get(name, "(none)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{name}.")
        elif (was := _json(before)) == (now := _json(after)):
            continue
        elif isinstance(before, list) and isinstance(after, list):
            lines.append(f"{prefix}{name}: {_list_difference([*map(_json, before)], [*map(_json, after)])}")
        else:
            same = next((place for place, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), 0)
            lines.append(f"{prefix}{name}: {_shown(was, same)} -> {_shown(now, same)}")
    return lines


def _list_difference(old: Sequence[str], new: Sequence[str]) -> str:
    parts = []
    for word, kept, against in (("added", new, old), ("removed", old, new)):
        found = [each for each in dict.fromkeys(kept) if each not in set(against)]
        if found:
            count = f"{len(found)} of {len(kept)}: " if len(found) > 1 else ""
            parts.append(f"{word} {count}{', '.join(map(_shown, found[:3]))}{', ...' if len(found) > 3 else ''}")
    return "; ".join(parts) or "the same in another order"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _shown(text: str, around: int = 0) -> str:
    """At most some 60 characters of a text, those where it differs."""
    if len(text) <= 60:
        return text
    start = max(0, min(around - 20, len(text) - 54))
    return f"{'...' if start else ''}{text[start : start + 54]}{'...' if start + 54 < len(text) else ''}"
