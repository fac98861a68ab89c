"""Sources: what a URL may be, found by what lies there; one image, one stable path."""

import io
import itertools
import json
import os
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from latteflow.storage import roots, sources
from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.columns import ImageColumn
from latteflow.storage.errors import DataError, StorageError
from latteflow.storage.images import HEIC_SUFFIXES, SUFFIXES, ImageInfo, ImageLimits, ImageRejected
from latteflow.storage.inspectors import Inspectors
from latteflow.storage.listing import StatCache, digest_of
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import Packing, read_index, read_quarantine, write_shards
from latteflow.storage.sources import Entry, Source


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_table(path: Path, column: pa.Array, name: str = "image", rows_in_group: int = 3) -> None:
    labels = pa.array(range(len(column)))
    pq.write_table(pa.table({name: column, "label": labels}), path, row_group_size=rows_in_group)


def structs(images: list[bytes | None], paths: list[str | None] | None = None) -> pa.Array:
    names = paths or [f"{number}.png" for number in range(len(images))]
    return pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.array(names)], ["bytes", "path"])


def write_dataset(folder: Path, images: list[bytes], per_batch: int = 2, form: str = "stream") -> None:
    """As `datasets` 2 to 5 saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"label": pa.array(range(len(images))), "image": structs(list(images))})
    open_writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with open_writer(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=per_batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def images(source: Source) -> dict[str, bytes]:
    entries = list(source.scan())
    found = {entry.path: source.read(entry) for entry in entries}
    assert len(found) == len(entries)
    return found


def test_tars_are_read_in_place(tmp_path: Path) -> None:
    for number in range(2):
        members = {f"{number}{each}.png": picture(10 * number + each) for each in range(3)}
        extra = {f"{number}0.txt": b"a text", f"{number}0.json": b"{}", f"{number}0.mask.png": picture(99)}
        write_tar(tmp_path / f"part-{number}.tar", members | extra)
    assert images(Source([str(tmp_path)])) == {
        f"part-{number}.tar/{number}{each}.png": picture(10 * number + each) for number in range(2) for each in range(3)
    }
    one = images(Source([str(tmp_path / "part-1.tar")]))
    assert list(one) == [f"part-1.tar/1{each}.png" for each in range(3)]
    assert images(Source([str(tmp_path / "*-1.tar")])) == one


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_member_names(tmp_path: Path, form: int) -> None:
    long = "folder/" * 20 + "x.png"
    names = [long, "spaces and ü.PNG", "./dotted/a.png", "b.v2.jpeg"]
    write_tar(tmp_path / "a.tar", {name: picture(number) for number, name in enumerate(names)}, form)
    shown = [long, "spaces and ü.PNG", "dotted/a.png", "b.v2.jpeg"]
    assert images(Source([str(tmp_path)])) == {f"a.tar/{name}": picture(n) for n, name in enumerate(shown)}


def test_of_a_sample_only_the_image_is_taken(tmp_path: Path) -> None:
    names = ["d/a.jpg", "d/a.depth.png", "d/b.left.png", "d/b.right.png", "c.png", "c.webp", ".hidden.png", "._c.png"]
    write_tar(tmp_path / "a.tar", {name: picture(number) for number, name in enumerate(names)})
    found = {entry.path.removeprefix("a.tar/") for entry in Source([str(tmp_path)]).scan()}
    assert found == {"d/a.jpg", "d/b.left.png", "d/b.right.png", "c.png", "c.webp"}


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    store, limits = ArtifactStore(ObjectStore(str(tmp_path / "store"))), ImageLimits()
    source = Source([str(tmp_path / "images")])
    with StatCache(store.objects, "stat").digested(source, limits) as listing:
        writer = store.writer("d", "shard", 1, {})
        artifact = writer.finish(write_shards(writer, source, listing, None, Packing(10, limits)))
    assert sorted(images(Source([artifact.address("shard-00000.tar")])).values()) == sorted(map(picture, range(3)))


BINARY = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())]


@pytest.mark.parametrize("kind", BINARY, ids=str)
@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
@pytest.mark.parametrize("is_struct", [False, True])
def test_a_table_of_any_kind_of_bytes(tmp_path: Path, kind: pa.DataType, form: str, is_struct: bool) -> None:
    pictures = [picture(number % 30) for number in range(40)]
    bytes_ = pa.array([None, *pictures[1:]], kind)
    places = pa.array([f"{row}.png" for row in range(40)])
    struct_less = pa.array([row == 1 for row in range(40)])
    column = pa.StructArray.from_arrays([bytes_, places], ["bytes", "path"], mask=struct_less) if is_struct else bytes_
    table = pa.table({"picture": column, "label": pa.array(range(40))})
    if form == "parquet":
        file = tmp_path / "a.parquet"
        # pyarrow 26 cannot write views inside of structs in pieces.
        pq.write_table(table, file, row_group_size=40 if is_struct and kind == pa.binary_view() else 17)
    else:
        file = tmp_path / "a.arrow"
        open_writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        with open_writer(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=17)
    source = Source([str(file)])
    entries = list(source.scan())
    assert [entry.path for entry in entries] == [f"{file.name}/{row:08d}" for row in range(40)]
    without = 2 if is_struct else 1
    for row in (39, *range(without, 40), 20, 19, 38):  # in any order
        assert source.read(entries[row]) == pictures[row]
    for row in range(without):
        with pytest.raises(ImageRejected, match=rf"unreadable: row {row} of .* holds no bytes in 'picture'"):
            source.read(entries[row])


def test_a_table_by_polars(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(4)]
    frame = pl.DataFrame({"label": range(4), "image": pictures})
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ipc(tmp_path / "b.arrow")
    for name in ("a.parquet", "b.arrow"):
        assert list(images(Source([str(tmp_path / name)])).values()) == pictures


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_saved_data_set(tmp_path: Path, form: str) -> None:
    pictures = [picture(number) for number in range(5)]
    write_dataset(tmp_path / "set", pictures, form=form)
    (tmp_path / "set" / "cache-123.arrow").write_bytes((tmp_path / "set" / "data-00000-of-00001.arrow").read_bytes())
    assert images(Source([str(tmp_path / "set")])) == {
        f"data-00000-of-00001.arrow/{row:08d}": data for row, data in enumerate(pictures)
    }


def test_the_image_column_must_be_clear(tmp_path: Path) -> None:
    table = pa.table({"front": structs([picture(1)]), "back": structs([picture(2)]), "thumb": pa.array([picture(3)])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"2 columns .* \(front, back\): name one, for example `shard: {image_column: front"
    ):
        list(Source([str(tmp_path)]).scan())
    for column, number in (("back", 2), ("thumb", 3)):
        assert images(Source([str(tmp_path)], column)) == {"a.parquet/00000000": picture(number)}
    source = Source([str(tmp_path)], "side")
    (entry,) = source.scan()
    with pytest.raises(ImageRejected, match="no column of images 'side'; its columns are front, back, thumb"):
        source.read(entry)


def test_a_path_in_a_table_is_never_followed(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", structs([None, picture(1)], ["/etc/passwd", "x.png"]))
    source = Source([str(tmp_path)])
    first, second = source.scan()
    with pytest.raises(ImageRejected, match=r"unreadable: row 0 of a\.parquet holds no bytes in 'image'"):
        source.read(first)
    assert source.read(second) == picture(1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.tar", "b.parquet"], r"holds 1 .parquet and 1 .tar files: name one sort, as in .*/\*.parquet"),
        (["train-00000.parquet", "test-00000.parquet"], "several splits, for example test-00000.parquet and train-0"),
        (["train/0.tar", "val/0.tar"], "several splits"),
        (["notes.txt"], r"holds no image \(1 other files: 1 .txt\)"),
        (["loose.arrow"], r"holds no image \(1 other files: 1 .arrow\)"),
    ],
)
def test_what_is_unclear_is_said(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        list(Source([str(tmp_path)]).scan())


def test_a_split_can_be_named(tmp_path: Path) -> None:
    for name, number in (("train", 1), ("test", 2)):
        write_table(tmp_path / f"{name}-00000.parquet", structs([picture(number)]))
        write_dataset(tmp_path / "dict" / name, [picture(number)])
    assert images(Source([str(tmp_path / "test-*.parquet")])) == {"test-00000.parquet/00000000": picture(2)}
    assert list(images(Source([str(tmp_path / "dict" / "train")])).values()) == [picture(1)]
    with pytest.raises(DataError, match="several splits"):
        list(Source([str(tmp_path / "dict")]).scan())


@pytest.mark.parametrize(
    ("name", "form"), [("a.avif", "AVIF"), ("a.MPO", "MPO"), ("a.heic", "HEIF"), ("a.hif", "HEIF")]
)
def test_what_cameras_and_phones_write_is_read(tmp_path: Path, name: str, form: str) -> None:
    grey = Image.effect_noise((64, 48), 50).convert("RGB")
    grey.save(tmp_path / name, form, **({"save_all": True, "append_images": [grey]} if form == "MPO" else {}))
    source = Source([str(tmp_path)])
    (entry,) = source.scan()
    with Inspectors(ImageLimits(), 1) as inspect:  # confined: no file, little memory
        (found,) = inspect([source.read(entry)])
    assert isinstance(found, ImageInfo) and (found.width, found.height) == (64, 48)
    assert found.extension == {"AVIF": "avif", "MPO": "jpg", "HEIF": "heic"}[form]


def test_files_that_are_passed_over_are_counted_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "v1.0").mkdir()
    for name in ("a.png", "a.txt", "b.TXT", "c.svg", "v1.0/README", ".hidden.txt"):
        (tmp_path / name).write_bytes(picture(0))
    write_tar(tmp_path / "b.tar", {"b.png": picture(1), "b.json": b"{}", "b.cls": b"1", "c.jxl": b"", "d.svg": b""})
    with caplog.at_level("INFO"):
        assert len(list(Source([str(tmp_path)]).scan())) == 1
        assert len(list(Source([str(tmp_path / "b.tar")]).scan())) == 1
    assert "4 files are no images by name: 2 .txt, 1 .svg, 1 without ending" in caplog.text
    # What belongs to the image of a sample is not counted.
    assert "b.tar: 2 files are no images by name: 1 .jxl, 1 .svg" in caplog.text


def test_without_the_decoder_heic_is_counted_and_the_extra_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "READS_HEIC", False)
    monkeypatch.setattr(sources, "SUFFIXES", SUFFIXES - HEIC_SUFFIXES)
    (tmp_path / "a.HEIC").touch()
    with pytest.raises(DataError, match=r"1 other files: 1 .heic; HEIC is read after pip install 'latteflow\[heic\]'"):
        list(Source([str(tmp_path)]).scan())
    (tmp_path / "a.png").write_bytes(picture(0))
    with caplog.at_level("INFO"):
        list(Source([str(tmp_path)]).scan())
    assert "1 .heic; HEIC is read after pip install 'latteflow[heic]'" in caplog.text


def test_image_files_come_before_containers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    write_tar(tmp_path / "backup.tar", {"a.png": picture(1)})
    assert list(images(Source([str(tmp_path)]))) == ["a.png"]
    assert "1 tars or tables are not" in caplog.text


def test_links_pipes_and_hidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "elsewhere.png").write_bytes(picture(1))
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "round").symlink_to(folder)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(picture(2))
    assert images(Source([str(folder)])) == {"link.png": picture(1)}
    (entry,) = Source([str(folder)]).scan()
    (folder / "link.png").unlink()
    os.mkfifo(folder / "link.png")  # what was a file is a pipe by now
    assert Source([str(folder)]).read(entry) == b""


def test_a_container_is_opened_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", {"a.png": picture(number), "b.png": picture(number + 10)})
    opened: list[str] = []
    plain = Source.members

    def watched(self: Source, container: Entry) -> object:
        opened.append(container.path)
        return plain(self, container)

    monkeypatch.setattr(Source, "members", watched)
    store = ObjectStore(str(tmp_path / "store"))

    def digests() -> dict[str, str]:
        with StatCache(store, "stat").digested(Source([str(folder)]), ImageLimits()) as found:
            return dict(found.database.execute("SELECT path, sha256 FROM image"))

    before = digests()
    assert sorted(opened) == ["0.tar", "1.tar", "2.tar"] and len(before) == 6
    write_tar(folder / "1.tar", {"a.png": picture(1), "c.png": picture(77)})
    opened.clear()
    after = digests()
    assert opened == ["1.tar"]
    assert after.keys() - before.keys() == {"1.tar/c.png"} and before.keys() - after.keys() == {"1.tar/b.png"}
    opened.clear()
    assert digests() == after and opened == []


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_a_listing_of_few_changes_is_the_listing_of_all(tmp_path: Path, kind: str) -> None:
    """Whatever came, went and changed: the same rows and digest as without an earlier look, and no database."""
    dice, folder = random.Random(5), tmp_path / "source"
    folder.mkdir()
    store, source = ObjectStore(str(tmp_path / "store")), Source([str(folder)])

    def write(name: str, number: int) -> None:
        if kind == "files":
            (folder / f"{name}.png").write_bytes(picture(number))
        else:
            write_tar(folder / f"{name}.tar", {f"{name}.png": picture(number), "b.png": picture(number + 1)})

    for number in range(8):
        write(f"{number}", number)
    for round_ in range(12):
        with StatCache(store, "stat").digested(source, ImageLimits()) as now:
            assert ("database" in now.__dict__) == (round_ == 0)
            with StatCache(store, f"fresh {round_}").digested(source, ImageLimits()) as fresh:
                rows, expected = pl.concat(now.rows()), pl.concat(fresh.rows())
                assert rows.drop("size").equals(expected.drop("size"))
                assert (now.digest, len(now)) == (fresh.digest, len(fresh))
                assert now.digest == digest_of(expected.select("path", "sha256").iter_rows())
                query = "SELECT path, sha256, key FROM image ORDER BY path"
                assert now.database.execute(query).fetchall() == fresh.database.execute(query).fetchall()
        for _ in range(dice.randint(0, 3)):
            write(f"{dice.randint(0, 12)}", dice.randint(0, 200))
        there = sorted(folder.iterdir())
        dice.choice(there).unlink() if len(there) > 3 and dice.random() < 0.5 else None


def test_a_broken_container_costs_only_what_is_broken(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write_tar(folder / "cut.tar", {f"{number}.png": picture(number) for number in range(4)})
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: 512 * 5 + 100])  # in the third member
    (folder / "text.tar").write_text("not a tar")
    write_tar(folder / "good.tar", {"a.png": picture(50)})
    store, limits, source = ArtifactStore(ObjectStore(str(tmp_path / "store"))), ImageLimits(), Source([str(folder)])
    with StatCache(store.objects, "stat").digested(source, limits) as listing:
        writer = store.writer("d", "shard", 1, {})
        artifact = writer.finish(write_shards(writer, source, listing, None, Packing(10, limits)))
    assert sorted(read_index(artifact)["path"]) == ["cut.tar/0.png", "cut.tar/1.png", "good.tar/a.png"]
    told = {
        path: f"{reason}: {detail}"
        for path, reason, detail in read_quarantine(artifact).select("path", "reason", "detail").rows()
    }
    assert told["cut.tar"].startswith("unreadable: it ends at byte 2,660 in a member that should end at")
    assert told["cut.tar/2.png"].startswith("corrupt: ")
    assert told["text.tar"] == "unreadable: it ends at byte 9, in the middle of a header"


def test_a_cut_data_set_gives_the_rows_before_the_cut(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(6)]
    write_dataset(tmp_path, pictures)
    file = tmp_path / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    source = Source([str(tmp_path)])
    *rows, broken = source.scan()
    assert [source.read(entry) for entry in rows] == pictures[:4]
    assert broken.path == file.name
    with pytest.raises(ImageRejected, match="unreadable: data-00000"):
        source.read(broken)


def test_any_fsspec_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe_file(f"/pictures/{number}.png", picture(number))
    write_tar(tmp_path / "a.tar", {"a.png": picture(7), "b.png": picture(8)})
    memory.pipe_file("/tars/a.tar", (tmp_path / "a.tar").read_bytes())
    write_table(tmp_path / "a.parquet", structs([picture(9)]))
    memory.pipe_file("/tables/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert images(Source(["memory://pictures"])) == {f"{number}.png": picture(number) for number in range(3)}
    assert images(Source(["memory://tars"])) == {"a.tar/a.png": picture(7), "a.tar/b.png": picture(8)}
    assert images(Source(["memory://tables/*.parquet"])) == {"a.parquet/00000000": picture(9)}


@pytest.mark.parametrize("name", ["1.png", "a.tar", "a.parquet"])
def test_an_unreachable_source_is_not_a_source_of_bad_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", {"a.png": picture(7)})
    write_table(tmp_path / "a.parquet", structs([picture(7)]))
    (tmp_path / "1.png").write_bytes(picture(7))
    memory.pipe_file(f"/flaky/{name}", (tmp_path / name).read_bytes())
    failures = iter([True, True, False])
    plain = MemoryFileSystem.cat_file

    def flaky(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        if next(failures, False):
            raise ConnectionResetError("the connection was reset")
        return bytes(plain(self, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    source = Source([f"memory://flaky/{name}"])
    assert list(images(source).values()) == [picture(7)]
    failures = itertools.repeat(True)
    monkeypatch.setattr(roots, "_PATIENCE", 0.2)
    with pytest.raises(StorageError, match="cannot be reached: ConnectionResetError"):
        images(Source([f"memory://flaky/{name}"]))


def test_members_of_a_tar_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": picture(number) for number in range(20)})
    source = Source([str(tmp_path)])
    entries = list(source.scan())
    reads: list[tuple[int, int]] = []
    plain = source._roots[0].read_range
    monkeypatch.setattr(source._roots[0], "read_range", lambda *args: reads.append(args[1:]) or plain(*args))
    assert source.read_all(entries[::-1], ImageLimits()) == [picture(number) for number in reversed(range(20))]
    assert len(reads) == 1


def test_a_table_is_decoded_once_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [picture(number) for number in range(200)]
    write_table(tmp_path / "a.parquet", structs(list(pictures)), rows_in_group=200)
    column = ImageColumn(lambda: (tmp_path / "a.parquet").open("rb"), is_parquet=True, column=None, what="a")
    starts: list[int] = []
    plain = column._from
    monkeypatch.setattr(column, "_from", lambda row: starts.append(row) or plain(row))
    assert [column.read(row) for row in range(200)] == pictures
    assert starts == [0]
    assert sum(len(values) for values in column._recent.values()) <= 64


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(2000))
    write_table(tmp_path / "b.parquet", structs([bytes(2000)]))
    for url in (tmp_path / "a.png", tmp_path / "b.parquet"):
        source = Source([str(url)])
        (entry,) = source.scan()
        with pytest.raises(ImageRejected, match="too_large: 2,000 bytes, the limit is 1,000"):
            source.read(entry, ImageLimits(max_bytes=1000))
