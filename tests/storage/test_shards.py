"""Shards: the same bytes for the same images, append-only, and nothing refused is lost."""

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import webdataset
from PIL import Image, ImageCms

from latteflow.models.towers.images import to_rgb
from latteflow.storage import shards
from latteflow.storage.artifacts import Artifact, ArtifactStore, ArtifactWriter
from latteflow.storage.errors import DataError
from latteflow.storage.fingerprint import canonical_json
from latteflow.storage.images import ImageLimits, ImageRejected, inspect, open_image
from latteflow.storage.listing import StatCache
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import (
    Packing,
    newest,
    overlap,
    read_index,
    read_quarantine,
    read_records,
    retry_quarantined,
    write_shards,
)
from latteflow.storage.sources import Entry, Source
from latteflow.storage.tables import read_parquet


def picture(seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def pack(folder: Path, where: Path, per_shard: int = 4, *, drop: bool = False, **limits: int) -> Artifact:
    store = ArtifactStore(ObjectStore(str(where)))
    source = Source([str(folder)])
    packing = Packing(per_shard, ImageLimits(**limits), drop)
    with StatCache(store.objects, "d/shard/stat").digested(source, packing.limits) as images:
        inputs = {"split": "train", "images": images.digest, "drop": drop, **limits}
        writer = store.writer("d", "shard", 1, inputs)
        previous = newest(store, "d", "train")
        counts = write_shards(writer, source, images, previous, packing, again=bool(limits))
        return writer.finish(counts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number in range(10):
        (folder / ("deep" if number % 2 else ".") / f"{number}.png").write_bytes(picture(number))
    return folder


def tree(root: Path) -> dict[str, bytes]:
    kept = (path for path in root.rglob("*") if path.is_file() and "stat" not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "one")
    other = tmp_path / "elsewhere"
    (other / "deep").mkdir(parents=True)
    for path in sorted(folder.rglob("*.png"), reverse=True):  # written in another order, on another day
        copy = other / path.relative_to(folder)
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (1, 1))
    pack(other, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_plain_webdataset_reads_a_shard(folder: Path, tmp_path: Path) -> None:
    artifact = pack(folder, tmp_path / "store")
    assert len(artifact.names(".tar")) == 3
    seen = {}
    for name in artifact.names(".tar"):
        for sample in webdataset.WebDataset(artifact.address(name), shardshuffle=False):
            seen[sample["__key__"]] = (json.loads(sample["json"]), sample["png"])
    index = read_index(artifact)
    assert set(seen) == set(index["key"])
    for record in read_records(artifact, index):
        told, data = seen[record.key]
        assert told == {"key": record.key, "path": record.path, "sha256": record.sha256, "width": 8, "height": 6}
        assert data == record.data == (folder / record.path).read_bytes()


def test_members_are_sorted_and_carry_nothing_of_their_maker(folder: Path, tmp_path: Path) -> None:
    artifact = pack(folder, tmp_path / "store")
    with tarfile.open(fileobj=io.BytesIO(artifact.read("shard-00000.tar"))) as tar:
        members = tar.getmembers()
    names = [member.name.split(".")[0] for member in members]
    assert names == sorted(names)
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


def test_new_images_make_new_shards_and_old_shards_stay(folder: Path, tmp_path: Path) -> None:
    before = pack(folder, tmp_path / "store")
    (folder / "new.png").write_bytes(picture(100))
    after = pack(folder, tmp_path / "store")
    assert after.counts["images"] == 11
    for name in before.names(".tar"):
        assert after.files[name] == before.files[name]
    assert len(after.names(".tar")) == len(before.names(".tar")) + 1


def test_removed_and_changed_images_leave_the_index(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "store")
    (folder / "0.png").unlink()
    (folder / "2.png").write_bytes(picture(200))
    after = pack(folder, tmp_path / "store")
    index = read_index(after)
    assert after.counts["images"] == 9 and after.counts["removed"] == 2
    assert "0.png" not in index["path"].to_list()
    assert index["path"].to_list().count("2.png") == 1
    assert sorted(read_parquet(after.read("removed.parquet"))["path"]) == ["0.png", "2.png"]
    (folder / "0.png").write_bytes(picture(0))  # it comes back
    assert pack(folder, tmp_path / "store").counts["images"] == 10


def test_duplicates_are_recorded(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").write_bytes(picture(3))
    artifact = pack(folder, tmp_path / "store")
    duplicates = read_parquet(artifact.read("duplicates.parquet"))
    paths = dict(read_index(artifact).select("key", "path").iter_rows())
    assert artifact.counts["duplicates"] == 1
    assert {paths[key] for key in duplicates.row(0)[:2]} == {"copy.png", "deep/3.png"}


def test_dropped_duplicates_are_recorded_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.png").write_bytes(picture(3))
    kept = pack(folder, tmp_path / "store")
    dropped = pack(folder, tmp_path / "store", drop=True)
    assert dropped.counts == kept.counts | {"images": 10}
    assert read_index(dropped).height == 10 and read_index(kept).height == 11
    assert len(set(read_index(dropped)["sha256"])) == 10
    assert read_index(dropped, removed=True).equals(read_index(kept))
    (twice,) = read_parquet(dropped.read("duplicates.parquet")).iter_rows(named=True)
    assert twice["dropped"] and twice["duplicate_of"] in set(read_index(dropped)["key"])
    (folder / dict(read_index(kept).select("key", "path").iter_rows())[twice["duplicate_of"]]).unlink()
    again = pack(folder, tmp_path / "store", drop=True)
    assert set(read_index(again)["key"]) == set(read_index(kept)["key"]) - {twice["duplicate_of"]}


def test_the_overlap_of_two_splits_is_told(folder: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    test.mkdir()
    (folder / "again.png").write_bytes(picture(3))
    for number in (3, 50):
        (test / f"t{number}.png").write_bytes(picture(number))
    train, unseen = pack(folder, tmp_path / "train_store"), pack(test, tmp_path / "test_store")
    found = overlap(train, unseen)
    assert found.select("path").rows() == [("t3.png",)]
    assert found["train_path"][0] in ("again.png", "deep/3.png") and found["train_key"][0] in set(
        read_index(train)["key"]
    )
    assert overlap(unseen, unseen).select("key", "train_key").rows() == [
        (key, key) for key in read_index(unseen)["key"]
    ]


def test_what_is_packed_twice_is_packed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died after some shards takes them up without reading an image."""
    whole = pack(folder, tmp_path / "whole")
    plain, made = ArtifactWriter.put, []

    def dying(self: ArtifactWriter, name: str, *args: object, **more: int) -> object:
        if name == "shard-00002":
            raise KeyboardInterrupt
        made.append(name)
        return plain(self, name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ArtifactWriter, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "store")
    assert made == ["shard-00000", "shard-00001"]
    monkeypatch.setattr(ArtifactWriter, "put", plain)
    loaded: list[str] = []
    read = Source.read_all
    monkeypatch.setattr(Source, "read_all", lambda self, some, limits: loaded.extend(some) or read(self, some, limits))
    assert pack(folder, tmp_path / "store").ref == whole.ref
    assert len(loaded) == 2
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_a_shard_is_closed_before_it_grows_too_large(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(path.stat().st_size for path in folder.rglob("*.png"))
    monkeypatch.setattr(shards, "SHARD_BYTES", 3 * size)
    artifact = pack(folder, tmp_path / "store", per_shard=100)
    sizes = read_index(artifact).group_by("shard").agg(pl.col("bytes").sum(), pl.len())
    assert sizes["bytes"].max() <= 3 * size and sizes["len"].max() == 3


def big_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a picture too large to decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


HOSTILE = {
    "zero.png": (b"", "empty"),
    "text.jpg": (b"this is not a picture", "not_an_image"),
    "cut.png": (picture(1, (64, 64))[:-200], "corrupt"),
    "cut.jpg": (picture(1, (64, 64), kind="JPEG")[:300], "corrupt"),
    "bomb.png": (big_png(30_000, 30_000), "too_large"),
    "line.png": (picture(1, (600, 2)), "too_narrow"),
    "pdf.png": (b"%PDF-1.4\n", "not_an_image"),
}


def test_what_cannot_be_used_is_quarantined_with_its_bytes(folder: Path, tmp_path: Path) -> None:
    for name, (data, _) in HOSTILE.items():
        (folder / name).write_bytes(data)
    artifact = pack(folder, tmp_path / "store")
    rows = {row["path"]: row for row in read_quarantine(artifact).iter_rows(named=True)}
    assert {path: row["reason"] for path, row in rows.items()} == {
        name: reason for name, (_, reason) in HOSTILE.items()
    }
    assert all(rows[name]["bytes"] == data for name, (data, _) in HOSTILE.items())
    assert artifact.counts == {
        "images": 10, "quarantined": len(HOSTILE), "duplicates": 0, "removed": 0, "shards": len(artifact.names(".tar")),
    }  # fmt: skip
    again = pack(folder, tmp_path / "store")
    assert again.ref == artifact.ref


def test_what_was_refused_comes_back_when_the_limits_are_raised(folder: Path, tmp_path: Path) -> None:
    (folder / "large.png").write_bytes(picture(300, (40, 30)))
    (folder / "line.png").write_bytes(picture(301, (600, 2)))
    (folder / "cut.png").write_bytes(HOSTILE["cut.png"][0])
    before = pack(folder, tmp_path / "store", max_pixels=100)
    assert before.counts["quarantined"] == 3
    after = pack(folder, tmp_path / "store", max_pixels=10_000)
    assert sorted(read_index(after)["path"]) == sorted([*read_index(before)["path"], "large.png"])
    assert {row["path"]: row["reason"] for row in read_quarantine(after).iter_rows(named=True)} == {
        "cut.png": "corrupt", "line.png": "too_narrow",
    }  # fmt: skip
    assert (after.counts["quarantined"], after.counts["shards"]) == (2, before.counts["shards"] + 1)
    for name in before.names(".tar"):
        assert after.files[name] == before.files[name]
    assert pack(folder, tmp_path / "store", max_pixels=10_000).ref == after.ref


def test_quarantine_can_be_replayed_without_the_source(folder: Path, tmp_path: Path) -> None:
    (folder / "large.png").write_bytes(picture(300, (40, 30)))
    (folder / "gone.png").write_bytes(picture(301, (40, 30)))
    pack(folder, tmp_path / "store", max_pixels=100)
    (folder / "gone.png").unlink()
    before = pack(folder, tmp_path / "store", max_pixels=100)
    shutil.rmtree(folder)
    store = ArtifactStore(ObjectStore(str(tmp_path / "store")))
    writer = store.writer("d", "shard", 1, {**before.inputs, "max_pixels": 10_000})
    after = writer.finish(retry_quarantined(writer, before, Packing(4, ImageLimits(max_pixels=10_000))))
    assert sorted(read_index(after)["path"]) == sorted([*read_index(before)["path"], "large.png"])
    assert read_quarantine(after).height == 0
    assert after.counts["quarantined"] == 0 and after.counts["removed"] == before.counts["removed"] == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_common_mode_is_accepted(mode: str) -> None:
    kind = {"CMYK": "JPEG", "I;16": "PNG"}.get(mode, "PNG")
    image = Image.new("L", (8, 6), 7).convert("I;16" if mode == "I;16" else mode)
    out = io.BytesIO()
    image.save(out, kind)
    assert inspect(out.getvalue(), ImageLimits()).width == 8


@pytest.mark.parametrize("keep", [3, 100, 300, None])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_damaged_profile_of_colors_costs_no_image(keep: int | None, form: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:keep]
    out = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, form, icc_profile=profile)
    assert open_image(out.getvalue()).info["icc_profile"] == profile
    assert inspect(out.getvalue(), ImageLimits()).width == 8
    assert to_rgb(open_image(out.getvalue())).size == (8, 6)


@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
def test_a_turned_tiff_has_the_size_that_is_shown(compression: str) -> None:
    """Pillow turns this format alone itself, and says so from the start; of others, the size is the stored one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (8, 6)).save(out, "TIFF", exif=exif, compression=compression)
    found = inspect(out.getvalue(), ImageLimits())
    assert (found.width, found.height) == to_rgb(open_image(out.getvalue())).size == (6, 8)


def test_the_extension_follows_the_content() -> None:
    assert inspect(picture(1, kind="JPEG"), ImageLimits()).extension == "jpg"
    with pytest.raises(ImageRejected, match=r"too_large: 8 x 6 pixels, the limit is 10"):
        inspect(picture(1), ImageLimits(max_pixels=10))


def test_an_empty_or_missing_source_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no image \(1 other files: 1 "):
        list(Source([str(tmp_path / "empty")]).scan())
    with pytest.raises(DataError, match="does not exist"):
        list(Source([str(tmp_path / "none")]).scan())


def test_odd_names_survive(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = {
        "späße & <b>.png": "späße & <b>.png",
        "日本.png": "日本.png",
        "\u202etxt.png": r"\u202etxt.png",
        "a b\tc.PNG": r"a b\x09c.PNG",
        r"a b\x09c.PNG": r"a b\\x09c.PNG",
        "\x1b[2J\n.png": r"\x1b[2J\x0a.png",
        'a "quoted" name.png': 'a "quoted" name.png',
        os.fsdecode(b"\xff\xfe.png"): r"\xff\xfe.png",
    }
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    (folder / "._mac.png").write_bytes(b"resource fork")
    artifact = pack(folder, tmp_path / "store")
    index = read_index(artifact)
    with tarfile.open(fileobj=io.BytesIO(artifact.read("shard-00000.tar"))) as tar:
        for row in index.filter(pl.col("shard") == "shard-00000").iter_rows(named=True):
            told = {name: row[name] for name in ("key", "path", "sha256", "width", "height")}
            assert tar.extractfile(f"{row['key']}.json").read() == canonical_json(told)  # type: ignore[union-attr]
    records = {record.path: record.data for record in read_records(artifact, index)}
    assert records == {shown: picture(number) for number, shown in enumerate(names.values())}


def test_only_what_changed_is_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path / "store"))
    source = Source([str(folder)])
    first = contents(store, source)
    read: list[str] = []
    plain = Source.read_all

    def watched(self: Source, entries: Sequence[Entry], limits: ImageLimits) -> list[bytes | ImageRejected]:
        read.extend(entry.path for entry in entries)
        return plain(self, entries, limits)

    monkeypatch.setattr(Source, "read_all", watched)
    (folder / "0.png").touch()
    assert contents(store, source) == first
    assert read == ["0.png"]
    assert contents(store, source) == first
    assert read == ["0.png"]


def contents(store: ObjectStore, source: Source) -> list[tuple[str, ...]]:
    with StatCache(store, "stat").digested(source, ImageLimits()) as images:
        return images.database.execute("SELECT path, sha256, key FROM image").fetchall()


def test_several_sources_keep_their_paths_apart(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes(picture(77))
    source = Source([str(folder), str(other)])
    entries = {entry.path: entry for entry in source.scan()}
    assert len(entries) == 11
    assert source.read(entries["1/0.png"]) == picture(77)
