"""A first look at a source, before there is a domain: how many images, in which folders, and what some look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from latteflow.models.towers.images import to_rgb
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, open_image
from latteflow.storage.inspectors import Inspectors
from latteflow.storage.names import raw
from latteflow.storage.sources import Entry, Source

SAMPLE = 48
"""Pictures that are decoded."""
_SIDE = 96
_WHITE, _MOSTLY = 245, 0.9
_LONG = 2.0
_TRAINING, _HELD_OUT = ("train", "training"), ("test", "val", "valid", "validation", "eval")


@dataclass(frozen=True)
class Pictures:
    """What some pictures of a source look like.

    Attributes:
        seen: that were decoded; the others of the sample are damaged.
        bordered: of these, those whose border is white or transparent on all sides, as of icons and cut-outs.
        long: of these, those more than twice as long as wide.
    """

    seen: int
    bordered: int
    long: int


@dataclass(frozen=True)
class Found:
    """What lies in a source.

    Attributes:
        images: image files; of tars and tables, which are not all opened, the number of these.
        are_files: False: tars or tables.
        training, held_out: sub-folders with a split of the images, where these are all there is; else empty.
        folders: sub-folder by the path of an image below its source: of those held out, if there are any. Only where
            there are several, with words for names; as the file system has them.
    """

    images: int
    are_files: bool
    training: str
    held_out: str
    folders: Mapping[str, str]
    pictures: Pictures


def survey(url: str) -> Found:
    """List a source, and decode a few of its images.

    Raises:
        DataError: it does not exist, holds no image, or several things and does not say which.
        StorageError: it cannot be reached.
    """
    source = Source([url])
    entries = sorted(source.files())
    are_files = not entries[0].container
    paths = [entry.path for entry in entries]
    training, held_out = _splits(paths) if are_files and "*" not in url else ("", "")
    own = _below(paths, training)
    folders = _folders(_below(paths, held_out)) if are_files else {}
    if held_out and not folders:  # images without labels are of no use to an evaluation
        held_out, folders = "", _folders(own)
    return Found(
        images=len(own),
        are_files=are_files,
        training=training,
        held_out=held_out,
        folders=folders,
        pictures=_pictures(source, _sample(source, entries)),
    )


def _splits(paths: Sequence[str]) -> tuple[str, str]:
    """The folders of a source that is split in training images and others; empty where it is not."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in paths}
    named = {top.lower(): top for top in tops}
    if len(named) < 2 or not named.keys() <= {*_TRAINING, *_HELD_OUT}:
        return "", ""
    pair = ([named[name] for name in names if name in named] for names in (_TRAINING, _HELD_OUT))
    training, held_out = (next(iter(found), "") for found in pair)
    return (training, held_out) if training and held_out else ("", "")


def _below(paths: Sequence[str], folder: str) -> list[str]:
    return [path[len(folder) + 1 :] for path in paths if path.startswith(f"{folder}/")] if folder else list(paths)


def _folders(paths: Sequence[str]) -> dict[str, str]:
    """The sub-folder of each image, below the folders that all of them share."""
    parts = [path.split("/") for path in paths]
    depth = 0
    while all(len(each) > depth + 1 for each in parts) and len({each[depth] for each in parts}) == 1:
        depth += 1
    found = {path: raw(each[depth]) for path, each in zip(paths, parts, strict=True) if len(each) > depth + 1}
    words = any(re.search(r"[^\W\d_]", folder) for folder in found.values())  # not numbers or dates
    return found if words and len(set(found.values())) > 1 else {}


def _sample(source: Source, entries: Sequence[Entry]) -> list[Entry]:
    """Some images from all over the source; of tars and tables, the first of some."""
    some = [entries[place * len(entries) // SAMPLE] for place in range(SAMPLE)] if len(entries) > SAMPLE else entries
    each = -(-SAMPLE // len(some))
    return [image for entry in some for image in _images(source, entry, each)][:SAMPLE]


def _images(source: Source, entry: Entry, most: int) -> Iterator[Entry]:
    yield from islice(source.members(entry), most) if entry.container else [entry]


def _pictures(source: Source, entries: Sequence[Entry]) -> Pictures:
    limits = ImageLimits()
    measured = []
    with Inspectors(limits, processes=1) as inspectors:
        for entry in entries:
            (data,) = source.read_all([entry], limits)
            if isinstance(data, ImageRejected):
                continue
            (info,) = inspectors([data])  # hostile ones end there
            bordered = _is_bordered(data) if isinstance(info, ImageInfo) else None
            if isinstance(info, ImageInfo) and bordered is not None:
                measured.append((bordered, _is_long(info)))
    return Pictures(len(measured), sum(bordered for bordered, _ in measured), sum(long for _, long in measured))


def _is_long(info: ImageInfo) -> bool:
    return max(info.width, info.height) > _LONG * min(info.width, info.height)


def _is_bordered(data: bytes) -> bool | None:
    """None: it cannot be decoded after all."""
    try:
        with open_image(data) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            image.thumbnail((_SIDE, _SIDE))
            pixels = np.asarray(to_rgb(image)).min(axis=2)
    except Exception:  # whatever a decoder trips over
        return None
    sides = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return all((side >= _WHITE).mean() >= _MOSTLY for side in sides)
