"""Pictures for a model, looked at and decoded in one go, where a decoder that crashes or hangs costs one image.

The process that inspects an image by the rules of ingest also makes the picture of it, and sends its pixels.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import ClassVar, TypeVar

from PIL import Image

from latteflow.models.towers.images import Reading
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, examine
from latteflow.storage.inspectors import SECONDS, Inspectors, serve

Taken = TypeVar("Taken")
_SIZE = struct.Struct("<II")
_BYTES_PER_PIXEL = 48
"""Deep greys are scaled as numbers of eight bytes."""


class Pictures:
    """A few processes that decode batches of images; safe to call from many threads.

    Args:
        reading: how the model is shown pictures.
        limits: images beyond these are refused before they are decoded.
        processes: at most so many, started when they are needed.
        seconds: processor time for a batch of images.
    """

    def __init__(self, reading: Reading, limits: ImageLimits, processes: int, seconds: float = SECONDS) -> None:
        self._inspectors = _Decoders(limits, processes, seconds, json.dumps(asdict(reading)))

    def __call__(
        self, batch: Sequence[bytes], take: Callable[[ImageInfo, Image.Image], Taken], most: int | None = None
    ) -> list[Taken | ImageRejected]:
        """What ``take`` makes of each image and its picture in RGB, or why it is refused, in order.

        Args:
            most: pixels of an image as it is stored, where these have a lower limit than others.

        Raises:
            StorageError: the process cannot be started at all.
        """

        def shown(info: ImageInfo, pixels: bytes) -> Taken:
            size = _SIZE.unpack_from(pixels)
            return take(info, Image.frombytes("RGB", size, memoryview(pixels)[_SIZE.size :]))

        return self._inspectors.each(batch, shown, most)

    def __enter__(self) -> Pictures:
        self._inspectors.start(1)
        return self

    def __exit__(self, *error: object) -> None:
        self._inspectors.__exit__(*error)


class _Decoders(Inspectors):
    program: ClassVar = ["-m", "latteflow.tasks.ship.pictures"]


def _serve(reading: Reading) -> None:
    def show(data: bytes, limits: ImageLimits) -> tuple[ImageInfo, bytes]:
        return examine(data, limits, lambda image, info: packed(reading.shown(image, info.white)))

    serve(show, _BYTES_PER_PIXEL)


def packed(image: Image.Image) -> bytes:
    """Width and height, and the pixels."""
    return _SIZE.pack(*image.size) + image.tobytes()


if __name__ == "__main__":
    _serve(Reading(**json.loads(sys.argv[3])))
