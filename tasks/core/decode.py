"""Decoding ahead of a model: threads read and transform the next images while the model works on these."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
THREADS = max(4, os.cpu_count() or 1)
"""That decode: PIL lets go of the interpreter while it does."""


def opened(record: Record) -> Image.Image:
    """A record's image, its greys in the range that its shards say; others are not decoded yet."""
    return in_range(open_image(record.data), record.greys)


def pixel_batches(
    records: Iterator[Record],
    preprocess: Callable[[Image.Image], torch.Tensor],
    *,
    batch: int,
    threads: int = THREADS,
) -> Iterator[tuple[list[Record], torch.Tensor]]:
    """Preprocessed images in the order of the records.

    At most three batches are in memory, put together while the model works on those before. An image that passed ingest
    and still cannot be transformed is left out with a warning; the rest of its batch goes on.

    Yields:
        the batch's records and their pixels, ``(n, 3, height, width)`` float32.
    """

    def decode(record: Record) -> torch.Tensor | None:
        try:
            return preprocess(opened(record))
        except Exception as error:
            log.warning("%s (%s) cannot be transformed and is left out: %s", record.key, record.path, error)
            return None

    def collect(work: list[tuple[Record, Future[torch.Tensor | None]]]) -> tuple[list[Record], torch.Tensor] | None:
        done = [(record, pixels) for record, future in work if (pixels := future.result()) is not None]
        return ([record for record, _ in done], stacked([pixels for _, pixels in done])) if done else None

    ahead: deque[Future[tuple[list[Record], torch.Tensor] | None]] = deque()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as collector:
        while True:
            while len(ahead) < 3 and (group := list(islice(records, batch))):
                ahead.append(collector.submit(collect, [(record, pool.submit(decode, record)) for record in group]))
            if not ahead:
                return
            if (found := ahead.popleft().result()) is not None:
                yield found


def stacked(pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images of one shape as a batch ``(n, ...)``, where there is a GPU in memory that it copies from by itself."""
    import torch

    batch = torch.empty((len(pixels), *pixels[0].shape), pin_memory=torch.cuda.is_available())
    return torch.stack(list(pixels), out=batch)
