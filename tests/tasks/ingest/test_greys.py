"""Greys of 12 bits that are stored in 16: by what the file says, by the domain file, or with a warning."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image, TiffImagePlugin

from latteflow.flows.pipeline import run_plainly
from latteflow.models.ship.predictor import Predictor
from latteflow.models.towers.images import in_range, to_rgb
from latteflow.storage.artifacts import Artifact
from latteflow.storage.images import ImageInfo, ImageLimits, inspect
from latteflow.storage.inspectors import Inspectors
from latteflow.storage.shards import Greys, read_index, read_records
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import ConfigError, Domain
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard
from latteflow.tasks.ship.export import export_zero_shot
from latteflow.tasks.ship.predict import Decoder

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def png(values: np.ndarray, bits: int | None = None) -> bytes:
    """A grey PNG of 16 bits; ``bits`` of them are significant, by the file."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    data = out.getvalue()
    if bits is None:
        return data
    body = b"sBIT" + bytes([bits])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]  # behind the header


def tiff(values: np.ndarray, most: int | None = None, form: str = "<u2") -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if most is not None:
        tags[281] = most
    out = io.BytesIO()
    Image.fromarray(values.astype(form)).save(out, "TIFF", tiffinfo=tags)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "brightest", "white"),
    [
        (png(RAMP), 4095, None),
        (png(RAMP, 12), 4095, 4095),
        (png(RAMP, 16), 4095, None),
        (png(RAMP << 4, 12), 65520, None),  # scaled, as the standard asks
        (png((RAMP >> 4) << 4, 12), 4080, None),  # scaled and dark
        (png(RAMP, 10), 4095, None),  # more than it says
        (png(RAMP, 12)[:33] + png(RAMP, 12)[46:], 4095, None),
        (tiff(RAMP), 4095, None),
        (tiff(RAMP, 4012), 4095, 4095),
        (tiff(RAMP, 4012, ">u2"), 4095, 4095),
        (tiff(RAMP, 255), 4095, None),
        (tiff(RAMP, 65535), 4095, None),
    ],
)
def test_the_depth_is_what_the_file_says(data: bytes, brightest: int, white: int | None) -> None:
    found = inspect(data, ImageLimits())
    assert (found.brightest, found.white) == (brightest, white)
    with Inspectors(ImageLimits(), 1) as inspectors:
        assert inspectors([data]) == [found]


def test_other_images_have_no_such_depth() -> None:
    out = io.BytesIO()
    Image.new("L", (9, 9), 3).save(out, "PNG")
    assert inspect(out.getvalue(), ImageLimits()) == ImageInfo("png", 9, 9)


def test_a_tiff_of_12_bits_packed_is_known_by_its_bits() -> None:
    """Two pixels in three bytes: 0xFFF and 0x800."""
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 4, 1)]
    entries.append((279, 4, 3))
    start = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, start if tag == 273 else v) for tag, kind, v in entries)
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + bytes([0xFF, 0xF8, 0x00])
    assert inspect(data, ImageLimits()).white == 4095


def test_greys_are_stretched_upright_and_nothing_else_is() -> None:
    image = Image.fromarray(RAMP[:2, :2] + np.uint16(100))
    exif = image.getexif()
    exif[0x0112] = 3
    image.info["exif"] = exif.tobytes()
    turned = np.asarray(in_range(image, (100, 165)))
    assert turned.tolist() == [[255, 251], [4, 0]]
    assert np.asarray(to_rgb(in_range(Image.fromarray(RAMP), (0, 4095)))).max() == 255
    colour = Image.new("RGB", (2, 2))
    assert in_range(colour, (0, 9)) is colour


# --- a domain ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def deep(domain: Domain, tmp_path: Path) -> Domain:
    """The domain's source with greys of 12 bits: half of them say so."""
    for number in range(4):
        data = png(np.roll(RAMP, 7 * number), 12 if number % 2 else None)
        (tmp_path / "train" / f"grey{number}.png").write_bytes(data)
    return domain


def ranged(domain: Domain, value: object) -> Domain:
    settings = domain.shard.model_validate({**domain.shard.model_dump(), "grey_range": value})
    return domain.model_copy(update={"shard": settings})


def brightest(domain: Domain, made: StageResult) -> dict[str, int]:
    """Of the greys as a model sees them, by the number in their names."""
    images = open_store(domain).open(made.ref)
    index = read_index(images).filter(pl.col("path").str.starts_with("grey")).sort("path")
    return {record.path[4]: int(np.asarray(to_rgb(opened(record))).max()) for record in read_records(images, index)}


def contents(images: Artifact) -> set[str]:
    greys = Greys(images)
    return {greys.content(*row) for row in read_index(images).select("key", "sha256").iter_rows()}


def test_the_file_says_it_or_the_domain_file(deep: Domain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = shard(deep, "train")
    assert brightest(deep, first) == {"0": 16, "1": 255, "2": 16, "3": 255}
    assert "the greys of 2 images have 16 bits and go up to 4095 of 65535" in caplog.text
    assert "`shard: {grey_range: [0, 4095]}`" in caplog.text
    caplog.clear()
    features = embed(deep, first)

    own = ranged(deep, [0, 4095])
    second = shard(own, "train")
    assert set(brightest(own, second).values()) == {255}
    store = open_store(deep)
    assert [part.name for part in store.open(second.ref).parts] == [part.name for part in store.open(first.ref).parts]
    assert second.ref.digest != first.ref.digest
    again = embed(own, second)
    assert not again.cached and again.ref.digest != features.ref.digest
    # Texts about images as they were are not taken for texts about images as they are; two look as they did.
    assert len(contents(store.open(first.ref)) & contents(store.open(second.ref))) == 2

    full = ranged(deep, "full")
    assert set(brightest(full, shard(full, "train")).values()) == {16}
    assert not caplog.text.count("grey_range")
    assert shard(deep, "train").cached and embed(deep, first).cached


def test_a_shard_stage_without_such_a_setting_has_the_fingerprint_that_it_had(deep: Domain) -> None:
    with rules(make=False), pytest.raises(NotMade) as missing:
        shard(deep, "train")
    assert missing.value.inputs["settings"].keys() == {
        "images", "max_pixels", "max_aspect", "max_megabytes", "drop_duplicates", "image_column"
    }  # fmt: skip


def test_an_exported_model_reads_greys_as_it_was_adapted_to_them(deep: Domain, tmp_path: Path) -> None:
    own = ranged(deep, [0, 4095])
    export_zero_shot(own, embed(own, shard(own, "train")), tmp_path / "model")
    export_zero_shot(deep, embed(deep, shard(deep, "train")), tmp_path / "auto")
    plain, said = (tmp_path / "train" / f"grey{number}.png" for number in (0, 1))
    bright: dict[tuple[str, str], float] = {}
    for name in ("model", "auto"):
        with Decoder(Predictor.load(tmp_path / name), ImageLimits()) as decode:
            for file in (plain, said):
                bright[name, file.stem] = float(decode([file.read_bytes()])[0].max())  # type: ignore[union-attr]
    assert bright["model", "grey0"] == bright["model", "grey1"] == bright["auto", "grey1"] > bright["auto", "grey0"] + 2


@pytest.mark.parametrize("value", ["automatic", "[4095, 0]", "[0, 1, 2]", "[0, .nan]", "[true, 3]", "12"])
def test_a_range_that_is_none_is_told_with_its_line(domain: Domain, tmp_path: Path, value: str) -> None:
    file = tmp_path / "domain.yaml"
    file.write_text(file.read_text().replace("shard: {images: 10}", f"shard:\n  grey_range: {value}"))
    with pytest.raises(ConfigError, match=r"line 12: `shard.grey_range` is neither auto nor full nor \[low, high\]"):
        Domain.load(file)


@pytest.mark.slow
def test_a_whole_run_on_greys(deep: Domain) -> None:
    own = ranged(deep, [0, 4095])
    results = run_plainly(own)
    assert results[-1].label == "report" and all(each.cached for each in run_plainly(own))
