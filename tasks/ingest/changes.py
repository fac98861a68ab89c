"""What became of a source since it was sharded, told without packing anything."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.listing import Listing, identities
from latteflow.storage.shards import index_tables, newest, read_quarantine
from latteflow.storage.tables import are_in, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ingest.shard import Split


@dataclass(frozen=True)
class Images:
    """Images of a split: those that no shard holds yet, those that one does, and those gone from the source."""

    new: int
    kept: int
    removed: int
    new_contents: pl.Series = field(default_factory=lambda: pl.Series(dtype=pl.String), repr=False, compare=False)
    """sha256 of the bytes of each new image."""


def image_changes(store: ArtifactStore, domain: Domain, split: Split, seen: Listing) -> Images:
    """Compare the source, as it was seen, with the shards that new images would be appended to.

    In memory are eight bytes of each image, and what is new.
    """
    previous = newest(store, domain.name, split)
    packed, live, refused = _held(previous) if previous is not None else (_NONE, _NONE, _NONE)
    kept, now, new = 0, [_NONE], []
    for rows in seen.rows():
        numbers = identities(rows)
        is_packed, is_refused = are_in(numbers, packed), are_in(numbers, refused)
        kept += int((is_packed & ~is_refused).sum())
        new.append(rows.filter(pl.Series(~is_packed & ~is_refused))["sha256"])
        now.append(numbers)
    contents = pl.concat(new)
    removed = int((~are_in(live, np.sort(np.concatenate(now)))).sum())
    return Images(len(contents), kept, removed, contents)


_NONE = np.zeros(0, np.uint64)


def _held(shards: Artifact) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted numbers of images, see :func:`storage.listing.identities`: of all that were packed, of those that the
    source still had then, and of those that are refused."""
    gone = read_parquet(shards.read("removed.parquet")).select("key")
    packed, live = [_NONE], [_NONE]
    for rows in index_tables(shards, ["key", "path", "sha256"]):
        packed.append(identities(rows))
        live.append(packed[-1][~rows["key"].is_in(gone["key"].implode()).to_numpy()] if gone.height else packed[-1])
    refused = identities(read_quarantine(shards)) if shards.names(".quarantine.parquet") else _NONE
    return np.sort(np.concatenate(packed)), np.concatenate(live), np.sort(refused)
