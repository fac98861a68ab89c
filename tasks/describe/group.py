"""group: look-alikes -> one text for each group of images with the same pseudo-label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import polars as pl

from latteflow.storage.artifacts import ArtifactWriter
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.describe.texts import Gallery, Texts, describer_identity, questions_identity, text_counts

VERSION = 2
T = TypeVar("T")


def group(domain: Domain, shards: StageResult, embedded: StageResult) -> StageResult:
    """One group for every live image, and its text.

    Files: ``groups.parquet``: ``label`` (the pseudo-class), ``member_keys``, ``index`` of the question and the caption
    columns.
    """
    store = open_store(domain)
    identity = describer_identity(domain, embedded, "group")
    inputs = {
        "describer": identity,
        **questions_identity(domain, embedded, "group"),
        "embed": embedded.ref.digest,
        "size": domain.group.size,
    }
    timings: dict[str, float] = {}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
        texts = Texts(domain, store.objects, "group", gallery, identity)
        groups = look_alikes(gallery.labels, domain.group.size)
        asked = [(group.label, each) for group in groups for each in gallery.questions("group", group.members)]
        for name, found in texts.write({"groups": [each for _, each in asked]}):
            table = found.with_columns(label=pl.Series([label for label, _ in asked], dtype=pl.Int64))
            writer.put(name, inputs, {"groups.parquet": parquet(table)}, rows=table.height, counts=text_counts(table))
        timings.update(texts.timings)
        return {"groups": len(groups)}

    return run_stage(store, domain, "group", VERSION, inputs, body, timings=timings)


class Group(NamedTuple):
    """Look-alikes of an image."""

    anchor: str
    """Key of the image."""
    label: int
    """Pseudo-label of all members."""
    members: tuple[str, ...]
    """Keys, the anchor among them; sorted, so that equal groups are equal."""


def look_alikes(labels: Mapping[str, int], size: int) -> list[Group]:
    """Groups of images that share a pseudo-label, one anchored at every image (LatteCLIP's preparation).

    The official code draws members at random. Here a class's images stand in a line as they came: by shard and, in a
    shard, by key, which is a digest and so in random order. A group is the anchor and the ``size - 1`` before it, so
    that images that come later change no group. The first ``2 size - 1`` of a class have too few before them and stand
    in a ring, where a group is the anchor and those after it: no two of a class are the same, and membership needs no
    seed.

    Args:
        labels: image key -> pseudo-label, in the order of shards, as `embed` keeps them.
        size: images in a group; a class with fewer gives groups of all its images.
    """
    lines: dict[int, list[str]] = defaultdict(list)
    for key, label in labels.items():
        lines[label].append(key)
    return [
        Group(anchor, label, tuple(sorted(_beside(line, place, size))))
        for label, line in sorted(lines.items())
        for place, anchor in enumerate(line)
    ]


def members_of(labels: np.ndarray, anchors: np.ndarray, size: int) -> list[list[int]]:
    """The groups of :func:`look_alikes` that are anchored at some images, by number, and not those of the others.

    Looks at no more of the lines than it takes: where classes are frequent, at the shards next to those of the anchors.

    Args:
        labels: of all images, in the order of shards, ``(n,)``.
        anchors: numbers of images, ascending.
        size: images in a group.
    """
    if not len(anchors):
        return []
    ring, first, end = 2 * size - 1, int(anchors[0]), int(anchors[-1]) + 1
    lines: dict[int, list[int]] = {}
    back = 64 * size
    own, wanted = labels[anchors], np.unique(labels[anchors])
    while len(wanted):
        start = max(0, first - back)
        near = labels[start:end]
        order = np.argsort(near, kind="stable") + start
        bounds = np.searchsorted(labels[order], [wanted, wanted + 1])
        for label, begin, stop in zip(wanted.tolist(), *bounds.tolist(), strict=True):
            line = order[begin:stop]
            if np.searchsorted(line, first) >= ring:
                lines[label] = line.tolist()
            elif start == 0:  # in or near the ring, which may go on behind the anchors
                lines[label] = np.flatnonzero(labels == label).tolist()
        wanted, back = np.array([label for label in wanted.tolist() if label not in lines]), 4 * back
    place = {label: np.searchsorted(line, anchors[own == label]).tolist()[::-1] for label, line in lines.items()}
    return [sorted(_beside(lines[label], place[label].pop(), size)) for label in own.tolist()]


def _beside(line: Sequence[T], place: int, size: int) -> set[T]:
    """Members of the group that is anchored at a place of the line."""
    ring = min(len(line), 2 * size - 1)
    if place >= ring:
        return set(line[place - size + 1 : place + 1])
    return {line[(place + step) % ring] for step in range(size)}
