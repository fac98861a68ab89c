"""Small tables that users bring: a value for each image path (labels, sidecar texts)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePosixPath

import fsspec
import polars as pl

from storage.drivers import sort, told
from storage.errors import DataError
from storage.fingerprint import canonical_json, sha256


def read_by_path(url: str, column: str, sources: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The value of each image that has one.

    Args:
        url: a CSV or Parquet file with the columns ``path`` and ``column``, paths relative to the file's folder or to
            the source; or a folder with ``a/b.txt`` for the image ``a/b.png``.
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
            values = {
                path: found[text] for path in paths if (text := str(PurePosixPath(path).with_suffix(".txt"))) in found
            }
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
        if name.endswith(".parquet"):
            frame = pl.read_parquet(io.BytesIO(data))
        else:
            frame = pl.read_csv(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")), infer_schema=False, null_values=None)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{column} file {url!r} is not a table: {error}") from error
    missing = [name for name in ("path", column) if name not in frame.columns]
    if missing:
        raise DataError(f"{url!r} has no column {missing[0]!r}; its columns are {', '.join(frame.columns)}")
    rows = frame.select(pl.col("path", column).cast(pl.String)).drop_nulls()
    return dict(rows.iter_rows())


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
