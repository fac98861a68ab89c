"""The caption store: every text a model was paid for, once, keyed by what was asked about which content.

One place for all domains of a store, ``captions/<describer>/<digest>.parquet``, append-only. A caption's key is a
digest over the content of its images and everything that shaped the answer, so an image that moves to another shard
or turns up in a second domain is never described twice, and two describers never mix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from storage.fingerprint import canonical_json, sha256
from storage.objects import ObjectStore
from storage.tables import parquet, read_parquet

CAPTION_SCHEMA: dict[str, Any] = {
    "caption_key": pl.String,
    "kind": pl.String,
    "members": pl.List(pl.String),
    "text": pl.String,
    "flags": pl.List(pl.String),
    "finish_reason": pl.String,
    "prompt_tokens": pl.Int32,
    "output_tokens": pl.Int32,
    "model": pl.String,
    "revision": pl.String,
    "prompt_id": pl.String,
}
"""``members`` are the sha256 digests of the described images' bytes."""


def describer_id(identity: Mapping[str, Any]) -> str:
    """Digest of everything but the images that shapes a text: kind, prompt, model, revision, sampling."""
    return sha256(canonical_json(dict(identity)))


def caption_key(describer: str, members: Sequence[str], index: int = 0) -> str:
    """Key of one text: describer, content digests of the images in order, and which of several texts it is."""
    return sha256(canonical_json([describer, list(members), index]))


class CaptionStore:
    """Texts of all domains of one object store."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def get(self, describer: str, keys: Iterable[str]) -> pl.DataFrame:
        """The stored rows among these keys, each once, sorted by key. Columns as ``CAPTION_SCHEMA``."""
        wanted = pl.Series("caption_key", list(keys), dtype=pl.String).implode()
        parts = [
            read_parquet(self._objects.read(f"captions/{describer}/{name}")).filter(pl.col("caption_key").is_in(wanted))
            for name in self._objects.names(f"captions/{describer}")
        ]
        if not parts:
            return pl.DataFrame(schema=CAPTION_SCHEMA)
        # Two workers may have described the same image at once; the first part by name is everybody's choice.
        return pl.concat(parts).unique("caption_key", keep="first", maintain_order=True).sort("caption_key")

    def add(self, describer: str, rows: pl.DataFrame) -> None:
        """Append texts; adding the same rows again changes nothing."""
        if rows.height:
            data = parquet(rows.select(*CAPTION_SCHEMA).sort("caption_key"))
            self._objects.put_if_absent(f"captions/{describer}/{sha256(data)[:32]}.parquet", data)
