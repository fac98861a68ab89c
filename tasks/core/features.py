"""Image features as the `embed` stage stores them and the later stages read them."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.tables import read_parquet, read_safetensors

if TYPE_CHECKING:
    from latteflow.models.rows import Filled, Matrix

MOST_BYTES = 1 << 27
"""Of a matrix that training keeps in memory; a larger one is a temporary file."""


@dataclass(frozen=True)
class Features:
    """The live images of one split, in the order of their shards.

    Attributes:
        keys: image keys, ``(n,)``.
        features: unit image features, ``(n, dim)`` float32, not centred.
        norms: length of each image embedding before it was normalised, ``(n,)``.
        class_features: unit text features of the classes, ``(classes, dim)``.
        centre: mean image *embedding* of the split, ``(dim,)``.
        share: how much of it the domain's models subtract, 0 to 1.
        zero_shot: pseudo-label of each image by the untouched model, ``(n,)`` int64.
        confidence: its probability, ``(n,)``.
        near_features: unit features by the tower that says which images are alike, less their mean, ``(n, other dim)``;
            None where that is the CLIP's. A row of zeros is an image that this tower could not take.
    """

    keys: list[str]
    features: np.ndarray
    norms: np.ndarray
    class_features: np.ndarray
    centre: np.ndarray
    share: float
    zero_shot: np.ndarray
    confidence: np.ndarray
    near_features: np.ndarray | None = None

    @property
    def embeds(self) -> np.ndarray:
        """Image embeddings, ``(n, dim)`` float32."""
        return self.features * self.norms[:, None]

    @property
    def shift(self) -> np.ndarray:
        """What the domain's models subtract from image embeddings, ``(dim,)``."""
        shift: np.ndarray = self.share * self.centre
        return shift

    def at(self, rows: np.ndarray) -> Features:
        """Some of the images, in the order of their shards; what is of the whole split stays."""
        rows = np.sort(rows)
        return replace(
            self,
            keys=[self.keys[row] for row in rows],
            features=self.features[rows],
            norms=self.norms[rows],
            zero_shot=self.zero_shot[rows],
            confidence=self.confidence[rows],
            near_features=None if self.near_features is None else self.near_features[rows],
        )


def centred(embeds: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Unit rows of ``embeds - centre``; a row equal to the centre stays zero."""
    moved = embeds - centre
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def read_labels(embedded: Artifact, keys: pl.Series | None = None) -> pl.DataFrame:
    """Number, key and pseudo-label of the live images of an `embed` artifact, or of those with some keys, in its order.

    Args:
        keys: of the images that are wanted; the others are not in memory.
    """
    with _labels(embedded) as labels:
        if keys is not None:
            wanted = keys.to_frame("key").lazy()
            labels = labels.join(wanted, on="key", how="semi", maintain_order="left")
        return labels.collect(engine="streaming")


def read_label_numbers(embedded: Artifact) -> np.ndarray:
    """Pseudo-labels alone, ``(images,)`` int32."""
    with _labels(embedded) as labels:
        return labels.select(pl.col("label").cast(pl.Int32)).collect(engine="streaming")["label"].to_numpy()


def read_keys(embedded: Artifact, numbers: np.ndarray) -> pl.DataFrame:
    """Number and key of the images with some numbers, see :func:`read_labels`."""
    with _labels(embedded) as labels:
        wanted = pl.LazyFrame({"number": numbers}, schema={"number": pl.UInt32})
        return labels.select("number", "key").join(wanted, on="number", how="semi").collect(engine="streaming")


@contextlib.contextmanager
def _labels(embedded: Artifact) -> Iterator[pl.LazyFrame]:
    with tempfile.TemporaryDirectory() as folder:
        path = embedded.fetch("zero_shot.parquet", Path(folder))
        yield pl.scan_parquet(path, glob=False, row_index_name="number").select("number", "key", "label")


def read_features(embedded: Artifact) -> Features:
    """The features of an `embed` artifact, all in memory.

    Raises:
        DataError: images and features are not about the same images.
    """
    from latteflow.models.rows import in_memory

    labels = read_parquet(embedded.read("zero_shot.parquet"))
    classes = read_safetensors(embedded.read("classes.safetensors"))
    features = np.empty((labels.height, classes["text_features"].shape[1]), np.float32)
    norms = np.empty(labels.height, np.float32)
    for at, rows in by_shard(embedded, labels["key"]):
        features[at], norms[at] = rows["feature"].to_numpy(), rows["norm"].to_numpy()
    return Features(
        keys=labels["key"].to_list(),
        features=features,
        norms=norms,
        class_features=classes["text_features"],
        centre=classes["centre"],
        share=float(classes["share"][0]),
        zero_shot=labels["label"].to_numpy(),
        confidence=labels["probabilities"].list.first().to_numpy(),
        near_features=None if (near := _near_features(embedded, labels["key"])) is None else in_memory(near).numpy(),
    )


@dataclass(frozen=True)
class Embeds:
    """What training takes from an `embed` artifact; see :class:`Features`.

    Attributes:
        embeds: image embeddings, not centred, ``(n, dim)``; on disk where there are many.
        shift: what the domain's models subtract from them, ``(dim,)``.
    """

    keys: pl.Series
    embeds: Matrix
    class_features: np.ndarray
    shift: np.ndarray
    zero_shot: np.ndarray
    near_features: Matrix | None


def read_embeds(embedded: Artifact) -> Embeds:
    """The embeddings of an `embed` artifact, read shard by shard.

    Raises:
        DataError: images and features are not about the same images.
    """
    import torch

    labels = read_parquet(embedded.read("zero_shot.parquet"), ["key", "label"])
    classes = read_safetensors(embedded.read("classes.safetensors"))
    embeds = matrix(labels.height, classes["text_features"].shape[1])
    for at, rows in by_shard(embedded, labels["key"]):
        embeds[at] = torch.from_numpy(rows["feature"].to_numpy() * rows["norm"].to_numpy()[:, None])
    shift = float(classes["share"][0]) * classes["centre"]
    near = _near_features(embedded, labels["key"])
    return Embeds(labels["key"], embeds, classes["text_features"], shift, labels["label"].to_numpy(), near)


def matrix(n: int, width: int) -> Filled:
    """A matrix of float32 to be filled by stretches, in memory or, where that is much, on disk."""
    import torch

    from latteflow.models.rows import Stored

    return Stored(n, width) if 4 * n * width > MOST_BYTES else torch.empty(n, width)


def array(shape: tuple[int, int]) -> np.ndarray:
    """As :func:`matrix`, for what wants all of it at once: zeros in memory or, where that is much, mapped from disk."""
    from latteflow.models.rows import mapped

    return mapped(shape) if 4 * math.prod(shape) > MOST_BYTES else np.zeros(shape, np.float32)


def _near_features(embedded: Artifact, keys: pl.Series) -> Matrix | None:
    """See :class:`Features`; on disk where there are many."""
    import torch

    from latteflow.models.rows import through
    from latteflow.models.vectors import unit

    names = embedded.names(".near.parquet")
    if not names:
        return None
    width = read_parquet(embedded.read(names[0]), ["feature"])["feature"].to_numpy().shape[1]
    found, total, seen = matrix(len(keys), width), torch.zeros(width, dtype=torch.float64), 0
    for (at, rows), name in zip(by_shard(embedded, keys), names, strict=True):
        # Each tower may have left out an image that the other could take.
        place = rows.select("key").with_row_index("row")
        theirs = place.join(read_parquet(embedded.read(name)), on="key", how="inner")
        block, features = torch.zeros(rows.height, width), theirs["feature"].to_torch()
        block[theirs["row"].cast(pl.Int64).to_torch()] = features
        found[at], total, seen = block, total + features.sum(0, dtype=torch.float64), seen + len(features)
    mean = (total / max(seen, 1)).float()
    return through(found, lambda rows: torch.where(rows.any(1, keepdim=True), unit(rows - mean), 0))


def by_shard(embedded: Artifact, keys: pl.Series) -> Iterator[tuple[slice, pl.DataFrame]]:
    """Where the images of each shard stand among the keys, which are in the order of shards, and their features.

    Raises:
        DataError: the features of an image are missing.
    """
    first = 0
    for name in embedded.names(".features.parquet"):
        found = read_parquet(embedded.read(name))
        asked = keys[first : first + found.height].to_frame("key")
        rows = asked.join(found, on="key", how="inner", maintain_order="left")
        yield slice(first, first + rows.height), rows
        first += rows.height
    if first != len(keys):
        raise DataError(f"embed has features of {first} of {len(keys)} images; run it again with --refresh embed")
