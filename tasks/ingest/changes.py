"""What became of a source since it was sharded, told without packing anything."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.shards import newest, read_index, read_quarantine
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ingest.shard import Split, look


@dataclass(frozen=True)
class Images:
    """Images of a split: those that no shard holds yet, those that one does, and those gone from the source."""

    new: int
    kept: int
    removed: int
    contents: list[str] = field(default_factory=list, repr=False, compare=False)
    """sha256 of the bytes of each new or kept image."""


def image_changes(store: ArtifactStore, domain: Domain, split: Split) -> Images:
    """Compare the source with the shards that new images would be appended to.

    Raises:
        DataError: the source is missing or empty.
    """
    with look(store, domain, split) as images:
        rows = images.database.execute("SELECT key, sha256 FROM image").fetchall()
    listing = pl.DataFrame(rows, {"key": pl.String, "sha256": pl.String}, orient="row")
    previous = newest(store, domain.name, split)
    if previous is None:
        return Images(listing.height, 0, 0, listing["sha256"].to_list())
    packed = read_index(previous, removed=True).select("key")
    refused = read_quarantine(previous).select("key") if previous.names(".quarantine.parquet") else packed.clear()
    gone_before = read_parquet(previous.read("removed.parquet")).select("key")
    listing = listing.join(refused, on="key", how="anti")
    kept = listing.join(packed, on="key", how="semi").height
    removed = packed.join(gone_before, on="key", how="anti").join(listing, on="key", how="anti").height
    return Images(listing.height - kept, kept, removed, listing["sha256"].to_list())
