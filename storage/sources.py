"""Where images come from: folders, buckets and data sets, listed and read in place, nothing extracted or executed.

A source is recognised by what lies there: image files, or *containers* of images, which are webdataset tars, Parquet
files and Hugging Face ``datasets`` saved on disk.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from latteflow.storage.errors import ColumnBroken, DataError
from latteflow.storage.images import (
    HEIC_HINT,
    HEIC_SUFFIXES,
    READS_HEIC,
    SUFFIXES,
    ImageLimits,
    ImageRejected,
    RejectReason,
    too_many_bytes,
)
from latteflow.storage.names import member_path, printable, raw
from latteflow.storage.roots import File, Root, is_hidden
from latteflow.storage.tars import TarBroken, members

if TYPE_CHECKING:
    from latteflow.storage.columns import ImageColumn

log = logging.getLogger("latteflow.storage")

_KINDS = {".tar": "tar", ".parquet": "parquet", ".arrow": "arrow"}
_STATE, _STATE_MOST = "state.json", 16 << 20
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval)(?:[-_.\d].*)?", re.IGNORECASE)
_MERGE_GAP, _MERGE_MOST = 64 << 10, 8 << 20
"""Members of a tar that lie so close are read at once, up to so many bytes."""
_OPEN_TABLES = 4
_ENDINGS = 6
"""Endings of files that are no images, as a message counts them."""


class Entry(NamedTuple):
    """One image of a source, or a container that was not opened yet."""

    path: str
    """Below the source: POSIX, printable (see :func:`storage.names.printable`), unique."""
    stamp: int
    """Made of size and modification time of the file it lies in, or the bucket's entity tag. If it is as before, the
    image is not read again."""
    size: int
    """In bytes; -1 where only reading tells."""
    container: str = ""
    """Path of the container that holds the image; empty for an image file."""
    place: int = -1
    """Where in the container: byte offset in a tar, row in a table. -1: the container as a whole."""


class Source:
    """Images below one or more URLs: local folders and files, or any fsspec URL.

    Args:
        urls: each a folder, a file, or a pattern with ``*``.
        image_column: name of the column of a table that holds the images; None: found by its type.
    """

    def __init__(self, urls: Sequence[str], image_column: str | None = None) -> None:
        self.urls = list(urls)
        self._column = image_column
        self._roots = [Root(url) for url in self.urls]
        self._tables: OrderedDict[str, ImageColumn] = OrderedDict()

    @property
    def is_local(self) -> bool:
        return all(root.is_local for root in self._roots)

    def scan(self) -> Iterator[Entry]:
        """Every image, in no particular order; containers are opened.

        Raises:
            DataError: a source does not exist, holds no image, or holds several things and does not say which.
        """
        for entry in self.files():
            yield from self.members(entry) if entry.container else [entry]

    def files(self) -> Iterator[Entry]:
        """Image files and, where there are none, unopened containers, in no particular order.

        Raises:
            DataError: as :meth:`scan`.
        """
        for number, root in enumerate(self._roots):
            prefix = f"{number}/" if len(self._roots) > 1 else ""
            images, others = 0, Counter[str]()
            beside: list[File] = []
            for file in root.find():
                if _is_image(file.name):
                    images += 1
                    yield Entry(prefix + printable(file.name), file.stamp, file.size)
                elif _kind(file.name) or _base(file.name) == _STATE:
                    beside.append(file)
                else:
                    others[_ending(file.name)] += 1
            if images:
                _tell(root.url, others)
                ignored = sum(1 for file in beside if _kind(file.name))
                if ignored:
                    log.warning("%s: the image files are used, %d tars or tables are not", root.url, ignored)
                continue
            containers = _containers(root, beside)
            if not containers:
                others.update(_ending(file.name) for file in beside)
                raise DataError(
                    f"source {root.url!r} holds no image ({others.total()} other files{_endings(others, ': ')}); names "
                    f"must end in one of {', '.join(sorted(SUFFIXES))}; or give tars, Parquet files or a saved Hugging "
                    "Face data set"
                )
            for file in containers:
                path = prefix + printable(file.name)
                yield Entry(path, file.stamp, file.size, path)

    def members(self, container: Entry) -> Iterator[Entry]:
        """The images of a container, in its order.

        A damaged one gives what is sound, and then itself as an entry that cannot be read: it ends in quarantine.

        Raises:
            DataError: a table has several columns that could be the images, or only their addresses.
        """
        try:
            yield from self._tar(container) if _kind(container.path) == "tar" else self._rows(container)
        except (TarBroken, ColumnBroken, OSError) as error:
            log.warning("%s: %s", container.path, error)
            yield container._replace(place=-1)

    def read(self, entry: Entry, limits: ImageLimits | None = None) -> bytes:
        """The image's bytes.

        Raises:
            ImageRejected: it vanished, may not be read, or is larger than the limit.
        """
        data = self.read_all([entry], limits or ImageLimits())[0]
        if isinstance(data, ImageRejected):
            raise data
        return data

    def read_all(self, entries: Sequence[Entry], limits: ImageLimits) -> list[bytes | ImageRejected]:
        """The bytes of some images, or why they cannot be had, in order. Neighbours in a tar are read together."""
        inside = [entry for entry in entries if entry.place >= 0 and _kind(entry.container) == "tar"]
        if not inside:
            return [self._one(entry, limits) for entry in entries]
        found: dict[str, bytes | ImageRejected] = {}
        for run in _runs(inside):
            start = run[0].place
            if run[0].size > limits.max_bytes:
                found[run[0].path] = too_many_bytes(run[0].size, limits)
                continue
            root, name = self._find(run[0].container)
            try:
                data = root.read_range(name, start, run[-1].place + run[-1].size)
            except OSError as error:
                found |= {entry.path: _unreadable(error) for entry in run}
            else:
                for entry in run:
                    found[entry.path] = data[entry.place - start : entry.place - start + entry.size]
        return [found[entry.path] if entry.path in found else self._one(entry, limits) for entry in entries]

    def _one(self, entry: Entry, limits: ImageLimits) -> bytes | ImageRejected:
        if entry.size > limits.max_bytes and (entry.place >= 0 or not entry.container):
            return too_many_bytes(entry.size, limits)
        try:
            if not entry.container:
                root, name = self._find(entry.path)
                data = root.read(name, entry.size, limits.max_bytes)
            elif entry.place >= 0:
                data = self._table(entry.container).read(entry.place)
            else:
                for _ in self._tar(entry) if _kind(entry.path) == "tar" else self._rows(entry):
                    pass  # to hear again what is wrong with the container
                return _unreadable(OSError("could not be read when it was listed, and now can: run again"))
        except (OSError, TarBroken, ColumnBroken) as error:
            return _unreadable(error)
        return data if len(data) <= limits.max_bytes else too_many_bytes(len(data), limits)

    def _find(self, path: str) -> tuple[Root, str]:
        if len(self._roots) == 1:
            return self._roots[0], raw(path)
        number, _, rest = path.partition("/")
        return self._roots[int(number)], raw(rest)

    def _tar(self, container: Entry) -> Iterator[Entry]:
        root, name = self._find(container.path)
        found: list[tuple[str, int, int]] = []
        others: list[tuple[str, str]] = []
        broken: TarBroken | None = None
        with root.open(name) as file:
            try:
                for member in members(file, container.size):
                    inner = member_path(member.name)
                    if is_hidden(inner):
                        continue
                    if _is_image(inner):
                        found.append((inner, member.offset, member.size))
                    else:
                        others.append((_key(inner)[0], _ending(inner)))
            except TarBroken as error:
                broken = error
        samples = {_key(inner)[0] for inner, _, _ in found}
        _tell(container.path, Counter(ending for key, ending in others if key not in samples))
        seen: dict[str, int] = {}
        for inner, offset, size in _images_of_samples(found):
            seen[inner] = seen.get(inner, 0) + 1
            again = f"#{seen[inner]}" if seen[inner] > 1 else ""
            yield container._replace(path=f"{container.path}/{inner}{again}", size=size, place=offset)
        if broken is not None:
            raise broken

    def _rows(self, container: Entry) -> Iterator[Entry]:
        for row in self._table(container.path).rows(container.size):
            yield container._replace(path=f"{container.path}/{row:08d}", size=-1, place=row)

    def _table(self, path: str) -> ImageColumn:
        table = self._tables.get(path)
        if table is None:
            from latteflow.storage.columns import ImageColumn  # and pyarrow, which most sources do without

            root, name = self._find(path)
            parquet = _kind(path) == "parquet"
            table = ImageColumn(lambda: root.open(name), is_parquet=parquet, column=self._column, what=path)
            self._tables[path] = table
            while len(self._tables) > _OPEN_TABLES:
                self._tables.popitem(last=False)
        return table


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()  # PurePosixPath takes ten times as long


def _ending(name: str) -> str:
    stem, dot, ending = _base(name).rpartition(".")
    return printable(f".{ending.lower()}") if stem and dot else "without ending"


def _endings(counts: Counter[str], before: str = "") -> str:
    """How many files have which ending, the most frequent ones first; nothing where there are none."""
    told = [f"{count} {ending}" for ending, count in sorted(counts.items(), key=lambda each: (-each[1], each[0]))]
    told[_ENDINGS:] = [f"{len(told) - _ENDINGS} more endings"] if len(told) > _ENDINGS else []
    heic = not READS_HEIC and not HEIC_SUFFIXES.isdisjoint(counts)
    return before * bool(told) + ", ".join(told) + f"; {HEIC_HINT}" * heic


def _tell(where: str, passed_over: Counter[str]) -> None:
    if passed_over:
        log.info("%s: %d files are no images by name: %s", where, passed_over.total(), _endings(passed_over))


def _is_image(name: str) -> bool:
    return _suffix(name) in SUFFIXES


def _kind(name: str) -> str | None:
    """What sort of container a file is, by its name."""
    return _KINDS.get(_suffix(name))


def _stem(name: str) -> str:
    return name[: name.rfind(".")]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _unreadable(error: Exception) -> ImageRejected:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageRejected(RejectReason.UNREADABLE, reason)


def _containers(root: Root, beside: Sequence[File]) -> list[File]:
    """Those of the files that hold the images.

    Raises:
        DataError: there is more than one sort of them, or more than one split.
    """
    listed = {path for file in beside if _base(file.name) == _STATE for path in _arrow_files(root, file)}
    found: dict[str, list[File]] = {}
    tars = {_stem(file.name) for file in beside if _kind(file.name) == "tar"}
    for file in beside:
        kind = _kind(file.name)
        if kind == "parquet" and _stem(file.name) in tars:  # img2dataset's table about the images in that tar
            continue
        # Beside the arrow files of a saved data set lie the caches of its transformations.
        if kind and (kind != "arrow" or root.is_file or file.name in listed):
            found.setdefault(kind, []).append(file)
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} .{kind}" for kind, files in sorted(found.items()))
        raise DataError(f"source {root.url!r} holds {counts} files: name one sort, as in {root.url}/*.{min(found)}")
    files = next(iter(found.values()), [])
    splits = {split: file.name for file in files if (split := _split(file.name)) is not None}
    if len(splits) > 1:
        raise DataError(
            f"source {root.url!r} holds several splits, for example {' and '.join(sorted(splits.values())[:2])}: "
            f"name the one that is meant ({root.url}/... , with * for any characters)"
        )
    return files


def _arrow_files(root: Root, state: File) -> Iterator[str]:
    """Names of the files that a saved data set consists of."""
    try:
        record = json.loads(root.read(state.name, state.size, _STATE_MOST)[:_STATE_MOST])
        names = [file["filename"] for file in record["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"source {root.url!r}: {printable(state.name)} is not what `save_to_disk` writes ({type(error).__name__}); "
            "save the data set again"
        ) from error
    folder = state.name.removesuffix(_STATE)
    yield from (folder + name for name in names if isinstance(name, str))


def _split(name: str) -> str | None:
    for part in reversed(name.split("/")):
        found = _SPLIT.fullmatch(part)
        if found:
            return found.group(1).lower()
    return None


def _images_of_samples(members: Sequence[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Of webdataset samples the image, not what belongs to it: ``a.jpg`` without ``a.mask.png``."""
    whole: set[str] = set()
    for path, _, _ in members:
        key, extension = _key(path)
        if f".{extension.lower()}" in SUFFIXES:
            whole.add(key)
    for member in members:
        key, extension = _key(member[0])
        if f".{extension.lower()}" in SUFFIXES or key not in whole:
            yield member


def _key(path: str) -> tuple[str, str]:
    """webdataset's key and extension: what is before and after the first dot of the base name."""
    folder, slash, base = path.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _runs(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Tar members in groups that one read should fetch."""
    run: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.container, entry.place)):
        if run:
            last, end = run[-1], entry.place + entry.size
            close = entry.container == last.container and entry.place - last.place - last.size <= _MERGE_GAP
            if not close or end - run[0].place > _MERGE_MOST:
                yield run
                run = []
        run.append(entry)
    if run:
        yield run
