import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageCms

from latteflow.models.towers.images import in_range, reduced, to_rgb
from latteflow.storage.images import open_image


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


def png(depth: int, color: int, row: Sequence[int], *, key: Sequence[int] | None, interlaced: bool = False) -> bytes:
    """A PNG of one row by the standard; ``key`` is what its tRNS says, if it has one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(row) // (3 if color == 2 else 1)
    bits = "".join(f"{value:0{depth}b}" for value in row)
    line = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + line))]
    if key is not None:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks) + chunk(b"IEND", b"")


def seen(data: bytes) -> list[tuple[int, ...]]:
    """The pixels of a picture of one row, as a model sees them."""
    return [tuple(each) for each in np.asarray(to_rgb(Image.open(io.BytesIO(data))))[0].tolist()]


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, [0, 1], 0, [255, 255]),
        (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
        (4, [0, 7, 8, 15], 7, [0, 255, 136, 255]),
        (4, [0, 1, 3], 0, [255, 17, 51]),
        (8, [7, 8], 7, [255, 8]),
        (16, [1000, 1001, 0, 0x8080], 1000, [255, 4, 0, 128]),
        (16, [0, 1], 0, [255, 0]),
    ],
)
def test_the_transparent_grey_of_a_png_is_white(depth: int, row: list[int], key: int, expected: list[int]) -> None:
    assert seen(png(depth, 0, row, key=[key])) == [(grey,) * 3 for grey in expected]


def test_a_transparent_deep_grey_stays_so_where_a_range_is_given() -> None:
    image = Image.open(io.BytesIO(png(16, 0, [0, 1000, 4095], key=[0])))
    assert np.asarray(to_rgb(in_range(image, (0, 4095))))[0, :, 0].tolist() == [255, 62, 255]


def test_the_transparent_color_of_a_16_bit_png_is_compared_by_all_its_bits() -> None:
    row = [1000, 2000, 3000, 1001, 2000, 3000, 0, 0, 0]
    assert seen(png(16, 2, row, key=[1000, 2000, 3000])) == [(255, 255, 255), (3, 7, 11), (0, 0, 0)]
    dark = png(16, 2, [0, 0, 0, 0, 0, 255], key=[0, 0, 0])
    assert seen(dark) == [(255, 255, 255), (0, 0, 0)]
    assert seen(png(16, 2, [5, 5, 5], key=[5, 5, 5], interlaced=True)) == [(255, 255, 255)]


def tiff(values: np.ndarray, photometric: int, **tags: int) -> bytes:
    """An uncompressed grey TIFF, little-endian; Pillow cannot write all of these."""
    bits, height, width = values.dtype.itemsize * 8, *values.shape
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    found = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    found |= {279: values.nbytes, 339: form, **{int(name[1:]): value for name, value in tags.items()}}
    start = 8 + 2 + 12 * len(found) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else found[tag]) for tag in sorted(found)]
    return b"II*\0" + struct.pack("<IH", 8, len(found)) + b"".join(entries) + bytes(4) + values.tobytes()


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("values", "greys"),
    [
        (np.array([[0, 51, 255]], np.uint8), [0, 51, 255]),
        (np.array([[0, 257 * 51, 65535]], "<u2"), [0, 51, 255]),
        (np.array([[0, 0.2, 1]], "<f4"), [0, 51, 255]),
    ],
)
def test_in_a_tiff_0_is_black_or_white_at_any_depth(values: np.ndarray, greys: list[int], photometric: int) -> None:
    expected = greys if photometric == 1 else [255 - grey for grey in greys]
    assert seen(tiff(values, photometric)) == [(grey,) * 3 for grey in expected]


def test_a_range_is_that_of_the_file_where_0_is_white() -> None:
    image = Image.open(io.BytesIO(tiff(np.array([[0, 819, 4095, 9000]], "<u2"), 0)))
    assert np.asarray(in_range(image, (0, 4095)))[0].tolist() == [255, 204, 0, 0]


def test_unsigned_greys_of_32_bits_have_an_upper_half() -> None:
    grey = 2**24 + 2**16 + 2**8 + 1
    stored = np.array([[0, 100 * grey, 128 * grey, 255 * grey]], "<u4")
    assert seen(tiff(stored, 1)) == [(value,) * 3 for value in (0, 100, 128, 255)]
    signed = np.array([[-5, 0, 2**31 - 1]], "<i4")
    assert seen(tiff(signed, 1)) == [(value,) * 3 for value in (0, 0, 127)]


@pytest.mark.parametrize("values", [np.array([[0], [65535]], "<u2"), np.array([[0], [255]], np.uint8)])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_rotated_tiff_is_upright_once(values: np.ndarray, photometric: int) -> None:
    """Orientation 6: what is stored on top is shown on the right."""
    image = Image.open(io.BytesIO(tiff(values, photometric, t274=6)))
    shown = np.asarray(to_rgb(image))[:, :, 0].tolist()
    assert shown == ([[255, 0]] if photometric == 1 else [[0, 255]])


def test_a_gif_is_white_where_its_first_picture_leaves_the_canvas() -> None:
    """Blue in the middle, on a palette that begins with red."""
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255])
    codes = (4, 2, 2, 5)  # of LZW, 3 bits each: clear, blue, blue, end
    packed = sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(2, "little")
    canvas = b"GIF89a" + struct.pack("<HHBBB", 4, 1, 0x91, 1, 0) + palette
    frame = b"," + struct.pack("<HHHHB", 1, 0, 2, 1, 0) + b"\x02\x02" + packed + b"\0"
    white, blue = (255, 255, 255), (0, 0, 255)
    assert seen(canvas + frame + b";") == [white, blue, blue, white]
    keyed = b"!\xf9\4\1" + bytes(2) + b"\2\0"  # blue is transparent
    assert seen(canvas + keyed + frame + b";") == [white] * 4


def test_a_gif_that_covers_its_canvas_is_as_it_was() -> None:
    stream = io.BytesIO()
    first = Image.new("P", (2, 2), 1)
    first.putpalette([1, 2, 3, 4, 5, 6])
    first.save(stream, "GIF", save_all=True, append_images=[Image.new("RGB", (2, 2), "red")])
    assert pixel(to_rgb(Image.open(stream))) == (4, 5, 6)


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16)[None]).save(stream, "PNG")
    greys = np.asarray(to_rgb(Image.open(stream)))[0, :, 0]
    assert greys.tolist() == list(range(256))


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (1, 0)), (8, (0, 1))])
@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {"quality": 100})]
)
def test_exif_orientation_is_applied(
    orientation: int, corner: tuple[int, int], form: str, options: dict[str, object]
) -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(stream, form, exif=exif, **options)
    red, green, blue = to_rgb(Image.open(stream)).getpixel((4 + 8 * corner[0], 4 + 8 * corner[1]))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG", "MPO", "AVIF"])
def test_of_many_pictures_the_first_is_seen(form: str) -> None:
    stream = io.BytesIO()
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    first.save(stream, form, save_all=True, append_images=[second])
    shown = Image.open(stream)
    assert shown.n_frames == 2
    red, green, blue = pixel(to_rgb(shown))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("is_ycck", [False, True])
@pytest.mark.parametrize(
    ("inks", "color"),
    [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 155), (100, 100, 100))],
)
def test_the_inks_of_a_jpeg(inks: tuple[int, ...], color: tuple[int, ...], is_ycck: bool) -> None:
    """As Adobe stores them: turned round, and then, in YCCK, the three that are colours as YCbCr."""
    stored = [255 - ink for ink in inks]
    if is_ycck:
        stored[:3] = Image.new("RGB", (1, 1), tuple(inks[:3])).convert("YCbCr").getpixel((0, 0))
    stream = io.BytesIO()
    # Pillow turns round what it writes, and says of it that it is no YCCK.
    Image.new("CMYK", (16, 16), tuple(255 - each for each in stored)).save(stream, "JPEG", quality=100, subsampling=0)
    data = bytearray(stream.getvalue())
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2 if is_ycck else 0
    assert np.allclose(pixel(to_rgb(Image.open(io.BytesIO(data)))), color, atol=2)


def test_sixteen_bits_and_palettes_of_a_png() -> None:
    assert seen(png(16, 2, [0x1234, 0x8000, 0xFFFF], key=None)) == [(0x12, 0x80, 0xFF)]
    for bits, colors in ((1, 2), (2, 4), (4, 16), (8, 256)):
        image = Image.new("P", (2, 1), colors - 1)
        image.putpalette([value for number in range(colors) for value in (number, 255 - number, 7)])
        stream = io.BytesIO()
        image.save(stream, "PNG", bits=bits)
        assert pixel(to_rgb(Image.open(stream))) == (colors - 1, 256 - colors, 7)


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
from latteflow.models.towers.images import to_rgb
from latteflow.storage.images import ImageLimits, inspect, open_image
from latteflow.tasks.report.slices import sharpness

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


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2."""
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    head = struct.pack(
        ">I4sI4s4s4s12x4s", 132 + len(table) - 4 + len(body), bytes(4), 0x02400000, b"mntr", space, pcs, b"acsp"
    )
    return head.ljust(68, b"\0") + xyz(0.9642, 1, 0.8249)[8:] + bytes(128 - 80) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
"""To XYZ under D50, from its specification; below, of sRGB, from IEC 61966-2-1."""
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
COMMON = {b"wtpt": xyz(0.9642, 1, 0.8249)}
WIDE = icc(
    b"RGB ",
    COMMON
    | {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*ADOBE, strict=True), strict=True)}
    | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(563 / 256)),
)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Light of 0 to 1 as values of sRGB."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_to_srgb(color: tuple[int, ...]) -> np.ndarray:
    linear = (np.array(color[:3]) / 255) ** (563 / 256)
    return encoded(np.linalg.inv(SRGB) @ ADOBE @ linear)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        ("HEIF", {"quality": -1, "chroma": 444}),
    ],
)
def test_wide_colors_are_what_they_are_in_srgb(form: str, options: dict[str, object]) -> None:
    for color in [(120, 180, 60), (255, 255, 255), (0, 255, 0), (90, 100, 200)]:
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), color).save(stream, form, icc_profile=WIDE, **options)
        stored = open_image(stream.getvalue()).getpixel((0, 0))
        assert np.allclose(stored, color, atol=3)
        assert np.allclose(pixel(to_rgb(open_image(stream.getvalue()))), adobe_to_srgb(stored), atol=2)


def test_wide_colors_of_palettes_and_half_transparent_pixels() -> None:
    color = (120, 180, 60, 51)
    image = Image.new("RGBA", (2, 2), color)
    image.info["icc_profile"] = WIDE
    assert np.allclose(pixel(to_rgb(image)), 0.2 * adobe_to_srgb(color) + 0.8 * 255, atol=2)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *color[:3]])
    palette.info["icc_profile"] = WIDE
    assert np.allclose(pixel(to_rgb(palette)), adobe_to_srgb(color), atol=2)
    assert image.mode == "RGBA" and image.info["icc_profile"] == WIDE


def test_greys_and_inks_by_their_profiles() -> None:
    grey = Image.new("L", (2, 2), 100)
    grey.info["icc_profile"] = icc(b"GRAY", COMMON | {b"kTRC": gamma(1)})
    assert np.allclose(pixel(to_rgb(grey)), encoded(np.array(100 / 255)), atol=2)
    # A table from inks to Lab with their corners only: the first ink is a green, the last black, the others water.
    paper, green, black = (255, 128, 128), (153, 88, 168), (0, 128, 128)
    lab = [black if corner % 2 else green if corner >= 8 else paper for corner in range(16)]
    corners = bytes(value for each in lab for value in each)
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * identity + corners + 3 * identity
    inks = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    inks.info["icc_profile"] = icc(b"CMYK", COMMON | {b"A2B0": table})
    light = (153 / 2.55 + 16) / 116
    roots = np.array([light - 40 / 500, light, light - 40 / 200])
    tristimulus = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * [0.9642, 1, 0.8249]
    assert np.allclose(pixel(to_rgb(inks)), encoded(np.linalg.inv(SRGB) @ tristimulus), atol=2)
    inks.paste((0, 255, 255, 0), (0, 0, 2, 2))
    assert min(pixel(to_rgb(inks))) >= 253


def test_profiles_of_srgb_damaged_ones_and_those_of_other_colors_change_nothing() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for profile in (own, WIDE[:200], b"", b"nothing", bytes(5 << 20), icc(b"GRAY", COMMON | {b"kTRC": gamma(1)})):
        image = Image.fromarray(values)
        image.info["icc_profile"] = profile
        assert (np.asarray(to_rgb(image)) == values).all()
    grey = Image.new("L", (2, 2), 100)
    grey.info["icc_profile"] = WIDE
    assert pixel(to_rgb(to_rgb(grey))) == (100, 100, 100)


@pytest.mark.parametrize(
    ("form", "fit", "size"),
    [
        ("JPEG", "crop", (500, 300)),  # a quarter: 300 is more than 2.5 times 112
        ("JPEG", "pad", (250, 150)),
        ("PNG", "crop", (2000, 1200)),
    ],
)
def test_a_jpeg_is_decoded_as_small_as_a_model_lets_it(form: str, fit: Literal["crop", "pad"], size: Any) -> None:
    out = io.BytesIO()
    Image.effect_mandelbrot((2000, 1200), (-2, -1, 1, 1), 100).save(out, form, quality=95)
    side = 84 if fit == "pad" else 112
    assert reduced(Image.open(out), side, fit).size == size
    decoded = Image.open(out)
    decoded.load()
    assert to_rgb(reduced(decoded, side, fit)).size == (2000, 1200)
