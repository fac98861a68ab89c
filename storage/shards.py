"""Shards: reproducible webdataset tars with an index, appended to as a folder grows.

A member pair is ``<key>.<ext>`` (the original bytes) and ``<key>.json`` (key, path, sha256, width, height); never a
label. Keys are sorted, times and owners are zero, so the same images give the same bytes on any day and machine.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from storage.fingerprint import canonical_json, sha256
from storage.images import ImageInfo, ImageLimits, ImageRejected, RejectReason, inspect
from storage.sources import Image, Source
from storage.tables import parquet, read_parquet

INDEX_SCHEMA = {
    "key": pl.String,
    "shard": pl.String,
    "offset": pl.Int64,
    "bytes": pl.Int64,
    "sha256": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "path": pl.String,
}
QUARANTINE_SCHEMA = {
    "key": pl.String,
    "path": pl.String,
    "sha256": pl.String,
    "reason": pl.String,
    "detail": pl.String,
    "bytes": pl.Binary,
}
_REMOVED_SCHEMA = {"key": pl.String, "path": pl.String}
_DUPLICATE_SCHEMA = {"key": pl.String, "duplicate_of": pl.String}


def write_shards(
    writer: ArtifactWriter,
    source: Source,
    images: Sequence[Image],
    previous: Artifact | None,
    *,
    images_per_shard: int,
    limits: ImageLimits,
    threads: int = 8,
) -> dict[str, int]:
    """Pack the images that no earlier shard holds; leave old shards alone; record what is gone.

    Args:
        writer: of the shard artifact.
        images: everything the source holds now.
        previous: the domain's newest shard artifact, whose shards are taken over.

    Returns:
        Counts of the whole artifact: images, quarantined, duplicates, removed, shards.
    """
    wanted = {image.key: image for image in images}
    old_index, old_quarantine = _empty(INDEX_SCHEMA), _empty(QUARANTINE_SCHEMA)
    number = 0
    if previous is not None:
        old_index, old_quarantine = read_index(previous, removed=True), read_quarantine(previous)
        for part in previous.parts:
            if part.name.startswith("shard-"):
                writer.adopt(part)
                number += 1
    held = set(old_index["key"]) | set(old_quarantine["key"])
    new = [wanted[key] for key in sorted(wanted.keys() - held)]
    rejected = old_quarantine.filter(pl.col("key").is_in(list(wanted))).height
    tables = [old_index]
    for start in range(0, len(new), images_per_shard):
        batch = new[start : start + images_per_shard]
        name = f"shard-{number:05d}"
        inputs = {
            "images": sha256(canonical_json([[image.key, image.entry.path, image.sha256] for image in batch])),
            "limits": [limits.max_pixels, limits.max_aspect],
        }
        found = writer.find(name, inputs)
        if found is None:
            files, index, bad = _pack(name, source, batch, limits, threads)
            writer.put(name, inputs, files, rows=index.height)
        else:
            index = read_parquet(writer.read(found, f"{name}.index.parquet"))
            bad = len(batch) - index.height
        tables.append(index)
        rejected += bad
        number += 1

    index = pl.concat(tables)
    here = pl.col("key").is_in(list(wanted))
    live, gone = index.filter(here), index.filter(~here)
    first = live.with_columns(duplicate_of=pl.col("key").first().over("sha256"))
    duplicates = first.filter(pl.col("key") != pl.col("duplicate_of")).select(*_DUPLICATE_SCHEMA)
    state = {
        "live": sha256(canonical_json(live["key"].to_list())),
        "gone": sha256(canonical_json(gone["key"].to_list())),
    }
    writer.put(
        "state",
        state,
        {"removed.parquet": parquet(gone.select(*_REMOVED_SCHEMA)), "duplicates.parquet": parquet(duplicates)},
    )
    return {
        "images": live.height,
        "quarantined": rejected,
        "duplicates": duplicates.height,
        "removed": gone.height,
        "shards": number,
    }


def _pack(
    name: str, source: Source, batch: Sequence[Image], limits: ImageLimits, threads: int
) -> tuple[dict[str, bytes | Path], pl.DataFrame, int]:
    def load(image: Image) -> tuple[Image, bytes, ImageInfo | ImageRejected]:
        try:
            data = source.read(image.entry)
        except OSError as error:
            return image, b"", ImageRejected(RejectReason.UNREADABLE, str(error))
        try:
            return image, data, inspect(data, limits)
        except ImageRejected as rejected:
            return image, data, rejected

    rows, bad = [], []
    tar = io.BytesIO()
    with ThreadPoolExecutor(threads) as pool, tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for image, data, info in pool.map(load, batch):
            path = image.entry.path
            digest = sha256(data)  # of what is packed, should the file have changed since it was listed
            if isinstance(info, ImageRejected):
                bad.append((image.key, path, digest, info.reason.value, info.detail, data))
                continue
            offset = _add(out, f"{image.key}.{info.extension}", data)
            record = {"key": image.key, "path": path, "sha256": digest, "width": info.width, "height": info.height}
            _add(out, f"{image.key}.json", canonical_json(record))
            rows.append((image.key, name, offset, len(data), digest, info.width, info.height, path))
    index = pl.DataFrame(rows, schema=INDEX_SCHEMA, orient="row")
    files: dict[str, bytes | Path] = {f"{name}.tar": tar.getvalue(), f"{name}.index.parquet": parquet(index)}
    if bad:
        files[f"{name}.quarantine.parquet"] = parquet(pl.DataFrame(bad, schema=QUARANTINE_SCHEMA, orient="row"))
    return files, index, len(bad)


def _add(out: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; returns the offset of its first byte."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), 0, 0o644
    offset = out.offset + tarfile.BLOCKSIZE
    out.addfile(member, io.BytesIO(data))
    return offset


@dataclass(frozen=True)
class Record:
    """One image of a shard: its key, content digest, path in the source, and original bytes."""

    key: str
    sha256: str
    path: str
    data: bytes


def read_index(shards: Artifact, *, removed: bool = False) -> pl.DataFrame:
    """One row per live image (with ``removed``, of every image ever packed), ordered by shard and key."""
    frames = [read_parquet(shards.read(name)) for name in shards.names(".index.parquet")]
    index = pl.concat(frames) if frames else _empty(INDEX_SCHEMA)
    if removed:
        return index
    gone = read_parquet(shards.read("removed.parquet"))["key"]
    return index.filter(~pl.col("key").is_in(gone.implode()))


def read_quarantine(shards: Artifact) -> pl.DataFrame:
    """One row per refused image: key, path, sha256, reason, detail, bytes."""
    frames = [read_parquet(shards.read(name)) for name in shards.names(".quarantine.parquet")]
    return pl.concat(frames) if frames else _empty(QUARANTINE_SCHEMA)


def read_records(shards: Artifact, index: pl.DataFrame) -> Iterator[Record]:
    """The images of some index rows, in the rows' order; each shard is fetched once if rows are in shard order."""
    held, tar = "", b""
    for key, shard, offset, size, digest, path in index.select(
        "key", "shard", "offset", "bytes", "sha256", "path"
    ).iter_rows():
        if shard != held:
            held, tar = shard, shards.read(f"{shard}.tar")
        yield Record(key, digest, path, tar[offset : offset + size])


def newest(store: ArtifactStore, domain: str, split: str) -> Artifact | None:
    """The shard artifact to append to: the one of this split that holds most shards."""
    found = [artifact for artifact in store.all(domain, "shard") if artifact.inputs["split"] == split]
    return max(found, key=lambda artifact: (len(artifact.parts), artifact.fingerprint), default=None)


def _empty(schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    return pl.DataFrame(schema=schema)
