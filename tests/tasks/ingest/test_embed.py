"""Features and pseudo-labels: the same from disk as in memory."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Domain
from latteflow.models.errors import ModelError
from latteflow.models.rows import mapped
from latteflow.storage.shards import Record, read_index
from latteflow.tasks.core import features
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.ingest import embed as stage
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard


@pytest.mark.parametrize("centre", [None, False])
def test_many_images_are_labelled_from_disk_with_the_same_bytes(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, centre: bool | None
) -> None:
    """Some of them are gone, nearly all those of a shard among them, and one cannot be transformed."""
    batches = stage.pixel_batches

    def without_one(records: Iterator[Record], *args: Any, **named: Any) -> Any:
        return batches((record for record in records if record.path != "015.png"), *args, **named)

    monkeypatch.setattr(stage, "pixel_batches", without_one)
    clip = domain.clip.model_copy(update={"centre": centre})
    domain = domain.model_copy(update={"clip": clip})
    first = read_index(open_store(domain).open(shard(domain, "train").ref), only=["shard-00000"])
    for path in {*first["path"], "001.png", "002.png"} - {"015.png"}:
        (tmp_path / "train" / path).unlink()
    images = shard(domain, "train")
    shutil.copytree(domain.store, tmp_path / "other")
    plain = embed(domain, images)
    monkeypatch.setattr(features, "MOST_BYTES", 0)
    monkeypatch.setattr(stage, "_ROWS", 5)
    stored = embed(domain.model_copy(update={"store": str(tmp_path / "other")}), images)
    assert stored.ref == plain.ref and stored.counts == plain.counts
    assert plain.counts["left_out"] == 1 and plain.counts["images"] == images.counts["images"] - 1


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match="TMPDIR"):
        mapped((10, 10))
