"""Other people's readers take what we write, and we take what they write."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from storage.artifacts import Artifact, ArtifactStore
from storage.images import ImageLimits
from storage.listing import StatCache
from storage.objects import ObjectStore
from storage.shards import Packing, read_index, read_records, write_shards
from storage.sources import Source


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


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    images = {f"a/{number}": picture(number, "JPEG") for number in range(5)}
    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars" / "%03d.tar"), maxcount=2, verbose=0) as writer:
        for key, data in images.items():
            writer.write({"__key__": key, "jpg": data, "json": {"n": 1}, "txt": "a text", "cls": 3})
    packed = shard(tmp_path / "tars", tmp_path / "store")
    found = {record.path: record.data for record in read_records(packed, read_index(packed))}
    assert found == {f"{number // 2:03d}.tar/{key}.jpg": data for number, (key, data) in enumerate(images.items())}
