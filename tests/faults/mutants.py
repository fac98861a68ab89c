"""Damaged and hostile images, archives and tables, the same ones in every run."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms

import latteflow.storage.images  # noqa: F401  # has Pillow know HEIC

EXTREME = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80", b"\1\0\0\0"]


def mutated(data: bytes, draw: random.Random, other: bytes = b"") -> bytes:
    """One to six random damages."""
    body = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 3, 6])):
        at = draw.randrange(len(body)) if draw.random() < 0.5 else draw.randrange(min(len(body), 600))
        length = draw.choice([1, 2, 4, 16, 200])
        kind = draw.randrange(8)
        if kind == 0:
            body[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            body[at : at + 4] = draw.choice(EXTREME)
        elif kind == 2:
            body[at : at + 2] = draw.choice(EXTREME)[:2]
        elif kind == 3:
            del body[at : at + length]
        elif kind == 4:
            body[at:at] = body[at : at + length] * draw.choice([1, 3, 50])
        elif kind == 5:
            body[at:at] = draw.randbytes(length)
        elif kind == 6 and other:
            body[at : at + length] = other[at : at + length]
        else:
            del body[max(at, 1) :]
        body = body or bytearray(b"\0")
    return bytes(body)


def pixels(side: int = 24, channels: int = 3) -> Image.Image:
    grid = np.random.default_rng(side).integers(0, 255, (side, side, channels), dtype=np.uint8)
    return Image.fromarray(grid)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def images() -> dict[str, bytes]:
    """One of each kind that the parsers know."""
    rgb, rgba = pixels(), pixels(channels=4)

    def pages(form: str) -> bytes:
        first, *rest = [pixels(side).resize((24, 24)) for side in (8, 9, 10)]
        return encoded(first, form, save_all=True, append_images=rest)

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True, exif=exif),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg with a profile": encoded(rgb, "JPEG", icc_profile=profile),
        "jpeg of several pictures": pages("MPO"),
        "png": encoded(rgba, "PNG", exif=exif),
        "png palette": encoded(rgb.quantize(16), "PNG", transparency=3),
        "png 16 bit": encoded(rgb.convert("L").convert("I;16"), "PNG"),
        "gif": pages("GIF"),
        "webp": encoded(rgba, "WEBP", lossless=True, exif=exif),
        "webp frames": pages("WEBP"),
        "avif": encoded(rgb, "AVIF"),
        "heic": encoded(rgb, "HEIF"),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF"),
        "tiff lzw": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encoded(rgb, "TIFF", compression="jpeg"),
        "tiff pages": pages("TIFF"),
    }


def tar(members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tars() -> dict[str, bytes]:
    """Archives of the usual dialects, with short and long names."""
    image = encoded(pixels(8), "PNG")
    members = {"a.png": image, "a.json": b"{}", "folder/" * 30 + "b.png": image, "ü.jpg": encoded(pixels(9), "JPEG")}
    return {
        name: tar(members, form)
        for name, form in [("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("ustar", tarfile.USTAR_FORMAT)]
    }


def small_tars() -> dict[str, bytes]:
    """A file behind a member of each kind. Few bytes: most mutants hit something that matters."""
    file = special("a.png", tarfile.REGTYPE, size=1, data=b"a")
    fronts = {
        "file": file,
        "link": special("a.png", tarfile.SYMTYPE, "b.png"),
        "name": special("a", b"L", size=5, data=b"b.png"),
        "pax": special("a", b"x", size=14, data=b"14 path=b.png\n"),
        "sparse": special("b.png", tarfile.GNUTYPE_SPARSE, size=1, data=b"b"),
    }
    return {name: front + file for name, front in fronts.items()}


def tables() -> dict[str, bytes]:
    """Parquet, Arrow stream and Arrow file."""
    data = [encoded(pixels(side), "PNG") for side in range(4, 12)]
    names = [f"{number}.png" for number in range(len(data))]
    column = pa.StructArray.from_arrays([pa.array(data, pa.binary()), pa.array(names)], ["bytes", "path"])
    table = pa.table({"image": column, "label": pa.array(range(len(data)))})
    found = {}
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=3)
    found["parquet"] = out.getvalue()
    for name, opened in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        out = io.BytesIO()
        with opened(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        found[name] = out.getvalue()
    return found


def special(name: str, kind: bytes, link: str = "", size: int = 0, data: bytes = b"") -> bytes:
    """A tar member that is no plain file, or that lies about its size."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, pixels: bytes | None = None) -> bytes:
    """A PNG of grey pixels with chunks of any kind in front of them."""
    rows = pixels if pixels is not None else bytes((width + 1) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG that says the same thing very often: little to store, much to decode."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def tiff_pages(count: int) -> bytes:
    """A TIFF with very many pages, which all are the same picture."""
    entries = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 1)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *each) for each in entries)
    size = len(body) + 4
    pages = [body + struct.pack("<I", 12 + size * (page + 1) if page + 1 < count else 0) for page in range(count)]
    return b"II*\0" + struct.pack("<I", 12) + b"\x80\0\0\0" + b"".join(pages)


def gif(frames: int = 1, comment: int = 0) -> bytes:
    """A GIF of so many frames, with a comment of so many blocks of 255 bytes."""
    data = encoded(Image.new("L", (8, 8)), "GIF")
    start = data.index(b",", 13)
    blocks = b"!\xfe" + (b"\xff" + b"a" * 255) * comment + b"\0" if comment else b""
    return data[:start] + blocks + data[start:-1] * frames + b";"


def jpeg(segment: bytes, count: int) -> bytes:
    """A JPEG with the same segment in front very often."""
    data = encoded(pixels(8), "JPEG")
    return data[:2] + (segment[:2] + struct.pack(">H", len(segment)) + segment[2:]) * count + data[2:]


def webp(side: int) -> bytes:
    """The header of an animation, and nothing behind it."""
    edge = (side - 1).to_bytes(3, "little")
    return b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + edge + edge + b"ALPH\0\0\0\0"


def bmp(width: int, height: int) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + sizes


BOMBS: dict[str, Callable[[], bytes]] = {
    "huge png": lambda: png(60_000, 60_000, pixels=b""),
    "huge webp": lambda: webp(16_383),
    "huge bmp": lambda: bmp(2**31 - 1, -(2**31)),
    "png text of 256 MB": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28)))),
    "png profile of 256 MB": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28)))),
    "png texts without end": lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 200),
    "png of 256 MB behind 64 pixels": lambda: png(8, 8, pixels=bytes(1 << 28)),
    "png of 50,000 chunks": lambda: png(8, 8, *[chunk(b"tEXt", b"a\0b")] * 50_000),
    "gif of 10,000 frames": lambda: gif(frames=10_000),
    "gif comment of 5 MB": lambda: gif(comment=20_000),
    "tiff of 10,000 pages": lambda: tiff_pages(10_000),
    "tiff whose page follows itself": lambda: tiff_pages(2)[:-4] + struct.pack("<I", 12),
    "jpeg of 60 exif blocks": lambda: jpeg(b"\xff\xe1Exif\0\0" + bytes(60_000), 60),
    "jpeg of 60 profiles": lambda: jpeg(b"\xff\xe2ICC_PROFILE\0\1\1" + bytes(60_000), 60),
    "jpeg of 2,000 scans": lambda: scans(2_000, 3_000),
}


def dataset(folder: Path, state: object) -> Path:
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data.arrow").write_bytes(tables()["stream.arrow"])
    return folder
