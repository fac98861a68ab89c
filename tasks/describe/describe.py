"""describe: images -> texts, and class names -> texts, through the caption store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from latteflow.models.texts.describers import Kind
from latteflow.models.texts.prompts import fill
from latteflow.storage.artifacts import ArtifactWriter
from latteflow.storage.tables import parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.describe.group import look_alikes
from latteflow.tasks.describe.texts import Gallery, Question, Texts, describer_identity, questions_identity, text_counts

VERSION = 1


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
        gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
        texts = Texts(domain, store.objects, "image", gallery, identity)
        questions = {
            shard: [each for key in keys for each in gallery.questions("image", [key])]
            for shard, keys in gallery.keys_by_shard().items()
        }
        own = {shard: {"texts": texts.digest(each)} for shard, each in questions.items()}
        missing = {shard: each for shard, each in questions.items() if writer.find(shard, own[shard]) is None}
        for shard, table in texts.write(missing):
            files = {f"{shard}.captions.parquet": parquet(table)}
            writer.put(shard, own[shard], files, rows=table.height, counts=text_counts(table))
        timings.update(texts.timings)
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
    found = [asked.of(number) for number in range(len(asked.shards))[first:last]]
    whole: dict[Kind, list[Question]] = {kind: [each for one in found for each in one[kind]] for kind in asked.texts}
    for kind, texts in asked.texts.items():
        for _ in texts.write({"range": whole[kind]}):
            pass  # tables are for the stages
    return {kind: len(questions) for kind, questions in whole.items()}


def missing_texts(domain: Domain, shards: StageResult, embedded: StageResult) -> list[int]:
    """Of each shard, how many of its texts (those of :func:`write_range`) nobody has written yet."""
    asked = _Asked(domain, shards, embedded)
    every = [asked.of(number) for number in range(len(asked.shards))]
    counts = [texts.missing([one[kind] for one in every]) for kind, texts in asked.texts.items()]
    return [sum(of_shard) for of_shard in zip(*counts, strict=True)]


class _Asked:
    """What is asked about each shard: its images, the groups anchored at them, and, at the first, the classes."""

    def __init__(self, domain: Domain, shards: StageResult, embedded: StageResult) -> None:
        store = open_store(domain)
        self._domain = domain
        self._gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
        self._groups = {group.anchor: group for group in look_alikes(self._gallery.labels, domain.group.size)}
        self.shards = list(self._gallery.keys_by_shard().values())
        """Keys of the images of each."""
        kinds: tuple[Kind, ...] = ("class", "image", "group")
        self.texts = {
            kind: Texts(domain, store.objects, kind, self._gallery, describer_identity(domain, embedded, kind))
            for kind in kinds
        }

    def of(self, number: int) -> dict[Kind, list[Question]]:
        """The questions about a shard."""
        keys, ask = sorted(self.shards[number]), self._gallery.questions
        groups = [self._groups[key] for key in keys]
        return {
            "class": class_questions(self._domain, self._domain.classes) if number == 0 else [],
            "image": [each for key in keys for each in ask("image", [key])],
            "group": [each for group in groups for each in ask("group", group.members)],
        }


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
