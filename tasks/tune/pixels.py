"""Random access to training pixels, for tuning whole towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from latteflow.storage.artifacts import Artifact
from latteflow.storage.shards import read_index, read_records
from latteflow.tasks.core.decode import THREADS, opened, stacked

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class PixelReader:
    """Gives the pixels of any images of a split, by number.

    The original bytes stay in memory; decoding happens in threads for each batch.

    Args:
        images: the shards.
        keys: image keys, whose places are the numbers.
        preprocess: the evaluation transform.
    """

    def __init__(self, images: Artifact, keys: Sequence[str], preprocess: Callable[[Image], torch.Tensor]) -> None:
        found = {record.key: record for record in read_records(images, read_index(images))}
        self._records = [found[key] for key in keys]
        self._preprocess = preprocess
        self._pool = ThreadPoolExecutor(THREADS)

    def __call__(self, rows: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        """Image numbers ``(b,)`` -> pixels ``(b, 3, h, w)``: views that the seeds ``(b,)`` decide, or plain."""
        from latteflow.models.methods.augment import augment

        images = self._pool.map(lambda row: opened(self._records[row]), rows.tolist())
        views = images if seeds is None else self._pool.map(augment, images, seeds.tolist())
        return stacked(list(self._pool.map(self._preprocess, views)))
