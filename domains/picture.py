"""What a preparer yields: one picture of a domain, with its file bytes."""

import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageChops

Split = Literal["train", "test"]

SPLIT_SEED = 17  # one that leaves every class of clipart and emoji_coarse two drawings or more in each split
PNG_GREY = 0  # colour type of the PNG header


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image file of a domain. The label lives here and in `labels.csv` only, never in the file's name."""

    split: Split
    name: str
    png: bytes
    label: str
    text: str | None = None

    @property
    def path(self) -> str:
        """Path relative to the domain's folder, for example `test/0001.png`."""
        return f"{self.split}/{self.name}.png"


def unique(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """The pictures without those whose bytes came before."""
    seen = set()
    for picture in pictures:
        digest = hashlib.sha256(picture.png).digest()
        if digest not in seen:
            seen.add(digest)
            yield picture


def split_of(key: str, test_share: float = 0.2) -> Split:
    """Assign a key to a split by its hash alone, so that new keys never move old ones.

    Args:
        key: whatever must stay together: a drawing's series, an emoji's code points.
        test_share: expected share of keys in the test split, in [0, 1].
    """
    value = int.from_bytes(hashlib.sha256(f"split {SPLIT_SEED} {key}".encode()).digest()[:8], "big") / 2**64
    return "test" if value < test_share else "train"


def opaque_name(key: str) -> str:
    """A file name of 16 hex digits that says nothing of the key, nor of its neighbours in sorted order."""
    return hashlib.sha256(f"name {key}".encode()).hexdigest()[:16]


def grey_png(pixels: np.ndarray) -> bytes:
    """A PNG without compression: the same bytes on every machine, whatever zlib it has.

    Args:
        pixels: grey values, `(height, width)` uint8, at most 65,535 bytes with one filter byte a row.
    """
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()  # filter type 0 before each row
    if len(rows) > 0xFFFF:
        raise ValueError(f"image of {width} x {height} pixels does not fit one stored block; use `small_png`")
    header = struct.pack(">IIBBBBB", width, height, 8, PNG_GREY, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, level=0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def small_png(image: Image.Image, side_px: int) -> bytes | None:
    """The image on white as PNG, its longer side shrunk to `side_px` (never enlarged); None when it is all white.

    Transparency goes because many readers drop the alpha channel and show whatever colour lies under it.
    """
    image = image.convert("RGBA")
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS, reducing_gap=3.0)
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image)
    if ImageChops.invert(flat).getbbox() is None:
        return None
    buffer = BytesIO()
    flat.save(buffer, "PNG")
    return buffer.getvalue()
