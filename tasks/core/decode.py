"""Decoding ahead of a model: threads read and transform the next images while the model works on these."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from latteflow.models.towers.images import in_range
from latteflow.storage.images import open_image
from latteflow.storage.shards import Record

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = logging.getLogger("latteflow.tasks")


def opened(record: Record) -> Image.Image:
    """A record's image, its greys in the range that its shards say; others are not decoded yet."""
    return in_range(open_image(record.data), record.greys)


def pixel_batches(
    records: Iterator[Record],
    preprocess: Callable[[Image.Image], torch.Tensor],
    *,
    batch: int,
    threads: int = 4,
) -> Iterator[tuple[list[Record], torch.Tensor]]:
    """Preprocessed images in the order of the records.

    At most three batches are in memory. An image that passed ingest and still cannot be transformed is left out with a
    warning; the rest of its batch goes on.

    Yields:
        the batch's records and their pixels, ``(n, 3, height, width)`` float32.
    """
    import torch

    def decode(record: Record) -> torch.Tensor | None:
        try:
            return preprocess(opened(record))
        except Exception as error:
            log.warning("%s (%s) cannot be transformed and is left out: %s", record.key, record.path, error)
            return None

    def collect(work: list[tuple[Record, Future[torch.Tensor | None]]]) -> tuple[list[Record], list[torch.Tensor]]:
        done = [(record, pixels) for record, future in work if (pixels := future.result()) is not None]
        return [record for record, _ in done], [pixels for _, pixels in done]

    ahead: deque[list[tuple[Record, Future[torch.Tensor | None]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(ahead) < 3 and (group := list(islice(records, batch))):
                ahead.append([(record, pool.submit(decode, record)) for record in group])
            if not ahead:
                return
            kept, pixels = collect(ahead.popleft())
            if kept:
                yield kept, torch.stack(pixels)
