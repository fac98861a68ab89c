"""describe: images -> texts, and class names -> texts, through the caption store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from models.describers import Kind
from models.prompts import fill
from storage.artifacts import ArtifactWriter
from storage.tables import parquet
from tasks.domain import Domain
from tasks.group import look_alikes
from tasks.stage import StageResult, open_store, run_stage
from tasks.texts import Gallery, Question, Texts, describer_identity, questions_identity, text_counts

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
    store = open_store(domain)
    gallery = Gallery(domain, store.open(shards.ref), store.open(embedded.ref))
    keys = {key for part in list(gallery.keys_by_shard().values())[first:last] for key in part}
    groups = [group for group in look_alikes(gallery.labels, domain.group.size) if group.anchor in keys]
    asked: dict[Kind, list[Question]] = {
        "class": class_questions(domain, domain.classes) if first == 0 else [],
        "image": [each for key in sorted(keys) for each in gallery.questions("image", [key])],
        "group": [each for group in groups for each in gallery.questions("group", group.members)],
    }
    for kind, questions in asked.items():
        identity = describer_identity(domain, embedded, kind)
        for _ in Texts(domain, store.objects, kind, gallery, identity).write({"range": questions}):
            pass  # tables are for the stages
    return {kind: len(questions) for kind, questions in asked.items()}


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
