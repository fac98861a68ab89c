"""describe: images -> texts, and class names -> texts, through the caption store."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from models.prompts import fill
from storage.artifacts import ArtifactWriter
from storage.tables import parquet
from tasks.domain import Domain
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


def _classes(writer: ArtifactWriter, texts: Texts, domain: Domain) -> None:
    pack = domain.prompt_pack
    if pack is None or not pack.classes:
        return
    questions = [
        Question((), fill(one, **{"class": domain.prompt_name(name)}), place)
        for name in domain.classes
        for place, one in enumerate(pack.classes)
    ]
    own = {"texts": texts.digest(questions)}
    if writer.find("classes", own) is None:
        ((_, table),) = texts.write({"classes": questions})
        table = table.with_columns(label=pl.Series(range(len(domain.classes))).repeat_by(len(pack.classes)).explode())
        counts = {"class_texts": table.height}
        writer.put("classes", own, {"classes.parquet": parquet(table)}, rows=table.height, counts=counts)
