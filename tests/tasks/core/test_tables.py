"""Tables that users bring, as spreadsheets and other programs write them."""

from pathlib import Path

import polars as pl
import pytest

from latteflow.storage.errors import DataError
from latteflow.tasks.core.tables import read_by_path

PATHS = ["a.png", "b/ä.png", "c.png", "d.png"]
EXPECTED = {"a.png": "red", "b/ä.png": "dark; blue, or so"}


def read(file: Path) -> dict[str, str]:
    return read_by_path(str(file), "class", [str(file.parent)], PATHS)


@pytest.mark.parametrize(
    "text",
    [
        'path,class\na.png,red\nb/ä.png,"dark; blue, or so"\nc.png,\nd.png,""\n',
        'path,class,\r\na.png,red,\r\nb/ä.png,"dark; blue, or so",\r\nc.png,   ,\r\n,,\r\n,,\r\n',
        'path;class\r\na.png;red\r\nb/ä.png;"dark; blue, or so"\r\nc.png;\r\n;\r\n',
        'sep=;\r\n"path";"class"\r\n"a.png";"red"\r\n"b/ä.png";"dark; blue, or so"\r\n"";"red"\r\n',
        'class\tpath\tnote, of mine\nred\ta.png\tx\n"dark; blue, or so"\tb/ä.png\t\n',
        'n;note, with a comma;path;class\n1;;a.png;red\n2;x, y;b/ä.png;"dark; blue, or so"\n3;;c.png;""\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_as_spreadsheets_write_it(tmp_path: Path, text: str, encoding: str) -> None:
    file = tmp_path / "labels.csv"
    file.write_bytes(text.encode(encoding))
    assert read(file) == EXPECTED


def test_parquet_with_null_and_empty_cells(tmp_path: Path) -> None:
    rows = {"path": [*PATHS, None, ""], "class": [*EXPECTED.values(), None, " ", "red", "red"]}
    for kind in (pl.String, pl.Categorical):
        pl.DataFrame(rows, schema={"path": pl.String, "class": kind}).write_parquet(tmp_path / "labels.parquet")
        assert read(tmp_path / "labels.parquet") == EXPECTED


def test_an_empty_text_beside_an_image_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red\n")
    (tmp_path / "c.txt").write_text("\n")
    assert read(tmp_path) == {"a.png": "red\n"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("path,class\nb/ä.png,red\n".encode("cp1252"), r"labels.csv' is not UTF-8 \(.*\): save it as CSV in UTF-8$"),
        (b"path,class\na.png,red,blue\n", r"labels.csv' is not a table: found more fields than defined in 'Schema'$"),
        (b"", r"labels.csv' is not a table: empty CSV$"),
        (b"Path;class\na.png;red\n", r"has no column 'path'; its columns are Path;class$"),
        (b'path,class\na.png,""\n', r"has no class for any of the 4 images: its paths look like '\(no row\)'"),
    ],
)
def test_what_is_no_table_is_said_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "labels.csv")
