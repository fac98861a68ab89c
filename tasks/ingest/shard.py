"""shard: images -> webdataset tars and an index; corrupt images quarantined, duplicates recorded."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from latteflow.storage.artifacts import ArtifactStore, ArtifactWriter
from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.images import ImageLimits, decoder_version
from latteflow.storage.listing import Listing, StatCache
from latteflow.storage.shards import Packing, newest, retry_quarantined, write_shards
from latteflow.storage.sources import Source
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import tell, told_as
from latteflow.tasks.core.stage import StageResult, anew, open_store, run_stage

VERSION = 2
Split = Literal["train", "test", "general"]
"""What is adapted to, what only evaluation sees, and what shows what the model forgot."""


def shard(domain: Domain, split: Split, seen: Listing | None = None) -> StageResult:
    """List the source, and pack the images that no shard holds yet.

    The fingerprint is over paths and contents, so touching a file changes nothing. Only files whose size or time
    changed since the last listing are read again. What an earlier run refused is looked at again when the limits or the
    decoders are not those of then.

    Args:
        seen: the source as the caller saw it; it stays open. Default: as it is now.

    Raises:
        DataError: the source is missing or empty, or not one of its images can be used.
    """
    store = open_store(domain)
    source = open_source(domain, split)
    with look(store, domain, split, source) if seen is None else contextlib.nullcontext(seen) as images:
        inputs = {"split": split, "images": images.digest, **_how(domain)}

        def body(writer: ArtifactWriter) -> Mapping[str, int]:
            previous = None if anew() else newest(store, domain.name, split)
            again = previous is not None and _refusals(previous.inputs) != _refusals(inputs)
            how = _packing(domain, split)
            counts = write_shards(
                writer, source, images, previous, how, again=again,
                on_progress=lambda done, total: tell(done, total, "images"),
            )  # fmt: skip
            if counts["images"] == 0:
                raise DataError(
                    f"none of the {len(images)} images of {', '.join(source.urls)} can be used "
                    f"({counts['quarantined']} quarantined); see the reasons in the log and check the source"
                )
            return counts

        return run_stage(store, domain, "shard", VERSION, inputs, body, split=split)


def replay(domain: Domain, split: Split) -> StageResult:
    """Look again at what is in quarantine, by the bytes kept there; the source is not opened.

    Changes something only where the limits or the decoders changed since; a repaired file is a new image, which
    :func:`shard` finds.

    Raises:
        DataError: nothing was sharded yet.
    """
    store = open_store(domain)
    previous = newest(store, domain.name, split)
    if previous is None:
        raise DataError(f"domain {domain.name!r} has no shards of the {split} split yet: run it first")
    inputs = {**previous.inputs, **_how(domain)}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        return retry_quarantined(writer, previous, _packing(domain, split))

    with _room_for_listings():
        return run_stage(store, domain, "shard", VERSION, inputs, body, split=split)


def open_source(domain: Domain, split: Split) -> Source:
    """Where the images of a split come from."""
    own = domain.of_split(split)
    urls = own.evaluation.source if split == "test" and own.evaluation else None
    return Source(urls or own.source, domain.shard.image_column)


@contextlib.contextmanager
def look(store: ArtifactStore, domain: Domain, split: Split, source: Source | None = None) -> Iterator[Listing]:
    """What the source of a split holds now; only what is new or changed since the last look is read.

    Raises:
        DataError: the source is missing or empty.
    """
    cache = StatCache(store.objects, f"{domain.name}/shard/stat-{split}.parquet")
    limits = _packing(domain, split).limits
    with _room_for_listings(), contextlib.ExitStack() as opened:
        with told_as(f"look at {split}"):
            on_progress = functools.partial(tell, unit="files")
            looked = cache.digested(source or open_source(domain, split), limits, on_progress)
            images = opened.enter_context(looked)
        yield images


@contextlib.contextmanager
def _room_for_listings() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"the list of images does not fit into the temporary folder ({error}): free some space in "
            f"{tempfile.gettempdir()}, or set TMPDIR to another folder"
        ) from error


def _packing(domain: Domain, split: Split) -> Packing:
    settings = domain.shard
    limits = ImageLimits(settings.max_pixels, settings.max_aspect, settings.max_megabytes << 20)
    return Packing(settings.images, limits, settings.drop_duplicates and split == "train", settings.grey_range)


def _how(domain: Domain) -> dict[str, Any]:
    settings = domain.shard.model_dump(mode="json")
    if settings["grey_range"] == "auto":  # stores of before there was a choice have no such setting
        del settings["grey_range"]
    return {"settings": settings, "decoder": decoder_version()}


def _refusals(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides whether an image is refused."""
    limits = {name: value for name, value in inputs["settings"].items() if name.startswith("max_")}
    return limits, inputs.get("decoder")
