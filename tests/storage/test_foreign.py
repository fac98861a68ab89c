"""Other people's readers take what we write, and we take what they write."""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import webdataset
from PIL import Image

from latteflow.storage.artifacts import Artifact, ArtifactStore
from latteflow.storage.errors import DataError
from latteflow.storage.images import ImageLimits
from latteflow.storage.listing import StatCache
from latteflow.storage.objects import ObjectStore
from latteflow.storage.shards import Packing, read_index, read_quarantine, read_records, write_shards
from latteflow.storage.sources import Source
from latteflow.storage.tables import parquet


def picture(seed: int, form: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def shard(folder: Path, where: Path) -> Artifact:
    store, limits, source = ArtifactStore(ObjectStore(str(where))), ImageLimits(), Source([str(folder)])
    with StatCache(store.objects, "d/shard/stat").digested(source, limits) as images:
        writer = store.writer("d", "shard", 1, {"split": "train"})
        return writer.finish(write_shards(writer, source, images, None, Packing(4, limits)))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"größe {number}.png").write_bytes(picture(number, "PNG"))
    return shard(folder, tmp_path / "store")


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Hugging Face `datasets`, which must not look for a network or a home."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return pytest.importorskip("datasets")


def told(artifact: Artifact) -> dict[str, dict[str, object]]:
    rows = read_index(artifact).select("key", "path", "sha256", "width", "height").iter_rows(named=True)
    return {str(row["key"]): row for row in rows}


def test_webdataset_reads_our_shards(artifact: Artifact) -> None:
    urls = [artifact.address(name) for name in artifact.names(".tar")]
    seen = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert {key: json.loads(sample["json"]) for key, sample in seen.items()} == told(artifact)
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("pil")))
    assert decoded["png"].size == (8, 6)


def test_datasets_read_our_shards(artifact: Artifact, datasets: object, tmp_path: Path) -> None:
    urls = [artifact.address(name) for name in artifact.names(".tar")]
    found = datasets.load_dataset(  # type: ignore[attr-defined]
        "webdataset", data_files={"train": urls}, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {row["__key__"]: row["json"] for row in found} == told(artifact)
    assert {row["png"].size for row in found} == {(8, 6)}


def test_duckdb_and_pandas_read_our_index(artifact: Artifact) -> None:
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    urls = [artifact.address(name) for name in artifact.names(".index.parquet")]
    rows = duckdb.sql(f"SELECT key, sha256 FROM read_parquet({urls}) ORDER BY key").fetchall()
    frames = pandas.concat([pandas.read_parquet(url) for url in urls])
    assert rows == sorted((key, row["sha256"]) for key, row in told(artifact).items())
    assert sorted(zip(frames["key"], frames["sha256"], strict=True)) == rows


def test_webdataset_reads_a_shard_of_mixed_formats(tmp_path: Path) -> None:
    """`datasets` loses the one that comes late, as docs/formats.md says."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        form = "PNG" if number == 3 else "JPEG"
        (tmp_path / "images" / f"{number}.{form.lower()}").write_bytes(picture(number, form))
    store = ArtifactStore(ObjectStore(str(tmp_path / "store")))
    source, limits = Source([str(tmp_path / "images")]), ImageLimits()
    with StatCache(store.objects, "stat").digested(source, limits) as images:
        writer = store.writer("d", "shard", 1, {"split": "train"})
        made = writer.finish(write_shards(writer, source, images, None, Packing(100, limits)))
    samples = list(webdataset.WebDataset([made.address("shard-00000.tar")], shardshuffle=False))
    assert sorted(("jpg" in each, "png" in each) for each in samples) == [(False, True)] + [(True, False)] * 7


def test_duckdb_compares_features_that_are_cast(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    features = pl.Series([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]], dtype=pl.Array(pl.Float32, 3))
    (tmp_path / "f.parquet").write_bytes(parquet(pl.DataFrame({"key": ["a", "b"], "feature": features})))
    query = f"SELECT array_cosine_similarity(feature::FLOAT[3], [0, 1, 0]::FLOAT[3]) FROM '{tmp_path}/f.parquet'"
    assert [each for (each,) in duckdb.sql(query).fetchall()] == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("form", ["save_to_disk", "to_parquet"])
def test_we_read_what_datasets_save(form: str, datasets: object, tmp_path: Path) -> None:
    images = [picture(number, "JPEG") for number in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})  # type: ignore[attr-defined]
    rows = [{"image": {"bytes": data, "path": None}, "label": number} for number, data in enumerate(images)]
    made = datasets.Dataset.from_list(rows, features=features)  # type: ignore[attr-defined]
    if form == "save_to_disk":
        made.save_to_disk(tmp_path / "saved", num_shards=2)
    else:
        (tmp_path / "saved").mkdir()
        made.to_parquet(tmp_path / "saved" / "train-00000-of-00001.parquet")
    packed = shard(tmp_path / "saved", tmp_path / "store")
    found = {record.path: record.data for record in read_records(packed, read_index(packed))}
    assert [found[path] for path in sorted(found)] == images


@pytest.mark.parametrize("form", ["save_to_disk", "to_parquet"])
def test_a_row_of_datasets_without_bytes_costs_that_row(form: str, datasets: object, tmp_path: Path) -> None:
    """Null, and the path of a file, whose bytes `save_to_disk` takes along and `to_parquet` does not."""
    (tmp_path / "beside.png").write_bytes(picture(1, "PNG"))
    features = datasets.Features({"image": datasets.Image()})  # type: ignore[attr-defined]
    rows = [{"image": {"bytes": picture(0, "JPEG"), "path": None}}, {"image": None}]
    rows.append({"image": {"bytes": None, "path": str(tmp_path / "beside.png")}})
    made = datasets.Dataset.from_list(rows, features=features)  # type: ignore[attr-defined]
    if form == "save_to_disk":
        made.save_to_disk(tmp_path / "saved")
    else:
        (tmp_path / "saved").mkdir()
        made.to_parquet(tmp_path / "saved" / "train.parquet")
    packed = shard(tmp_path / "saved", tmp_path / "store")
    found = {record.path[-1]: record.data for record in read_records(packed, read_index(packed))}
    refused = {path[-1]: (reason, detail) for _, path, _, reason, detail, _ in read_quarantine(packed).iter_rows()}
    embedded = {"2": picture(1, "PNG")} if form == "save_to_disk" else {}
    assert found == {"0": picture(0, "JPEG"), **embedded}
    assert refused.keys() == {"1", "2"} - embedded.keys()
    assert all("holds no bytes in 'image'; a path alone" in detail for _, detail in refused.values())


def write_img2dataset(folder: Path, images: Mapping[int, bytes], failed: int, output: str) -> None:
    """As img2dataset 1.47 writes: keys are numbers with gaps where a download failed, and a table has all of them."""
    folder.mkdir()
    rows = []
    with webdataset.TarWriter(str(folder / "00000.tar")) as tar:
        for number in sorted([*images, failed]):
            data, key = images.get(number), f"{number:09d}"
            about = {"key": key, "url": f"http://a.example/{number}.jpg", "caption": f"picture {number}", "width": 8}
            about |= {"status": "success" if data else "failed_to_download", "error_message": None if data else "404"}
            rows.append({**about, **({"jpg": data} if output == "parquet" else {})})
            if data:
                tar.write({"__key__": key, "jpg": data, "txt": about["caption"], "json": json.dumps(about, indent=4)})
    pl.DataFrame(rows).write_parquet(folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": len(rows), "failed_to_download": 1}))
    if output == "parquet":
        (folder / "00000.tar").unlink()


def test_we_read_what_img2dataset_writes(tmp_path: Path) -> None:
    images = {number: picture(number, "JPEG") for number in (0, 3, 4, 10)}
    write_img2dataset(tmp_path / "tars", images, 7, "webdataset")
    packed = shard(tmp_path / "tars", tmp_path / "store")
    found = {record.path: record.data for record in read_records(packed, read_index(packed))}
    assert found == {f"00000.tar/{number:09d}.jpg": data for number, data in images.items()}
    assert read_quarantine(packed).height == 0
    write_img2dataset(tmp_path / "tables", images, 7, "parquet")
    packed = shard(tmp_path / "tables", tmp_path / "other")
    assert [record.data for record in read_records(packed, read_index(packed).sort("path"))] == list(images.values())
    assert read_quarantine(packed)["path"].to_list() == ["00000.parquet/00000003"]


def test_addresses_of_images_are_refused_before_any_work(tmp_path: Path) -> None:
    """As LAION and DataComp publish their data."""
    frame = pl.DataFrame({"SAMPLE_ID": [1], "URL": ["http://a.example/1.jpg"], "TEXT": ["a text"]})
    for name in ("URL", "image_url"):
        frame.rename({"URL": name}).write_parquet(tmp_path / "part.parquet")
        with pytest.raises(DataError, match=rf"^part.parquet has addresses of images \({name}\) and no images: .*$"):
            next(Source([str(tmp_path)]).scan())


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    images = {f"a/{number}": picture(number, "JPEG") for number in range(5)}
    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for key, data in images.items():
            writer.write({"__key__": key, "jpg": data, "json": {"n": 1}, "txt": "a text", "cls": 3})
    packed = shard(tmp_path / "tars", tmp_path / "store")
    found = {record.path: record.data for record in read_records(packed, read_index(packed))}
    assert found == {f"{number // 2:03d}.tar/{key}.jpg": data for number, (key, data) in enumerate(images.items())}
