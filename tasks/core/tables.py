"""Small tables that users bring: a value for each image path (labels, sidecar texts)."""

from __future__ import annotations

import io
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from pathlib import PurePosixPath

import fsspec
import polars as pl

from latteflow.storage.drivers import sort, told
from latteflow.storage.errors import DataError
from latteflow.storage.fingerprint import canonical_json, sha256

SEPARATORS = ",;\t"


def read_by_path(url: str, column: str, sources: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The value of each image that has one: an empty cell, quoted or not, or an empty text is none.

    Args:
        url: a CSV (commas, semicolons or tabs) or Parquet file with the columns ``path`` and ``column``, paths relative
            to the file's folder or to the source; or a folder with ``a/b.txt`` for the image ``a/b.png``.
        column: name of the value column.
        sources: where the images are; with several, an image's path begins with the number of its source.
        paths: of the images, as the shard index has them.

    Raises:
        DataError: the file is missing or unreadable, a column is missing, or not one path fits.
    """
    try:
        fs, root = fsspec.url_to_fs(url)
        if fs.isdir(root):
            found = {
                path[len(root) :].lstrip("/"): fs.cat_file(path).decode("utf-8", "replace")
                for path in fs.find(root)
                if path.endswith(".txt")
            }
            texts = {path: found.get(str(PurePosixPath(path).with_suffix(".txt")), "") for path in paths}
            values = {path: text for path, text in texts.items() if text.strip()}
            example = next(iter(found), "(no .txt file)")
        else:
            table = _read(fs.cat_file(root), root, url, column)
            below = {_below(f"{root.rsplit('/', 1)[0]}/{path}", sources): value for path, value in table.items()}
            values = {path: value for path in paths if (value := below.get(path, table.get(path))) is not None}
            example = next(iter(table), "(no row)")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{column} file {url!r} cannot be read: {error}") from error
    except Exception as error:
        if sort(error) is None:
            raise
        raise DataError(f"{column} file {url!r} cannot be read: {told(error)}") from error
    if not values:
        raise DataError(
            f"{url!r} has no {column} for any of the {len(paths)} images: its paths look like {example!r}, the images' "
            f"like {next(iter(paths), '')!r}; paths are relative to the file's folder or to the source"
        )
    return values


def digest_of_table(url: str) -> str:
    """Digest of the file's bytes, or of all texts of the folder.

    Raises:
        DataError: it cannot be read.
    """
    try:
        fs, root = fsspec.url_to_fs(url)
        texts = sorted(path for path in fs.find(root) if path == root or path.endswith(".txt"))
        if not texts:
            if not fs.exists(root):
                raise DataError(f"{url!r} does not exist")
            raise DataError(f"folder {url!r} holds no .txt file")
        return sha256(canonical_json([[path[len(root) :], sha256(fs.cat_file(path))] for path in texts]))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url!r} cannot be read: {error}") from error
    except Exception as error:
        if sort(error) is None:
            raise
        raise DataError(f"{url!r} cannot be read: {told(error)}") from error


def _read(data: bytes, name: str, url: str, column: str) -> dict[str, str]:
    try:
        frame = pl.read_parquet(io.BytesIO(data)) if name.endswith(".parquet") else _csv(data, column)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{column} file {url!r} is not a table: {str(error).splitlines()[0]}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{column} file {url!r} is not UTF-8 ({error.reason}): save it as CSV in UTF-8") from error
    missing = [name for name in ("path", column) if name not in frame.columns]
    if missing:
        raise DataError(f"{url!r} has no column {missing[0]!r}; its columns are {', '.join(frame.columns)}")
    cells = pl.col("path", column).cast(pl.String)
    return dict(frame.select(cells).filter(pl.all_horizontal(pl.all().str.strip_chars() != "")).iter_rows())


def _csv(data: bytes, column: str) -> pl.DataFrame:
    """As spreadsheets write it: in UTF-8 or, with tabs, UTF-16; with the separator of their country."""
    text = data.decode("utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    if text.startswith("sep="):  # a line for Excel
        text = text.partition("\n")[2]
    header = text.partition("\n")[0]
    fits = [each for each in SEPARATORS if {"path", column} <= {name.strip('"\r') for name in header.split(each)}]
    return pl.read_csv(text.encode(), separator=fits[0] if fits else SEPARATORS[0], infer_schema=False)


def _below(location: str, sources: Sequence[str]) -> str:
    """A location as the shard index writes it: relative to its source."""
    parts: list[str] = []
    for part in location.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    whole = "/".join(parts)
    for number, source in enumerate(sources):
        root = fsspec.url_to_fs(source)[1].rstrip("/") + "/"
        if whole.startswith(root):
            return f"{number}/{whole[len(root) :]}" if len(sources) > 1 else whole[len(root) :]
    return whole
