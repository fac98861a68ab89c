"""Keeping a store small and sound: what is nobody's any more, and whether every byte is what it was."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from latteflow.storage.artifacts import Artifact, ArtifactStore, File, Part
from latteflow.storage.captions import CaptionStore
from latteflow.storage.errors import Damaged, NotFound, StorageError
from latteflow.storage.fingerprint import fingerprint, sha256_file
from latteflow.storage.inventory import CAPTIONS, Inventory
from latteflow.storage.objects import is_unfinished

_KINDS = ("artifact", "part", "file", "damaged", "unfinished")


@dataclass(frozen=True)
class Loose:
    """An object that nothing needs."""

    key: str
    bytes: int
    kind: str
    """artifact: a manifest and its statistics; part: a finished unit of work; file: data; damaged: bytes that were set
    aside; unfinished: what a killed process was writing."""


def garbage(
    inventory: Inventory, roots: Iterable[Artifact], older_than: float, now: float | None = None
) -> list[Loose]:
    """What could go from a domain, in the order in which it should.

    Kept are the roots, everything younger than ``older_than`` seconds, and all that either was made from.

    Raises:
        StorageError: a manifest was written by a newer version.
    """
    limit = (time.time() if now is None else now) - older_than
    young = [made.artifact for made in inventory.all() if made.modified > limit]
    kept: set[str] = set()
    for artifact in inventory.reachable([*roots, *young]):
        base = f"{artifact.domain}/{artifact.stage}"
        kept |= {f"{base}/{artifact.fingerprint}/{name}" for name in ("manifest.json", "stats.json", "running.json")}
        for part in artifact.parts:
            kept |= {f"{base}/parts/{part.fingerprint}.json", *(f"{base}/data/{file.object}" for file in part.files)}
    for key, stored in inventory.objects.items():
        if stored.modified > limit and key not in kept:
            kept |= {key, *_files_of(inventory, key)}
    found = [
        Loose(key, stored.bytes, kind)
        for key, stored in inventory.objects.items()
        if key not in kept and (kind := _kind(key)) is not None
    ]
    # Manifests first: what has lost its manifest is trusted by nobody, wherever the deletion stops.
    return sorted(found, key=lambda each: (_KINDS.index(each.kind), not each.key.endswith("manifest.json"), each.key))


def leftovers(store: ArtifactStore, older_than: float, now: float | None = None) -> list[Loose]:
    """As :func:`garbage`, beside the captions of a store. Texts themselves never go: somebody paid for them."""
    limit = (time.time() if now is None else now) - older_than
    found = []
    for key, stored in store.objects.listing(CAPTIONS).items():
        damaged = re.fullmatch(rf"{CAPTIONS}/damaged/[0-9a-f]{{12}}-[^/]+\.parquet", key)
        kind = "damaged" if damaged else "unfinished"
        if stored.modified <= limit and (damaged or is_unfinished(key)):
            found.append(Loose(key, stored.bytes, kind))
    return found


def _kind(key: str) -> str | None:
    """What an object is, by its place in a domain; None for what is no business of ours."""
    _, _, folder, *rest = [*key.split("/"), "", ""]
    if is_unfinished(key):
        return "unfinished"
    if folder in ("parts", "data", "damaged"):
        return {"parts": "part", "data": "file", "damaged": "damaged"}[folder]
    if folder == "checkpoints":
        return "unfinished"
    return "artifact" if len(folder) == 64 and rest[0] else None


def _files_of(inventory: Inventory, key: str) -> list[str]:
    """The data of a part that belongs to no artifact yet."""
    domain, stage, folder, *_ = [*key.split("/"), "", ""]
    if folder != "parts":
        return []
    try:
        record = inventory.store.read_record(key)
        return [f"{domain}/{stage}/data/{file['object']}" for file in record["files"]]
    except (StorageError, ValueError, KeyError, TypeError):
        return []


def verify(inventory: Inventory, read: Callable[[int], None] = lambda size: None, threads: int = 4) -> list[str]:
    """Read everything of a domain against its digest; what is not as it was is set aside, to be made again.

    Args:
        read: told of every file that was read, with its size.

    Returns:
        One line for each thing that was wrong.
    """
    store, wrong = inventory.store, []
    named: dict[str, tuple[Part, File]] = {}
    for key in inventory.objects:
        try:
            parts = _parts(store, key)
        except NotFound:
            continue
        except Damaged as error:
            wrong.append(str(error))
            continue
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(_set_aside(store, key, f"is not what it should be ({type(error).__name__}: {error})"))
            continue
        base = "/".join(key.split("/")[:2])
        named |= {f"{base}/data/{file.object}": (part, file) for part in parts for file in part.files}
    wrong += [f"{store.objects.address(key)} is missing" for key in named.keys() - inventory.objects.keys()]

    def check(key: str) -> str | None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                return _check(store, key, named.get(key), Path(folder))
        except Damaged as error:
            return str(error)
        except NotFound:
            return None  # deleted meanwhile
        finally:
            read(inventory.objects[key].bytes)

    data = [key for key in inventory.objects if _kind(key) == "file"]
    with ThreadPoolExecutor(threads) as pool:
        return wrong + [line for line in pool.map(check, data) if line is not None]


def verify_captions(store: ArtifactStore) -> list[str]:
    """As :func:`verify`, for all texts of a store."""
    captions = CaptionStore(store.objects)
    return [line for describer in captions.describers() for line in captions.verify(describer)]


def _parts(store: ArtifactStore, key: str) -> list[Part]:
    """The parts that a manifest or a part record names; none for any other object.

    Raises:
        ValueError, KeyError, TypeError: it is broken, or not the one that belongs under this key.
    """
    if _kind(key) == "part":
        return [Part.of(store.read_record(key))]
    if _kind(key) == "artifact" and key.endswith("/manifest.json"):
        artifact = store.read_artifact(key)
        made = fingerprint(artifact.stage, artifact.manifest["version"], artifact.inputs)
        if key.split("/")[2] != made:
            raise ValueError(f"its inputs have fingerprint {made[:12]}")
        return list(artifact.parts)
    return []


def _check(store: ArtifactStore, key: str, named: tuple[Part, File] | None, folder: Path) -> str | None:
    base, name = "/".join(key.split("/")[:2]), key.rsplit("/", 1)[-1]
    if named is not None:
        store.fetch_checked(base, *named, folder)
        return None
    # A file whose part was never finished is named by its content all the same, and a later part would trust it.
    digest = name.split(".")[1] if name.count(".") else ""
    found = sha256_file(store.objects.fetch(key, folder))
    if len(digest) == 16 and not found.startswith(digest):
        return _set_aside(store, key, f"has sha256 {found[:16]}")
    return None


def _set_aside(store: ArtifactStore, key: str, why: str) -> str:
    domain, stage, *rest = key.split("/")
    aside = f"{domain}/{stage}/damaged/{'.'.join(rest)}"
    store.objects.put(aside, store.objects.read(key))
    store.objects.delete(key)
    return f"{store.objects.address(key)} {why}; moved to {aside}"
