"""What counts as an image: formats, limits and the reasons for refusing one. Shared by everything that decodes."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image, UnidentifiedImageError

# Pillow's own warning would only repeat our limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
"""Pillow format to the member's extension in a shard. No other parser is ever tried on a user's bytes."""

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""File names that are taken for images when a folder is listed."""


class RejectReason(StrEnum):
    """Why an image is in quarantine."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_NARROW = "too_narrow"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class ImageLimits:
    """Images beyond these are quarantined before they are decoded."""

    max_pixels: int = 100_000_000
    """Width times height; a decompression bomb costs memory, not disk."""
    max_aspect: float = 100.0
    """Longer side divided by shorter side."""


@dataclass(frozen=True)
class ImageInfo:
    """A decodable image: its extension by content (not by name), and its size in pixels as stored."""

    extension: str
    width: int
    height: int


class ImageRejected(Exception):
    """An image that can never work: it goes to quarantine, not to retry."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason, self.detail = reason, detail


def inspect(data: bytes, limits: ImageLimits) -> ImageInfo:
    """Decode once and tell what it is.

    Raises:
        ImageRejected: with a reason code and a detail.
    """
    if not data:
        raise ImageRejected(RejectReason.EMPTY, "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=list(EXTENSIONS)) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ImageRejected(
                    RejectReason.TOO_LARGE, f"{width} x {height} pixels, the limit is {limits.max_pixels:,}"
                )
            if max(width, height) > limits.max_aspect * min(width, height):
                raise ImageRejected(
                    RejectReason.TOO_NARROW, f"{width} x {height} pixels, the limit is 1 : {limits.max_aspect:g}"
                )
            image.load()
            return ImageInfo(EXTENSIONS[str(image.format)], width, height)
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        raise ImageRejected(RejectReason.NOT_AN_IMAGE, f"begins with {data[:16]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected(RejectReason.TOO_LARGE, str(error)) from error
    except MemoryError as error:
        raise ImageRejected(RejectReason.TOO_LARGE, "decoding ran out of memory") from error
    except Exception as error:
        # Pillow's plugins raise whatever their format trips over (struct.error, SyntaxError, zlib.error, ...).
        raise ImageRejected(RejectReason.CORRUPT, f"{type(error).__name__}: {error}") from error
