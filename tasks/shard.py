"""shard: images -> webdataset tars and an index; corrupt images quarantined, duplicates recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from storage.artifacts import ArtifactWriter
from storage.errors import DataError
from storage.fingerprint import canonical_json, sha256
from storage.images import ImageLimits
from storage.shards import newest, write_shards
from storage.sources import Source, StatCache
from tasks.domain import Domain
from tasks.stage import StageResult, open_store, run_stage

VERSION = 1
Split = Literal["train", "test"]


def shard(domain: Domain, split: Split) -> StageResult:
    """List the source, and pack the images that no shard holds yet.

    The fingerprint is over paths and contents, so touching a file changes nothing. Only files whose size or time
    changed since the last listing are read again.

    Raises:
        DataError: the source is missing or empty, or not one of its images can be used.
    """
    store = open_store(domain)
    urls = domain.source if split == "train" or domain.evaluation is None else domain.evaluation.source
    source = Source(urls or domain.source)
    images = source.digest(source.scan(), StatCache(store.objects, f"{domain.name}/shard/stat-{split}.parquet"))
    settings = domain.shard
    inputs = {
        "split": split,
        "images": sha256(canonical_json([[image.entry.path, image.sha256] for image in images])),
        "settings": settings.model_dump(),
    }

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        counts = write_shards(
            writer,
            source,
            images,
            newest(store, domain.name, split),
            images_per_shard=settings.images,
            limits=ImageLimits(settings.max_pixels, settings.max_aspect),
        )
        if counts["images"] == 0:
            raise DataError(
                f"none of the {len(images)} images of {', '.join(source.urls)} can be used "
                f"({counts['quarantined']} quarantined); see the reasons in the log and check the source"
            )
        return counts

    return run_stage(store, domain, "shard", VERSION, inputs, body, split=split)
