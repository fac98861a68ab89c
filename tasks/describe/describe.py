"""describe: images -> texts, and class names -> texts, through the caption store."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import polars as pl

from latteflow.models.texts.describers import Kind
from latteflow.models.texts.prompts import fill
from latteflow.storage.artifacts import ArtifactWriter
from latteflow.storage.captions import CaptionStore, describer_id
from latteflow.storage.shards import packed_images, read_index
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import read_keys, read_label_numbers, read_labels
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.describe.group import members_of
from latteflow.tasks.describe.texts import Gallery, Question, Texts, describer_identity, questions_identity, text_counts

VERSION = 1
_AT_ONCE = 50_000
"""Images whose questions are in memory."""
_LOOKED_THROUGH = 20
"""Shards that are looked through at once for members of groups."""


def describe(domain: Domain, shards: StageResult, embedded: StageResult) -> StageResult:
    """A text for every live image and question, and for every class name if the prompt pack asks about them.

    Files: ``<shard>.captions.parquet``: ``member_keys`` (the image's key), ``index`` of the question, and the caption
    columns. ``classes.parquet``: the same for class names, with ``label``, the number of the class.
    """
    store = open_store(domain)
    identity = describer_identity(domain, embedded)
    inputs = {"shards": shards.ref.digest, "describer": identity, **questions_identity(domain, embedded, "image")}
    if about_classes := questions_identity(domain, embedded, "class"):
        inputs["class_texts"] = about_classes
    timings: dict[str, float] = {}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        images, features = store.open(shards.ref), store.open(embedded.ref)
        for names in _stretches(packed_images(images)):
            gallery = Gallery(domain, images, features, read_index(images, only=names))
            texts = Texts(domain, store.objects, "image", gallery, identity)
            questions = {
                shard: [each for key in keys for each in gallery.questions("image", [key])]
                for shard, keys in gallery.keys_by_shard().items()
            }
            own = {shard: {"texts": texts.digest(each)} for shard, each in questions.items()}
            missing = {shard: each for shard, each in questions.items() if writer.find(shard, own[shard]) is None}
            for shard, table in texts.write(missing) if missing else ():
                files = {f"{shard}.captions.parquet": parquet(table)}
                writer.put(shard, own[shard], files, rows=table.height, counts=text_counts(table))
            for name, value in texts.timings.items():
                timings[name] = value if name == "engine_wait" else timings.get(name, 0) + value
        _classes(writer, Texts(domain, store.objects, "class", gallery, identity), domain)
        return {}

    return run_stage(store, domain, "describe", VERSION, inputs, body, timings=timings)


def write_range(
    domain: Domain, shards: StageResult, embedded: StageResult, first: int = 0, last: int | None = None
) -> dict[str, int]:
    """Put the texts of some shards into the caption store: about their images, and the groups anchored at these.

    The class names belong to the first shard.

    `describe` and `group`, wherever they run then, find the texts there and ask for no other.

    Args:
        first, last: numbers of shards, as of a slice.

    Returns:
        How many texts of each kind the range has.
    """
    asked = _Asked(domain, shards, embedded)
    texts, questions = asked.of(asked.shards[first:last])
    whole: dict[Kind, list[Question]] = {kind: [each for one in questions[kind] for each in one] for kind in texts}
    for kind, each in texts.items():
        each.have_written(whole[kind])
    return {kind: len(each) for kind, each in whole.items()}


def tidy_texts(domain: Domain, embedded: StageResult) -> None:
    """Make the caption store quick to look into, before many workers do."""
    captions = CaptionStore(open_store(domain).objects)
    for kind in _Asked.kinds:
        captions.tidy(describer_id({"kind": kind, **describer_identity(domain, embedded, kind)}))


def missing_texts(
    domain: Domain, shards: StageResult, embedded: StageResult, first: int = 0, last: int | None = None
) -> list[int]:
    """Of each shard of a range, how many of its texts (those of :func:`write_range`) nobody has written yet."""
    asked = _Asked(domain, shards, embedded)
    counts: list[int] = []
    for names in asked.stretches(first, last):
        texts, questions = asked.of(names)
        each = [texts[kind].missing(questions[kind]) for kind in texts]
        counts += [sum(of_shard) for of_shard in zip(*each, strict=True)]
    return counts


class _Asked:
    """What is asked about each shard: its images, the groups anchored at them, and, at the first, the classes."""

    kinds: tuple[Kind, ...] = ("class", "image", "group")

    def __init__(self, domain: Domain, shards: StageResult, embedded: StageResult) -> None:
        store = open_store(domain)
        self._domain = domain
        self._images, self._features = (store.open(each.ref, listed=False) for each in (shards, embedded))
        self._open = {
            kind: functools.partial(
                Texts, domain, store.objects, kind, identity=describer_identity(domain, embedded, kind)
            )
            for kind in self.kinds
        }
        self.shards = list(packed_images(self._images))
        """Names of all, in their order."""

    def stretches(self, first: int = 0, last: int | None = None) -> Iterator[list[str]]:
        """The shards of a range, some at a time."""
        return _stretches({name: rows for name, rows in islice(packed_images(self._images).items(), first, last)})

    def of(self, names: Sequence[str]) -> tuple[dict[Kind, Texts], dict[Kind, list[list[Question]]]]:
        """The texts of some shards, and of each shard the questions. Of other shards only the members are in memory."""
        own = read_index(self._images, only=names)
        anchors = read_labels(self._features, own["key"])
        groups = members_of(self._labels, anchors["number"].to_numpy(), self._domain.group.size)
        key_of = dict(anchors.select("number", "key").iter_rows())
        elsewhere = {number for group in groups for number in group} - key_of.keys()
        others = read_keys(self._features, np.array(sorted(elsewhere), np.uint32))
        key_of |= dict(others.iter_rows())
        index = pl.concat([own, *self._find(others["key"], names[0])])
        gallery = Gallery(self._domain, self._images, self._features, index)
        keys = gallery.keys_by_shard()
        members_by_key = {
            anchor: tuple(sorted(key_of[number] for number in group))
            for anchor, group in zip(anchors["key"], groups, strict=True)
        }
        found: dict[Kind, list[list[Question]]] = {kind: [] for kind in self.kinds}
        for name in names:
            about, ask = sorted(keys.get(name, [])), gallery.questions
            about_classes = class_questions(self._domain, self._domain.classes) if name == self.shards[0] else []
            found["class"].append(about_classes)
            found["image"].append([each for key in about for each in ask("image", [key])])
            found["group"].append([each for key in about for each in ask("group", members_by_key[key])])
        return {kind: open_texts(gallery=gallery) for kind, open_texts in self._open.items()}, found

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return read_label_numbers(self._features)

    def _find(self, keys: pl.Series, near: str) -> Iterator[pl.DataFrame]:
        """Index rows of some images, which probably lie in the shards before one, the nearest first, or after it."""
        place = self.shards.index(near)
        order = [*reversed(self.shards[:place]), *self.shards[place:]]
        for start in range(0, len(order), _LOOKED_THROUGH):
            if not len(keys):
                return
            found = read_index(self._images, only=order[start : start + _LOOKED_THROUGH], keys=keys)
            keys = keys.filter(~keys.is_in(found["key"].implode()))
            yield found


def _stretches(images: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of shards, so many at a time as have about ``_AT_ONCE`` images.

    Args:
        images: of each shard.
    """
    names: list[str] = []
    total = 0
    for name, count in images.items():
        if names and total + count > _AT_ONCE:
            yield names
            names, total = [], 0
        names.append(name)
        total += count
    if names:
        yield names


def _classes(writer: ArtifactWriter, texts: Texts, domain: Domain) -> None:
    pack = domain.prompt_pack
    if pack is None or not pack.classes:
        return
    questions = class_questions(domain, domain.classes)
    own = {"texts": texts.digest(questions)}
    if writer.find("classes", own) is None:
        ((_, table),) = texts.write({"classes": questions})
        table = table.with_columns(label=pl.Series(range(len(domain.classes))).repeat_by(len(pack.classes)).explode())
        counts = {"class_texts": table.height}
        writer.put("classes", own, {"classes.parquet": parquet(table)}, rows=table.height, counts=counts)


def class_questions(domain: Domain, names: Sequence[str]) -> list[Question]:
    """What the prompt pack asks about each of these classes."""
    asked = domain.prompt_pack.classes if domain.prompt_pack else ()
    return [
        Question((), fill(one, **{"class": domain.prompt_name(name)}), place)
        for name in names
        for place, one in enumerate(asked)
    ]
