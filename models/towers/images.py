"""One way to turn any picture PIL can open into plain RGB, used before every model."""

import struct

import numpy as np
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
INTEGER_RANGES = (2**8 - 1, 2**16 - 1, 2**32 - 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person would see it: upright, on white, 8 bits a channel.

    EXIF rotation is applied, transparency of any kind is composited on white, greys of 16 or 32 bits are scaled to 8
    bits (not cut off at 255, as PIL's own conversion does), palettes, CMYK, YCbCr, HSV and LAB are converted. Of an
    animation the current frame is used. The input is not changed; an upright RGB picture is returned as it is.

    Raises:
        OSError: PIL cannot read the pixels (truncated or damaged file).
    """
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _is_deep(image):
        return _eight_bits(image).convert("RGB")
    if image.mode == "LAB":  # PIL converts this one by colour profiles only
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # None only when converted in place
        return converted
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def in_range(image: Image.Image, greys: tuple[float, float] | None) -> Image.Image:
    """Greys of more than 8 bits as 8 bits, upright, where it is known which values are black and white.

    Args:
        greys: these two; values beyond them are cut off. None: the image is returned as it is, as all others are.
    """
    if greys is None or not _is_deep(image):
        return image
    low, high = greys
    values = np.nan_to_num(np.asarray(_upright(image)).astype(np.float64))
    return Image.fromarray(np.rint(((values - low) * (255 / (high - low))).clip(0, 255)).astype(np.uint8))


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


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of mode I, I;16* or F as mode L. Their full scale is the first usual one that holds the largest value."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode.startswith("I;16"):
        full_scale: float = 2**16 - 1
    else:
        ranges = (1.0, *INTEGER_RANGES) if image.mode == "F" else INTEGER_RANGES
        full_scale = next((r for r in ranges if values.max(initial=0) <= r), values.max(initial=0))
    return Image.fromarray(np.rint(values.clip(0) * (255 / full_scale)).astype(np.uint8))
