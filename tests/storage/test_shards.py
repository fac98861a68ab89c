"""Shards: the same bytes for the same images, append-only, and nothing refused is lost."""

import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import DataError
from storage.images import ImageLimits, ImageRejected, inspect
from storage.objects import ObjectStore
from storage.shards import newest, read_index, read_quarantine, read_records, write_shards
from storage.sources import Source, StatCache
from storage.tables import read_parquet


def picture(seed: int, size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def pack(folder: Path, where: Path, per_shard: int = 4, **limits: int) -> Artifact:
    store = ArtifactStore(ObjectStore(str(where)))
    source = Source([str(folder)])
    images = source.digest(source.scan(), StatCache(store.objects, "d/shard/stat"))
    writer = store.writer("d", "shard", 1, {"split": "train", "images": [image.key for image in images]})
    previous = newest(store, "d", "train")
    counts = write_shards(
        writer, source, images, previous, images_per_shard=per_shard, limits=ImageLimits(**limits), threads=2
    )
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
    assert {paths[key] for key in duplicates.row(0)} == {"copy.png", "deep/3.png"}


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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_common_mode_is_accepted(mode: str) -> None:
    kind = {"CMYK": "JPEG", "I;16": "PNG"}.get(mode, "PNG")
    image = Image.new("L", (8, 6), 7).convert("I;16" if mode == "I;16" else mode)
    out = io.BytesIO()
    image.save(out, kind)
    assert inspect(out.getvalue(), ImageLimits()).width == 8


def test_the_extension_follows_the_content() -> None:
    assert inspect(picture(1, kind="JPEG"), ImageLimits()).extension == "jpg"
    with pytest.raises(ImageRejected, match=r"too_large: 8 x 6 pixels, the limit is 10"):
        inspect(picture(1), ImageLimits(max_pixels=10))


def test_an_empty_or_missing_source_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no image \(1 other files\)"):
        Source([str(tmp_path / "empty")]).scan()
    with pytest.raises(DataError, match="does not exist"):
        Source([str(tmp_path / "none")]).scan()


def test_odd_names_survive(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["späße & <b>.png", "\u202etxt.png", "a b\tc.PNG", "日本.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))).write_bytes(picture(50))
    (folder / "._mac.png").write_bytes(b"resource fork")
    artifact = pack(folder, tmp_path / "store")
    assert sorted(read_index(artifact)["path"]) == sorted([*names, "\\xff\\xfe.png"])


def test_only_what_changed_is_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path / "store"))
    source = Source([str(folder)])
    first = source.digest(source.scan(), StatCache(store, "stat"))
    read: list[str] = []
    plain = Source.read
    monkeypatch.setattr(Source, "read", lambda self, entry: read.append(entry.path) or plain(self, entry))
    (folder / "0.png").touch()
    assert source.digest(source.scan(), StatCache(store, "stat")) != []
    assert read == ["0.png"]
    assert [image.key for image in source.digest(source.scan(), StatCache(store, "stat"))] == [
        image.key for image in first
    ]


def test_several_sources_keep_their_paths_apart(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes(picture(77))
    source = Source([str(folder), str(other)])
    entries = {entry.path: entry for entry in source.scan()}
    assert len(entries) == 11
    assert source.read(entries["1/0.png"]) == picture(77)
