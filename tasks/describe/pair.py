"""pair: descriptions of two images -> a text about how the first differs from the second. For methods that compare."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl

from latteflow.models.methods.pc_clip.comparative import confused_pairs, soft_confusion
from latteflow.models.methods.pc_clip.pairs import Pairs, draw_pairs
from latteflow.models.texts.differences import RULES, read_difference
from latteflow.models.texts.prompts import fill
from latteflow.models.texts.screening import fits_language
from latteflow.storage.artifacts import Artifact, ArtifactWriter, Part
from latteflow.storage.errors import DataError
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.describe.screen import read_screened, usable
from latteflow.tasks.describe.texts import Gallery, Question, Texts, describer_identity, questions_identity

VERSION = 2
PART = 1000
"""Pairs in a part."""
HOPELESS = 200
"""So many answers without a single usable one mean that the others will be no better."""
MOST_WORDS = 40
"""Of a description that a text about a pair is written from (PC-CLIP 9)."""
log = logging.getLogger("latteflow.tasks")


def pair(domain: Domain, shards: StageResult, embedded: StageResult, screened: StageResult) -> StageResult:
    """Texts about pairs of images, from the descriptions that passed the screen.

    Files: ``pairs-00000.parquet`` and so on, one row for each ordered pair: pair_id, first, second (image keys),
    is_hard (drawn from within a pseudo-class), status (kept or rejected), rule (why it was rejected), text (cleaned
    up), raw (what the describer answered), and the other caption columns. ``classes.parquet``, if asked for: label_a,
    label_b and the same for pairs of classes.

    Raises:
        DataError: there are no two images with different descriptions, or too few answers can be used. What was
            written is kept.
    """
    store, writer_of = open_store(domain), domain.of_pairs()
    settings = domain.pairs.model_dump(mode="json", exclude={"describer"})
    identity = {"describer": describer_identity(writer_of, embedded, "pair")}
    shared = {"embed": embedded.ref.digest, "pairs": settings, **identity}
    inputs = {
        "shards": shards.ref.digest,
        "screen": screened.ref.digest,
        **shared,
        **questions_identity(writer_of, embedded, "pair"),
    }
    if domain.pairs.class_pairs:
        inputs |= {"classes": domain.classes, "class_texts": questions_identity(writer_of, embedded, "class_pair")}
    timings: dict[str, float] = {}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        images, features = store.open(shards.ref), store.open(embedded.ref)
        gallery = Gallery(writer_of, images, features)
        captions = described(store.open(screened.ref))
        asked = {
            f"pairs-{start // PART:05d}": part
            for start, part in _parts(_questions(domain, images, gallery.labels, captions))
        }
        texts = Texts(writer_of, store.objects, "pair", gallery, identity["describer"])
        own = {name: {"texts": texts.digest([each for each, _ in part]), **shared} for name, part in asked.items()}
        parts = {name: part for name in asked if (part := writer.find(name, own[name])) is not None}
        counts = sum((Counter(part.counts) for part in parts.values()), Counter[str]())
        missing = {name: [each for each, _ in part] for name, part in asked.items() if name not in parts}
        for name, table in texts.write(missing):
            found = _filtered(domain, table, asked[name])
            files = {f"{name}.parquet": parquet(found)}
            parts[name] = writer.put(name, own[name], files, rows=found.height, counts=_counts(found))
            counts += Counter(parts[name].counts)
            if not counts["kept"] and counts["texts"] >= HOPELESS:
                raise _unusable(domain, counts, writer, parts)
        timings.update(texts.timings)
        if counts["kept"] < 2:
            raise _unusable(domain, counts, writer, parts)
        if domain.pairs.class_pairs:
            about_classes = Texts(writer_of, store.objects, "class_pair", gallery, identity["describer"])
            _class_pairs(domain, writer, features, about_classes)
        return {}

    return run_stage(store, domain, "pair", VERSION, inputs, body, timings=timings)


def described(screened: Artifact) -> dict[str, str]:
    """Image key -> the beginning of its description, of images that have one that is used."""
    table = usable(read_screened(screened, "images")).filter(pl.col("text") != "")
    return {
        key: " ".join(text.split()[:MOST_WORDS]).rstrip(".,;: ")
        for key, text in zip(table["member_keys"].list.first(), table["text"], strict=True)
    }


def _questions(
    domain: Domain, images: Artifact, labels: Mapping[str, int], captions: Mapping[str, str]
) -> list[tuple[Question, bool]]:
    """What is asked about each pair, and whether it is a hard one."""
    if len(captions) < 2:
        raise DataError(
            f"domain {domain.name!r} has {len(captions)} image(s) with a description that is used, and pairs need 2 at "
            "least; look at what `screen` dropped (the report has it), or leave pc_clip out of `method`"
        )
    # Every image that was ever packed has a number, so that pairs stay the same when images come and go.
    keys = read_index(images, removed=True)["key"].to_list()
    number: dict[str, int] = {}
    texts = [number.setdefault(captions.get(key, "").casefold(), len(number)) for key in keys]
    groups = [labels[key] if key in captions and key in labels else -1 for key in keys]
    both, budget = domain.pairs.both_directions, domain.pairs.budget
    found = draw_pairs(groups, texts, max(1, budget // 2) if both else budget, domain.pairs.policy, domain.pairs.seed)
    if not len(found):
        same = " within a pseudo-class" if domain.pairs.policy == "within_group" else ""
        example = next(iter(captions.values()))
        raise DataError(
            f"domain {domain.name!r}: all {len(captions)} descriptions{same} say the same ({example[:80]!r}), so that "
            "there is no difference to write about; use a describer that tells the images apart"
        )
    strange = sum(not fits_language(text, "en") for text in captions.values())
    if 2 * strange > len(captions):
        advice = "; the filter `compat` is for English: use `recommended`" if domain.pairs.filter == "compat" else ""
        log.warning("pair: %d of %d descriptions do not look English%s", strange, len(captions), advice)
    return list(_asked(domain, keys, captions, found))


def _asked(
    domain: Domain, keys: Sequence[str], captions: Mapping[str, str], found: Pairs
) -> Iterator[tuple[Question, bool]]:
    pack = domain.of_pairs().prompt_pack
    for i, j, is_hard in zip(found.first.tolist(), found.second.tolist(), found.is_hard.tolist(), strict=True):
        for first, second in ((i, j), (j, i))[: 1 + domain.pairs.both_directions]:
            members = (keys[first], keys[second])
            said = (captions[members[0]], captions[members[1]])
            yield _question(members, said, pack.pair if pack else None), is_hard


def _question(members: tuple[str, ...], said: tuple[str, str], asked: str | None) -> Question:
    # A text's key is made of what was asked, so that the descriptions are always in it.
    prompt = "\n".join(said) if asked is None else fill(asked, first=said[0], second=said[1])
    return Question(members, prompt, captions=said)


def _parts(asked: list[tuple[Question, bool]]) -> Iterator[tuple[int, list[tuple[Question, bool]]]]:
    for start in range(0, len(asked), PART):
        yield start, asked[start : start + PART]


def _filtered(domain: Domain, table: pl.DataFrame, asked: Sequence[tuple[Question, bool]]) -> pl.DataFrame:
    """The table of a part: each answer cleaned up, or rejected by a rule."""
    members, raw = table["member_keys"].to_list(), table["text"].fill_null("").to_list()
    failed = (table["finish_reason"] == "error").to_list()
    found = [
        read_difference(text, question.captions, domain.pairs.filter, question.prompt)
        for text, (question, _) in zip(raw, asked, strict=True)
    ]
    rules = ["error" if is_failed else each.rule for each, is_failed in zip(found, failed, strict=True)]
    return table.drop("member_keys", "index", "text").with_columns(
        pair_id=pl.Series([sha256(canonical_json(keys))[:20] for keys in members]),
        first=pl.Series([keys[0] for keys in members]),
        second=pl.Series([keys[1] for keys in members]),
        is_hard=pl.Series([is_hard for _, is_hard in asked]),
        status=pl.Series(["kept" if rule is None else "rejected" for rule in rules]),
        rule=pl.Series(rules, dtype=pl.String),
        text=pl.Series([each.text for each in found]),
        raw=pl.Series(raw),
    )


def _counts(found: pl.DataFrame) -> dict[str, int]:
    rules = Counter(found["rule"].drop_nulls().to_list())
    rejected = {f"rejected_{rule}": rules[rule] for rule in RULES if rules[rule]}
    return {"texts": found.height, "kept": found.height - rules.total(), **rejected}


def _unusable(domain: Domain, counts: Counter[str], writer: ArtifactWriter, parts: Mapping[str, Part]) -> DataError:
    tables = (read_parquet(writer.read(part, f"{name}.parquet")) for name, part in parts.items())
    raw = next((raw for table in tables for raw in table.filter(pl.col("rule").is_not_null())["raw"] if raw), "")
    rejected = Counter({rule: counts[f"rejected_{rule}"] for rule in RULES if counts[f"rejected_{rule}"]})
    told = ", ".join(f"{count} {rule} ({RULES[rule]})" for rule, count in rejected.most_common(3))
    advice = "ask another model or in other words (`pairs.describer`, `pair` of the prompt pack)"
    if domain.pairs.filter == "compat" and rejected["not_ascii"]:
        advice = "`pairs.filter: compat` reads English only: use `recommended`, or ask for English"
    return DataError(
        f"domain {domain.name!r}: of the first {counts['texts']} texts about pairs {counts['kept']} can be used: "
        f"{told}; for example {raw[:120]!r}. They are kept; {advice}, and run again"
    )


def _class_pairs(domain: Domain, writer: ArtifactWriter, embedded: Artifact, texts: Texts) -> None:
    pack, names = domain.of_pairs().prompt_pack, domain.prompt_names
    chosen = confused_classes(embedded, len(names), domain.pairs.class_pairs)
    asked = [_question((), (names[a], names[b]), pack.class_pair if pack else None) for a, b in chosen]
    own = {"texts": texts.digest(asked), "pairs": chosen}
    if writer.find("classes", own) is None:
        ((_, table),) = texts.write({"classes": asked})
        table = table.with_columns(
            label_a=pl.Series([a for a, _ in chosen], dtype=pl.Int64),
            label_b=pl.Series([b for _, b in chosen], dtype=pl.Int64),
        ).drop("member_keys", "index")
        counts = {"class_pairs": table.height}
        writer.put("classes", own, {"classes.parquet": parquet(table)}, rows=table.height, counts=counts)


def confused_classes(embedded: Artifact, classes: int, count: int) -> list[tuple[int, int]]:
    """The pairs of classes that the untouched CLIP confuses most on the unlabelled images, each in both orders.

    Of each image it knows the probabilities of the likeliest classes.
    """
    table = read_parquet(embedded.read("zero_shot.parquet"))
    probabilities = np.zeros((table.height, classes))
    np.put_along_axis(probabilities, np.array(table["labels"].to_list()), np.array(table["probabilities"].to_list()), 1)
    return confused_pairs(soft_confusion(probabilities), count)


def read_pairs(artifact: Artifact) -> pl.DataFrame:
    """All pairs of a `pair` artifact, kept and rejected."""
    return pl.concat(
        [read_parquet(artifact.read(name)) for name in artifact.names(".parquet") if name != "classes.parquet"]
    )


def read_class_pairs(artifact: Artifact) -> pl.DataFrame:
    """Texts about pairs of classes that there are: label_a, label_b, text."""
    return read_parquet(artifact.read("classes.parquet")).filter(pl.col("text").fill_null("") != "")
