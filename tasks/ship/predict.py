"""predict: an exported model and any images -> a table with a row for each, and a list of those that have none."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from latteflow.storage.errors import DataError
from latteflow.storage.fingerprint import sha256
from latteflow.storage.images import ImageLimits, ImageRejected
from latteflow.storage.inspectors import SECONDS
from latteflow.storage.listing import REMOTE_THREADS, ahead, chunks, key_of
from latteflow.storage.names import printable, raw
from latteflow.storage.objects import ObjectStore
from latteflow.storage.sources import Entry, Source
from latteflow.storage.tables import parquet
from latteflow.tasks.ship.pictures import Pictures

if TYPE_CHECKING:
    import torch

    from latteflow.models.ship.predictor import Answers, Predictor

log = logging.getLogger("latteflow.tasks")
_PROCESSORS = os.cpu_count() or 1
_PIECE = 32
"""Images that a thread decodes at a time: pixels are larger than files."""


@dataclass(frozen=True)
class Predicted:
    """What became of the images.

    Attributes:
        unknown: how many seem to be of none of the classes; None where the model cannot tell.
        quarantine: where those without a prediction are listed, if there are any.
    """

    images: int
    unknown: int | None
    quarantined: int
    out: str
    quarantine: str | None


@dataclass(frozen=True)
class Classified:
    """What a model says of images.

    Attributes:
        table: a row for each, see :func:`predict`.
        quarantine: path, reason and detail of each that has none.
        unknown: how many seem to be of none of the classes; None where the model cannot tell.
    """

    table: pl.DataFrame
    quarantine: list[dict[str, str]]
    unknown: int | None


class Decoder:
    """Bytes to pixels, by the rules of ingest: a decoder that crashes, hangs or eats memory costs one image.

    Safe to call from several threads.

    Args:
        limits: images beyond these are refused before they are decoded.
        seconds: processor time for a batch of images.
    """

    def __init__(self, predictor: Predictor, limits: ImageLimits, seconds: float = SECONDS) -> None:
        self._pixels = predictor.clip.preprocess
        self._pictures = Pictures(predictor.reading, limits, _PROCESSORS, seconds)

    def __call__(self, batch: Sequence[bytes]) -> list[torch.Tensor | ImageRejected]:
        """Pixels of each image, or why there are none, in order."""
        return self._pictures(batch, lambda _, picture: self._pixels(picture))

    def one(self, data: bytes, most: int) -> tuple[torch.Tensor | ImageRejected, int]:
        """Pixels of an image that has at most so many as it is stored, or why there are none; and how many it has."""
        (found,) = self._pictures([data], lambda info, picture: (self._pixels(picture), info.width * info.height), most)
        return (found, 0) if isinstance(found, ImageRejected) else found

    def __enter__(self) -> Decoder:
        self._pictures.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pictures.__exit__(*error)


def check_out(out: str) -> None:
    """Whether a table can be written under that name.

    Raises:
        DataError: its ending says no format that we write, or there is no such folder.
    """
    if Path(out).suffix not in _FORMATS:
        raise DataError(f"--out {out!r}: the name must end in {', '.join(_FORMATS)}")
    if "://" not in out and not Path(out).parent.is_dir():
        raise DataError(f"--out {out!r}: there is no folder {str(Path(out).parent)!r}; create it first")


def predict(
    folder: Path,
    images: str,
    out: str,
    *,
    top: int = 5,
    batch: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Predicted:
    """Classes of all images of a source, in the order of their paths.

    Columns: path, key (as ingest makes it), class and probability, class_2 and probability_2 and so on, margin (best
    minus second probability), entropy (in nats), score (:class:`models.ship.predictor.Answers`), unknown
    (empty where the model cannot tell). Names are as they are, but in CSV as :func:`harmless` writes them. Images that
    cannot be used are listed in ``<out>.quarantine.jsonl``: path, reason, detail. Either file appears whole or not
    at all.

    Args:
        folder: of an exported model.
        images: a folder, a file, a pattern, tars, tables: see docs/sources.md.
        out: local path or URL, ending in .parquet, .csv or .jsonl.
        top: classes for each image.
        batch: images in one forward pass.
        on_progress: called with the images that are done, and all.

    Raises:
        ModelError: the folder is not a sound model.
        DataError: there is no image, none can be used, or the name of the table is wrong.
    """
    check_out(out)
    from latteflow.models.ship.predictor import Predictor

    found = classify(lambda: Predictor.load(folder), images, top=top, batch=batch, on_progress=on_progress)
    table, quarantine = found.table, found.quarantine
    place, name = os.path.split(out)
    files = ObjectStore(place or ".", single_writer=True)
    beside = f"{name}.quarantine.jsonl"
    if quarantine:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in quarantine)
        files.put(beside, lines.encode())
    else:
        files.delete(beside)  # of an earlier time
    files.put(name, _FORMATS[Path(name).suffix](table))
    listed = files.address(beside) if quarantine else None
    log.info("predict done images=%d quarantined=%d unknown=%s", table.height, len(quarantine), found.unknown)
    if not table.height:
        raise DataError(f"none of the {len(quarantine)} images of {images} can be used; {listed} says why")
    return Predicted(table.height, found.unknown, len(quarantine), out, listed)


def classify(
    load: Callable[[], Predictor],
    images: str,
    *,
    top: int = 5,
    batch: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Classified:
    """Classes of all images of a source; see :func:`predict`.

    Args:
        load: the model; called when there are images.

    Raises:
        DataError: there is no image.
    """
    source = Source([images])
    entries = sorted(source.scan(), key=lambda entry: (entry.container, entry.place, entry.path))
    if not entries:
        raise DataError(f"source {images!r} holds no image")
    predictor = load()
    quarantine: list[dict[str, str]] = []
    done: list[tuple[list[str], list[str], Answers]] = []
    seen = 0
    rows = _decoded(source, predictor, entries)
    while some := list(islice(rows, batch)):
        good = []
        for entry, key, pixels in some:
            if isinstance(pixels, ImageRejected):
                quarantine.append({"path": entry.path, "reason": pixels.reason.value, "detail": pixels.detail})
            else:
                good.append((entry.path, key, pixels))
        if good:
            done.append(_answered(predictor, good, top))
        seen += len(some)
        on_progress(seen, len(entries))
    table = _table(done, predictor.classes, top)
    unknown = None if predictor.head.unknown_below is None else int(table["unknown"].sum())
    return Classified(table, quarantine, unknown)


def _decoded(
    source: Source, predictor: Predictor, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, str, torch.Tensor | ImageRejected]]:
    """Entry, key, and pixels or why there are none, in order, decoded ahead."""
    limits = ImageLimits()
    threads = _PROCESSORS + 1 if source.is_local else REMOTE_THREADS
    pieces = (chunk[start : start + _PIECE] for chunk in chunks(entries) for start in range(0, len(chunk), _PIECE))

    def work(piece: list[Entry]) -> list[tuple[Entry, str, torch.Tensor | ImageRejected]]:
        read = source.read_all(piece, limits)
        found = iter(decode([data for data in read if isinstance(data, bytes)]))
        return [
            (entry, key_of(entry.path, sha256(data)), next(found)) if isinstance(data, bytes) else (entry, "", data)
            for entry, data in zip(piece, read, strict=True)
        ]

    with Decoder(predictor, limits) as decode, ThreadPoolExecutor(threads) as pool:
        yield from chain.from_iterable(ahead(pool, work, pieces, threads + 1))


def _answered(
    predictor: Predictor, good: Sequence[tuple[str, str, torch.Tensor]], top: int
) -> tuple[list[str], list[str], Answers]:
    import torch

    paths, keys, pixels = zip(*good, strict=True)
    return list(paths), list(keys), predictor.answers(torch.stack(pixels), top)


def _table(done: Sequence[tuple[list[str], list[str], Answers]], classes: Sequence[str], top: int) -> pl.DataFrame:
    names = pl.Series(classes, dtype=pl.Enum(classes))

    def joined(name: str, shape: tuple[int, ...] = (0,)) -> np.ndarray:
        return np.concatenate([np.zeros(shape), *(getattr(answers, name) for _, _, answers in done)])

    top = min(top, len(classes))
    ranked, probabilities = joined("ranked", (0, top)).astype(np.int64), joined("probabilities", (0, top))
    columns: dict[str, pl.Series] = {
        "path": pl.Series([path for paths, _, _ in done for path in paths], dtype=pl.String),
        "key": pl.Series([key for _, keys, _ in done for key in keys], dtype=pl.String),
    }
    for place in range(top):
        suffix = f"_{place + 1}" if place else ""
        columns[f"class{suffix}"] = names.gather(ranked[:, place])
        columns[f"probability{suffix}"] = pl.Series(probabilities[:, place], dtype=pl.Float32)
    for name in ("margin", "entropy", "score"):
        columns[name] = pl.Series(joined(name), dtype=pl.Float32)
    marks = [answers.unknown for _, _, answers in done]
    columns["unknown"] = pl.Series(
        [None if mark is None else bool(mark[row]) for mark, (paths, _, _) in zip(marks, done, strict=True)
         for row in range(len(paths))],
        dtype=pl.Boolean,
    )  # fmt: skip
    return pl.DataFrame(columns)


def harmless(name: str) -> str:
    """A name for CSV: no control character of it reaches a terminal, and no spreadsheet takes it for a formula.

    Odd characters are escaped as in paths, and one that begins like a formula gets an apostrophe before it, as
    spreadsheets have it for text.
    """
    shown = printable(name)
    return f"'{shown}" if shown.lstrip()[:1] in tuple("=+-@") else shown


def _csv(table: pl.DataFrame) -> bytes:
    def column(values: pl.Series) -> pl.Series:
        if values.dtype not in (pl.String, pl.Enum):
            return values
        # Paths are printable already; to escape their backslashes again would make other names of them.
        text = values.cast(pl.String).to_list()
        return pl.Series(values.name, [harmless(raw(each) if values.name == "path" else each) for each in text])

    return pl.DataFrame([column(values) for values in table]).write_csv().encode()


def _jsonl(table: pl.DataFrame) -> bytes:
    out = io.BytesIO()
    table.write_ndjson(out)
    return out.getvalue()


_FORMATS: dict[str, Callable[[pl.DataFrame], bytes]] = {".parquet": parquet, ".csv": _csv, ".jsonl": _jsonl}
