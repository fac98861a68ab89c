"""describe: images -> one text each, shard by shard, through the caption store."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import polars as pl

from storage.artifacts import ArtifactWriter
from storage.fingerprint import canonical_json, sha256
from storage.tables import parquet
from tasks.domain import Domain
from tasks.stage import StageResult, open_store, run_stage
from tasks.texts import Gallery, describer_identity, open_describer, write_texts

VERSION = 1


def describe(domain: Domain, shards: StageResult, embedded: StageResult) -> StageResult:
    """A text for every live image.

    Files: ``<shard>.captions.parquet``, one row for each image: ``member_keys`` (its key) and the caption columns.
    """
    store = open_store(domain)
    identity = describer_identity(domain, embedded)
    inputs = {"shards": shards.ref.digest, "describer": identity}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
        describer = functools.cache(lambda: open_describer(domain, gallery))
        for shard, keys in gallery.keys_by_shard().items():
            own = {"images": sha256(canonical_json(keys)), "describer": identity}
            if writer.find(shard, own) is None:
                texts = write_texts(store, describer, "image", gallery, [[key] for key in keys], identity)
                files = {f"{shard}.captions.parquet": parquet(texts)}
                writer.put(shard, own, files, rows=texts.height, counts=text_counts(texts))
        return {}

    return run_stage(store, domain, "describe", VERSION, inputs, body)


def text_counts(texts: pl.DataFrame) -> dict[str, int]:
    """Texts and flagged texts of a caption table."""
    return {"texts": texts.height, "flagged": texts.filter(pl.col("flags").list.len() > 0).height}
