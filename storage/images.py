"""What counts as an image: formats, limits and the reasons for refusing one. Shared by everything that decodes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

# With these in place Pillow has every parser it may use, and never loads the others.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    features,
)

# Our own limit is applied before any pixel is decoded, and may be raised.
Image.MAX_IMAGE_PIXELS = None
# What Pillow thinks of a picture (odd EXIF, an odd palette) stands between lines of progress, with a path of its own;
# what is wrong with one is in its row of the quarantine.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Shown = TypeVar("Shown")

HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
READS_HEIC = importlib.util.find_spec("pillow_heif") is not None
"""Whether the extra with its decoder is installed."""
HEIC_HINT = "HEIC is read after pip install 'latteflow[heic]'"
if READS_HEIC:
    import pillow_heif

    # Thumbnails off: a draft would be decoded from one, and damage in the picture itself not be found.
    pillow_heif.register_heif_opener(thumbnails=False)

EXTENSIONS = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif",
    **({"HEIF": "heic"} if READS_HEIC else {}),
}  # fmt: skip
"""Pillow format to the member's extension in a shard. No other parser is ever tried on a user's bytes."""

_FORMATS = tuple(EXTENSIONS)

_PNG, _MAX_SAMPLE_VALUE = b"\x89PNG\r\n\x1a\n", 281

SUFFIXES = (HEIC_SUFFIXES if READS_HEIC else frozenset()) | {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
}  # fmt: skip
"""File names that are taken for images when a source is listed."""


class RejectReason(StrEnum):
    """Why an image is in quarantine."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_NARROW = "too_narrow"
    UNREADABLE = "unreadable"
    DECODER_FAILED = "decoder_failed"
    """The decoder crashed, or took longer than any sound image does."""


@dataclass(frozen=True)
class ImageLimits:
    """Images beyond these are quarantined before they are decoded."""

    max_pixels: int = 100_000_000
    """Width times height; a decompression bomb costs memory, not disk."""
    max_aspect: float = 100.0
    """Longer side divided by shorter side."""
    max_bytes: int = 128 << 20
    """Size of the file. Larger ones are not even read."""


@dataclass(frozen=True)
class ImageInfo:
    """A decodable image: its extension by content, and its size in pixels, as stored (a TIFF's as shown)."""

    extension: str
    width: int
    height: int
    brightest: int | None = None
    """Of greys that are stored in 16 bits, the largest; None of all other images."""
    white: int | None = None
    """Of such greys, the largest that can be where the file says that fewer bits are used; None where it does not."""


class ImageRejected(Exception):
    """An image that can never work: it goes to quarantine, not to retry."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(data: bytes) -> Image.Image:
    """The bytes as a Pillow image, by the parsers that ingest accepts and no other. Pixels are not decoded yet."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def inspect(data: bytes, limits: ImageLimits) -> ImageInfo:
    """Decode once and tell what it is.

    Raises:
        ImageRejected: with a reason code and a detail.
    """
    return examine(data, limits, _decode)[0]


def examine(
    data: bytes, limits: ImageLimits, show: Callable[[Image.Image, ImageInfo], Shown]
) -> tuple[ImageInfo, Shown]:
    """What an image is, and what ``show`` makes of it in the one time that it is decoded.

    Args:
        show: is given the picture within the limits, not decoded yet but for greys of 16 bits; must decode all of it.

    Raises:
        ImageRejected: with a reason code and a detail, also for whatever ``show`` raises.
    """
    if not data:
        raise ImageRejected(RejectReason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise too_many_bytes(len(data), limits)
    try:
        with open_image(data) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise ImageRejected(
                    RejectReason.TOO_LARGE, f"{width} x {height} pixels, the limit is {limits.max_pixels:,}"
                )
            if max(width, height) > limits.max_aspect * min(width, height):
                raise ImageRejected(
                    RejectReason.TOO_NARROW, f"{width} x {height} pixels, the limit is 1 : {limits.max_aspect:g}"
                )
            # What Pillow calls MPO is a JPEG with more pictures behind the first.
            extension = "jpg" if image.format == "MPO" else EXTENSIONS[str(image.format)]
            found = ImageInfo(extension, width, height, *_greys(data, image))
            return found, show(image, found)
    except ImageRejected:
        raise
    except UnidentifiedImageError:
        hint = f"; {HEIC_HINT}" if data[4:11] == b"ftyphei" and not READS_HEIC else ""
        raise ImageRejected(RejectReason.NOT_AN_IMAGE, f"begins with {data[:16]!r}{hint}") from None
    except MemoryError as error:
        raise ImageRejected(RejectReason.TOO_LARGE, "decoding ran out of memory") from error
    except Exception as error:
        # Pillow's plugins raise whatever their format trips over (struct.error, SyntaxError, zlib.error, ...).
        raise ImageRejected(RejectReason.CORRUPT, f"{type(error).__name__}: {error}"[:300]) from error


def _decode(image: Image.Image, found: ImageInfo) -> None:
    # JPEG at an eighth of its size: all of the compressed data is still read, so damage is found as before, and most of
    # the arithmetic is saved.
    image.draft(None, (1, 1))
    image.load()
    _read_exif(image)
    if isinstance(profile := image.info.get("icc_profile"), bytes):
        _read_profile(profile)


def too_many_bytes(size: int, limits: ImageLimits) -> ImageRejected:
    """The refusal of a file by its size."""
    return ImageRejected(RejectReason.TOO_LARGE, f"{size:,} bytes, the limit is {limits.max_bytes:,}")


def decoder_version() -> str:
    """Names the decoders, whose upgrade may accept what they refused before."""
    codecs = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "libtiff", "zlib")]
    codecs += [f"pillow_heif {pillow_heif.__version__}"] if READS_HEIC else []
    return ", ".join([f"pillow {features.version('pil')}", *codecs])


def _greys(data: bytes, image: Image.Image) -> tuple[int | None, int | None]:
    """The largest grey and the largest that the depth allows, see :class:`ImageInfo`; decodes what has 16 bits."""
    if not image.mode.startswith("I;16"):
        return None, None
    # Without numpy, whose threads want more memory than an inspecting process may have.
    extrema: Any = (image if image.mode == "I;16" else image.convert("I")).getextrema()
    brightest = int(extrema[1])
    bits = _png_depth(data) if image.format == "PNG" else _tiff_depth(image)
    if bits is None or not 8 <= bits < 16 or brightest >= 1 << bits:
        return brightest, None
    # Most writers scale what they have to 16 bits, as the PNG standard asks, and have nothing in the bits below theirs.
    below = (1 << 16 - bits) - 1
    scaled = image.format == "PNG" and not any(low & below for low in set(image.tobytes()[::2]))
    return brightest, None if scaled else (1 << bits) - 1


def _png_depth(data: bytes) -> int | None:
    """Bits that are significant in a grey PNG, by its chunk sBIT, which Pillow skips."""
    at = len(_PNG)
    while data.startswith(_PNG) and at + 9 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"sBIT":
            return data[at + 8]
        if kind == b"IDAT":  # it stands before the pixels
            return None
        at += length + 12
    return None


def _tiff_depth(image: Image.Image) -> int | None:
    """Bits of a grey TIFF, by its tags: of a sample, or of the largest value that a sample can have."""
    tags = getattr(image, "tag_v2", {})
    bits, most = (_first(tags.get(tag)) for tag in (TiffImagePlugin.BITSPERSAMPLE, _MAX_SAMPLE_VALUE))
    found = [*([bits] if bits else []), *([most.bit_length()] if most else [])]
    return min(found, default=None)


def _first(value: object) -> int | None:
    """Of a tag that may have a value for each sample."""
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None


def _read_exif(image: Image.Image) -> None:
    # Whatever decodes this image later turns it upright first. Damaged EXIF in a sound picture does no harm.
    try:
        image.getexif()
    except (SyntaxError, ValueError, struct.error):
        return


@functools.lru_cache(16)
def _read_profile(profile: bytes) -> None:
    # As with EXIF: the colours are converted by it later. One that is damaged counts for nothing then.
    with contextlib.suppress(OSError, ImageCms.PyCMSError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if mode is not None:
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
            transform.apply(Image.new(mode, (1, 1)))
