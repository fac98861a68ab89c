"""One way to turn any picture PIL can open into plain RGB, used before every model."""

import functools
import io
import math
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import GifImagePlugin, Image, ImageCms, ImageOps, PngImagePlugin

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
INTEGER_RANGES = (2**8 - 1, 2**16 - 1, 2**32 - 1)
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339
"""TIFF tags: with 0 in the first, 0 is white; with 1 in the second, which is the default, numbers have no sign."""
SHARP = 2.5
"""How much larger than what a model reads a JPEG is decoded: features of photographs move by a cosine of 0.001 at most,
those of line drawings by 0.004; at twice the size it is 0.012 of a drawing (the embedded model)."""
COLOR_SPACES = {"RGB": "RGB ", "RGBA": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
"""Modes that are converted by a profile, and what the profile calls them."""
MOST_PROFILE_BYTES = 4 << 20
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""What greys of a few bits are multiplied by as Pillow reads them, by its name for how they are packed."""


@dataclass(frozen=True)
class Reading:
    """How a model wants to be shown pictures; JSON values.

    Attributes:
        side: of the square that the model reads, in pixels.
        fit: whether the model is shown the middle of a picture, or all of it on a square.
        greys: which values of greys of more than 8 bits are black and white, see :data:`models.settings.GreyRange`.
    """

    side: int
    fit: Literal["crop", "pad"]
    greys: Literal["auto", "full"] | tuple[float, float] = "auto"

    def shown(self, image: Image.Image, white: int | None = None) -> Image.Image:
        """A picture that was opened and not decoded yet, as a person would see it, no larger than need be.

        Args:
            white: of greys of 16 bits, the largest value that there can be, where the file says that.

        Raises:
            OSError: PIL cannot read the pixels (truncated or damaged file).
        """
        by_file = (0.0, float(white)) if white is not None and self.greys == "auto" else None
        image = in_range(image, by_file if isinstance(self.greys, str) else self.greys)
        return to_rgb(reduced(image, self.side, self.fit))


def reduced(image: Image.Image, side: int, fit: Literal["crop", "pad"]) -> Image.Image:
    """The same picture, to be decoded no larger than a model needs it.

    A JPEG that is not decoded yet will be at a half, a quarter or an eighth of its size, as long as that leaves
    :data:`SHARP` times what the model reads: several times as fast. All others stay as they are.

    Args:
        side: of the square that the model reads, in pixels.
        fit: whether it is shown the middle of the picture, or all of it.
    """
    if image.format in ("JPEG", "MPO"):
        least = SHARP * side / (max(image.size) if fit == "pad" else min(image.size))
        if least < 1:
            image.draft(None, (math.ceil(image.width * least), math.ceil(image.height * least)))
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person would see it: upright, on white, in sRGB, 8 bits a channel.

    EXIF rotation and ICC profile are applied, transparency of any kind is composited on white, greys of 16 or 32 bits
    are scaled to 8 bits (not cut off at 255, as PIL's own conversion does), palettes, CMYK, YCbCr, HSV and LAB are
    converted. Of an animation the current frame is used. The input is not changed; an upright RGB picture in sRGB is
    returned as it is.

    Some of what a file says about transparency PIL forgets with decoding: pass a picture that is not decoded yet.

    Raises:
        OSError: PIL cannot read the pixels (truncated or damaged file).
    """
    image = _upright(_eight_bits(image) if _is_deep(image) else _transparent(image))
    if image.mode == "RGB" and not {"transparency", "icc_profile"} & image.info.keys():
        return image
    if image.mode == "LAB":  # PIL converts this one by colour profiles only
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only when converted in place
        return converted
    if image.has_transparency_data:
        layer = _in_srgb(image.convert("RGBA"))
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    shown = _in_srgb(image if image.mode in COLOR_SPACES else image.convert("RGB"))
    if shown is image and image.mode == "RGB":  # in sRGB already
        return image
    shown = shown.convert("RGB")
    shown.info.pop("icc_profile", None)  # it was heeded
    return shown


def in_range(image: Image.Image, greys: tuple[float, float] | None) -> Image.Image:
    """Greys of more than 8 bits as 8 bits, upright, where it is known which values are black and white.

    Args:
        greys: these two, the other way round in a file in which 0 is white; values beyond them are cut off. None: the
            image is returned as it is, as all others are.
    """
    return image if greys is None or not _is_deep(image) else _upright(_eight_bits(image, greys))


def smaller(image: Image.Image, longest_px: int) -> Image.Image:
    """The picture with no side longer than ``longest_px``, aspect kept; one that has none is returned as it is."""
    if max(image.size) <= longest_px:
        return image
    image = image.copy()
    image.thumbnail((longest_px, longest_px))
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error):  # damaged EXIF in a sound picture: shown as stored, as browsers do
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours of the picture's ICC profile in sRGB; a damaged one, or one of other colours, counts for nothing."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or len(profile) > MOST_PROFILE_BYTES:
        return image
    transform = _to_srgb(profile, image.mode)
    return image if transform is None else transform.apply(image)


@functools.lru_cache(16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where it would change nothing: most profiles are those of sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != COLOR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB"
        )
    except (OSError, ImageCms.PyCMSError):
        return None
    # Every 17th value of each channel is enough, as curves are smooth.
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    some = np.stack(np.meshgrid(*[steps] * len(mode)), axis=-1).reshape(-1, len(mode))
    image = Image.frombytes(mode, (len(some), 1), some.tobytes())
    changes = np.asarray(transform.apply(image).convert("RGB"), np.int16) - np.asarray(image.convert("RGB"))
    return transform if np.abs(changes).max() > 2 else None


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image, greys: tuple[float, float] | None = None) -> Image.Image:
    """Greys of mode I, I;16* or F as mode L, or as LA where the file names a transparent one.

    Args:
        greys: which values are black and white. None: 0 and the first usual full scale that holds the largest value.
    """
    stored = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if tags and image.mode == "I" and np.ravel(tags.get(SAMPLE_FORMAT, 1))[0] == 1:
        stored = stored.view(np.uint32)  # PIL has no such mode, and reads the upper half as negative
    values = np.nan_to_num(stored.astype(np.float64))
    black, white = greys or (0.0, _full_scale(values, image.mode))
    if tags.get(PHOTOMETRIC) == 0:  # PIL turns such greys of up to 8 bits round itself
        black, white = white, black
    shown = Image.fromarray(np.rint(((values - black) * (255 / (white - black))).clip(0, 255)).astype(np.uint8))
    shown.info = {**image.info}
    key = shown.info.pop("transparency", None)
    if key is not None:
        _hide(shown, stored == key)
    return shown


def _full_scale(values: np.ndarray, mode: str) -> float:
    if mode.startswith("I;16"):
        return 2**16 - 1
    ranges = (1.0, *INTEGER_RANGES) if mode == "F" else INTEGER_RANGES
    return next((r for r in ranges if values.max(initial=0) <= r), float(values.max(initial=0)))


def _transparent(image: Image.Image) -> Image.Image:
    """The picture with that of its transparency which PIL reads wrongly or not at all."""
    key = image.info.get("transparency")
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile and key is not None:
        packed = image.tile[0].args
        if packed in GREY_STEPS:  # the key is that of the file, the pixels are not
            image = image.copy()
            image.info["transparency"] = key * GREY_STEPS[str(packed)]
        elif packed == "RGB;16B":  # PIL keeps the upper bytes of the pixels, of which many share that of the key
            lower = np.asarray(_lower_bytes(image))
            stored = np.asarray(image).astype(np.uint16) << 8 | lower
            image = image.copy()
            del image.info["transparency"]
            _hide(image, (stored == key).all(axis=2))
    elif isinstance(image, GifImagePlugin.GifImageFile) and image.tell() == 0 and key is None:
        # What the first frame leaves of the canvas is transparent, as browsers have it, not the palette's first colour.
        covered = image.dispose_extent
        if covered and covered != (0, 0, *image.size):
            shown = image.convert("RGBA").crop(covered)
            image = Image.new("RGBA", image.size)
            image.paste(shown, covered)
    return image


def _lower_bytes(image: PngImagePlugin.PngImageFile) -> Image.Image:
    """Of an RGB PNG of 16 bits that is not decoded yet: PIL's names for the order of bytes say which one it keeps."""
    file: Any = image.fp
    place = file.tell()
    file.seek(0)
    again = Image.open(io.BytesIO(file.read()), formats=["PNG"])
    file.seek(place)
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    return again


def _hide(image: Image.Image, where: np.ndarray) -> None:
    """Make pixels transparent: where ``(height, width)`` is true."""
    image.putalpha(Image.fromarray(np.where(where, np.uint8(0), np.uint8(255))))
