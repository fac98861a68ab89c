"""Predictions for any source: one row for each sound image, a line for each of the others, in the same order always."""

import functools
import http.server
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from conftest import draw, draw_folder
from latteflow.models.errors import ModelError
from latteflow.models.ship.predictor import Predictor
from latteflow.storage.errors import DataError
from latteflow.tasks.ship.predict import predict


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five sound pictures and four that are not."""
    folder = tmp_path / "images"
    draw_folder(folder, 5)
    (folder / "deep").mkdir()
    (folder / "002.png").rename(folder / "deep" / "two\u202e.PNG")
    (folder / "a-text.jpg").write_text("no picture")
    (folder / "b-empty.png").write_bytes(b"")
    (folder / "c-cut.png").write_bytes((folder / "000.png").read_bytes()[:-30])
    Image.new("1", (20_000, 20_000)).save(folder / "d-bomb.png")
    return folder


def quarantine(out: Path) -> dict[str, str]:
    lines = out.with_name(out.name + ".quarantine.jsonl").read_text().splitlines()
    return {record["path"]: record["reason"] for record in map(json.loads, lines)}


def test_every_sound_image_has_a_row_and_the_others_a_reason(exported: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "predictions.parquet"
    out.parent.mkdir()
    steps: list[tuple[int, int]] = []
    found = predict(exported, str(images), str(out), batch=2, on_progress=lambda *step: steps.append(step))
    assert (found.images, found.quarantined) == (5, 4) and steps[-1] == (9, 9)
    table = pl.read_parquet(out)
    assert table["path"].to_list() == ["000.png", "001.png", "003.png", "004.png", r"deep/two\u202e.PNG"]
    assert quarantine(out) == {
        "a-text.jpg": "not_an_image", "b-empty.png": "empty", "c-cut.png": "corrupt", "d-bomb.png": "too_large",
    }  # fmt: skip
    assert table.columns == [
        "path", "key", "class", "probability", "class_2", "probability_2", "margin", "entropy", "score", "unknown",
    ]  # fmt: skip
    answers = Predictor.load(exported).predict([draw(3, "red")])
    row = table.row(2, named=True)
    assert row["class"] == ["red", "blue"][answers.labels[0]]
    assert row["probability"] == pytest.approx(answers.probabilities[0, 0], abs=1e-6)
    assert row["unknown"] == answers.unknown[0] and row["score"] == pytest.approx(answers.score[0], abs=1e-6)
    again = tmp_path / "again.parquet"
    predict(exported, str(images), str(again), batch=2)
    assert again.read_bytes() == out.read_bytes()
    assert {path.name for path in out.parent.iterdir()} == {out.name, f"{out.name}.quarantine.jsonl"}


def test_batches_do_not_change_answers_and_an_old_list_goes(exported: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 70)
    (tmp_path / "b.csv.quarantine.jsonl").write_text("old")
    for name, batch in (("a.parquet", 1), ("b.csv", 64), ("c.jsonl", 7)):
        found = predict(exported, str(tmp_path / "images"), str(tmp_path / name), batch=batch, top=1)
        assert found.quarantine is None
    readers = {"a.parquet": pl.read_parquet, "b.csv": pl.read_csv, "c.jsonl": pl.read_ndjson}
    tables = [read(tmp_path / name) for name, read in readers.items()]
    for table in tables:
        assert table.height == 70 and "class_2" not in table.columns
        assert table["class"].cast(pl.String).to_list() == tables[0]["class"].cast(pl.String).to_list()
        np.testing.assert_allclose(table["probability"], tables[0]["probability"], atol=1e-5)
    assert not (tmp_path / "b.csv.quarantine.jsonl").exists()


def test_a_tar_and_a_single_file(exported: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 3)
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for path in sorted((tmp_path / "images").iterdir(), reverse=True):
            tar.add(path, f"sub/{path.name}")
    predict(exported, str(tmp_path / "shard-0.tar"), str(tmp_path / "tar.parquet"))
    packed = pl.read_parquet(tmp_path / "tar.parquet")
    assert packed["path"].to_list() == [f"shard-0.tar/sub/00{n}.png" for n in (2, 1, 0)]  # the tar's own order
    predict(exported, str(tmp_path / "images" / "001.png"), str(tmp_path / "one.parquet"))
    one = pl.read_parquet(tmp_path / "one.parquet")
    assert one["path"].to_list() == ["001.png"]
    assert one.row(0)[2:] == pytest.approx(packed.row(1)[2:])


def test_an_image_of_a_web_server(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    draw_folder(tmp_path / "images", 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "images")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/000.png"
        assert predict(exported, url, str(tmp_path / "p.parquet")).images == 1
        server.shutdown()


def test_what_cannot_be_predicted(exported: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.parquet"
    with pytest.raises(DataError, match=r"the name must end in \.parquet, \.csv, \.jsonl"):
        predict(exported, str(images), str(tmp_path / "p.xlsx"))
    with pytest.raises(DataError, match=r"there is no folder '.*mistyped'; create it first"):
        predict(exported, str(images), str(tmp_path / "mistyped" / "p.csv"))
    assert not (tmp_path / "mistyped").exists()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        predict(exported, str(tmp_path / "nothing"), str(out))
    with pytest.raises(DataError, match="does not exist"):
        predict(exported, str(tmp_path / "nowhere"), str(out))
    with pytest.raises(ModelError, match="there is no such folder"):
        predict(tmp_path / "nowhere", str(images), str(out))
    assert not out.exists()
    with pytest.raises(DataError, match=r"none of the 1 images .* can be used; .*quarantine.jsonl says why"):
        predict(exported, str(images / "a-text.jpg"), str(out))
    assert pl.read_parquet(out).height == 0 and quarantine(out) == {"a-text.jpg": "not_an_image"}


def test_names_of_classes_are_harmless_in_csv_and_exact_elsewhere(exported: Path, tmp_path: Path) -> None:
    names = ['=HYPERLINK("http://example.invalid")', "\x1b[31mred\u202e\n\\"]
    model = shutil.copytree(exported, tmp_path / "model")
    (model / "classes.json").write_text(json.dumps(names))
    draw_folder(tmp_path / "images", 2)
    (tmp_path / "images" / "000.png").rename(tmp_path / "images" / "@a\\\x1b.png")
    for name in ("a.parquet", "b.jsonl", "c.csv"):
        predict(model, str(tmp_path / "images"), str(tmp_path / name))
    exact = pl.read_parquet(tmp_path / "a.parquet")
    assert {*exact["class"], *exact["class_2"]} == set(names)
    assert pl.read_ndjson(tmp_path / "b.jsonl")["class"].to_list() == exact["class"].to_list()
    data = (tmp_path / "c.csv").read_bytes()
    assert b"\x1b" not in data and "\u202e" not in data.decode() and data.count(b"\n") == 3
    shown = pl.read_csv(tmp_path / "c.csv")
    assert {*shown["class"], *shown["class_2"]} == {"'" + names[0], r"\x1b[31mred\u202e\x0a\\"}
    assert sorted(shown["path"]) == ["'@a\\\\\\x1b.png", "001.png"]


def test_a_model_that_cannot_tell_strangers_leaves_the_column_empty(exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(exported, tmp_path / "model")
    settings = json.loads((model / "latteflow.json").read_text())
    (model / "latteflow.json").write_text(json.dumps({**settings, "unknown_below": None}))
    draw_folder(tmp_path / "images", 3)
    assert predict(model, str(tmp_path / "images"), str(tmp_path / "p.csv")).unknown is None
    table = pl.read_csv(tmp_path / "p.csv")
    assert table["unknown"].null_count() == 3 and table["class"].null_count() == 0
