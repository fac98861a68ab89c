"""Which images are harder: test images by size, by sharpness, and by whether training has a near twin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from PIL import Image

from latteflow.models.towers.images import to_rgb
from latteflow.storage.artifacts import Artifact
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import opened

TWIN = 0.95
"""Cosine of domain-centred features from which two images count as near-identical."""
LOOKED_AT = 5_000
"""Images whose sharpness is measured at most, as each has to be decoded; the first by key, which is a digest."""
SIDE = 128
"""Larger images are made so small before their sharpness is measured, in pixels of the longer side."""
_ROWS = 2048


@dataclass(frozen=True)
class Slice:
    """Some of the images: ``rows`` are their places, ``by`` and ``name`` say what they have in common."""

    by: str
    name: str
    rows: np.ndarray


def slices(images: Artifact, keys: Sequence[str], test: np.ndarray, train: np.ndarray | None) -> list[Slice]:
    """The slices of some images; what is the same for all of them is left out.

    Args:
        images: the shards that hold them.
        keys: of the images, ``(n,)``.
        test: their unit, domain-centred features, ``(n, dim)``.
        train: those of the training images; None where the images are training images themselves.
    """
    index = pl.DataFrame({"key": keys}).join(read_index(images), on="key", how="left", maintain_order="left")
    side = np.sqrt(index["width"].to_numpy().astype(np.float64) * index["height"].to_numpy())
    found = list(_thirds("size", ("smallest", "middle", "largest"), np.arange(len(keys)), side, " px"))
    some = np.sort(np.argsort(np.array(keys))[:LOOKED_AT])
    sharp = [sharpness(opened(record)) for record in read_records(images, index[some])]
    found += _thirds("sharpness", ("most blurred", "middle", "sharpest"), some, np.array(sharp), "")
    if train is not None:
        twin = nearest(test, train)[1] >= TWIN
        found.append(Slice("training images", f"a near twin among them (cosine {TWIN} or more)", np.flatnonzero(twin)))
        found.append(Slice("training images", "none", np.flatnonzero(~twin)))
    return [each for each in found if 0 < len(each.rows) < len(keys)]


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey image (Pech-Pacheco et al., ICPR 2000), made SIDE pixels small."""
    small = to_rgb(image).convert("L")
    small.thumbnail((SIDE, SIDE))
    grey = np.pad(np.asarray(small, np.float64), 1, mode="edge")
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


def nearest(rows: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place and cosine of the nearest of other unit rows, ``(n,)`` each, in little memory."""
    best = np.zeros(len(rows), np.int64)
    cosine = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), _ROWS):
        near = rows[start : start + _ROWS] @ others.T
        best[start : start + _ROWS], cosine[start : start + _ROWS] = near.argmax(1), near.max(1)
    return best, cosine


def _thirds(by: str, names: Sequence[str], rows: np.ndarray, values: np.ndarray, unit: str) -> Iterator[Slice]:
    place = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
    for number, name in enumerate(names):
        own = place == number
        if own.any():
            span = f"{values[own].min():.0f} to {values[own].max():.0f}{unit}"
            yield Slice(by, f"{name} third ({span})", rows[own])
