import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from models.towers.images import to_rgb


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (77, 128, 128), (77, 77, 77)),
        ("HSV", (0, 0, 90), (90, 90, 90)),
        ("I", 65535, (255, 255, 255)),
        ("I", 200, (200, 200, 200)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16B", 257 * 100, (100, 100, 100)),
        ("I;16", 200, (1, 1, 1)),
        ("F", 0.2, (51, 51, 51)),
        ("F", 200.0, (200, 200, 200)),
        ("F", -1.0, (0, 0, 0)),
        ("F", float("nan"), (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, stored: object, seen: tuple[int, ...]) -> None:
    assert pixel(to_rgb(Image.new(mode, (2, 2), stored))) == seen


def test_lab_goes_through_a_color_profile() -> None:
    white = pixel(to_rgb(Image.new("LAB", (1, 1), (255, 128, 128))))
    assert min(white) > 250


def test_transparent_palette_entries_are_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=0)
    converted = to_rgb(Image.open(stream))
    assert [converted.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (50, 60, 70)]


def test_a_transparent_color_of_an_rgb_png_is_white() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(stream, "PNG", transparency=(7, 8, 9))
    assert pixel(to_rgb(Image.open(stream))) == (255, 255, 255)


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16)[None]).save(stream, "PNG")
    greys = np.asarray(to_rgb(Image.open(stream)))[0, :, 0]
    assert greys.tolist() == list(range(256))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (1, 0)), (8, (0, 1))])
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (2, 2))
    image.putpixel((0, 0), (255, 0, 0))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(stream, "PNG", exif=exif)
    assert to_rgb(Image.open(stream)).getpixel(corner) == (255, 0, 0)


def test_damaged_exif_leaves_the_picture_as_stored() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(stream, "JPEG", exif=b"Exif\x00\x00garbage!")
    assert pixel(to_rgb(Image.open(stream))) == (255, 255, 255)


def test_the_input_is_not_changed() -> None:
    image = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    to_rgb(image)
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (1, 2, 3, 4)


def test_a_truncated_file_raises() -> None:
    stream = io.BytesIO()
    Image.new("L", (64, 64), 3).save(stream, "PNG")
    with pytest.raises(OSError):
        to_rgb(Image.open(io.BytesIO(stream.getvalue()[:60])))


def test_pillow_says_nothing_over_the_progress_of_a_run() -> None:
    """Palettes with transparency, and EXIF that breaks off: in a process of its own, as pytest sets filters too."""
    program = """
import io
from PIL import Image
from models.towers.images import to_rgb
from storage.images import ImageLimits, inspect, open_image
from tasks.report.slices import sharpness

palette = Image.new("P", (9, 9))
palette.putpalette(bytes(range(256)) * 3)
exif = Image.Exif()
exif[0x010E] = "a description"
for image, options in [
    (palette, {"format": "PNG", "transparency": bytes(range(256))}),
    (Image.new("L", (9, 9)), {"format": "JPEG", "exif": exif.tobytes()[:-8]}),
]:
    stream = io.BytesIO()
    image.save(stream, **options)
    inspect(stream.getvalue(), ImageLimits())
    to_rgb(open_image(stream.getvalue()))
    sharpness(open_image(stream.getvalue()))
open_image(stream.getvalue()).getexif().get(0x010E)
palette.info["transparency"] = bytes(9)
palette.convert("RGB")
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr == ""
