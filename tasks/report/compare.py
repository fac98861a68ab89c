"""Two evaluations side by side: what changed between runs of a domain, or between domain files on the same images."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from latteflow.models.settings import ZERO_SHOT, ZERO_SHOTS
from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.shards import read_index, read_records
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.decode import opened
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.charts import make_axis
from latteflow.tasks.report.history import History
from latteflow.tasks.report.html import html, picture_url, thumbnail
from latteflow.tasks.report.page import OF_A_CLASS, Change, Changes, sorted_changes
from latteflow.tasks.report.scores import Gain, read_scores, verdict

SHOWN = 60
"""Images of each kind of change that the page shows."""
SIDE_PX = 96


@dataclass(frozen=True)
class Run:
    """An evaluation and a method in it.

    Attributes:
        name: for people: domain, method, evaluation, and the domain file, as two domains may have one name.
        method: whose answers are meant.
        scores: the artifact of `evaluate`.
        classes: their names.
        answers: key, path, truth, label and labels (by seed), a row for each image; classes as names.
        made_from: the artifacts behind it, by label.
    """

    name: str
    method: str
    scores: Artifact
    classes: Sequence[str]
    answers: pl.DataFrame
    made_from: Mapping[str, Artifact]

    @property
    def images(self) -> Artifact:
        """The shards of the images that were evaluated."""
        wanted = self.scores.inputs["shards"]
        found = next((each for each in self.made_from.values() if each.ref.digest == wanted), None)
        if found is None:
            raise DataError(f"{self.name}: its images are no longer in the store")
        return found


@dataclass(frozen=True)
class Changed:
    """An image with another answer: ``kind`` is better, worse or other (both wrong, or no label)."""

    kind: str
    path: str
    before: str
    after: str
    truth: str | None
    picture: str
    number: int
    """Of its true class, or else of its answer, for the filter."""


@dataclass(frozen=True)
class Comparison:
    """What became of the images that two runs share.

    Attributes:
        n, labelled: shared images, and those of them with the same label in both.
        top1: of both, on those; None without any.
        gain: of the second over the first.
        agreement: share of the shared images with the same answer of the first seeds.
        per_class: accuracy of each class that has labels.
        changed: images with another answer, some of each kind; ``counts`` of all of them, by kind.
        settings: stage and setting, and what it is in each run, where that differs.
        lineage: label of a stage, and its fingerprint in each run; empty where there is none.
    """

    one: Run
    other: Run
    n: int
    labelled: int
    top1: tuple[float, float] | None
    gain: Gain | None
    agreement: float
    per_class: Sequence[Change]
    changed: Sequence[Changed]
    counts: Mapping[str, int]
    settings: Sequence[tuple[str, str, str]]
    lineage: Sequence[tuple[str, str, str]]

    @property
    def verdict(self) -> str:
        """better, worse or unclear for the second; unknown without labels."""
        return verdict(self.gain.gain_interval if self.gain else None)


def read_run(name: str) -> Run:
    """The run that somebody means by ``FILE[@FINGERPRINT][:METHOD]``.

    Args:
        name: a domain file; the beginning of the fingerprint of an evaluation, by default the newest; a method of it,
            by default the first; `zero_shot_plain`, `zero_shot_centred` and `zero_shot_estimated` are methods too, and
            `zero_shot` is the one of them that the domain keeps.

    Raises:
        DataError: there is no such evaluation, or no such method in it.
    """
    match = None if Path(name).exists() else re.fullmatch(r"(.+?)(?:@([0-9a-f]{4,64}))?(?::(\w+))?", name)
    file, fingerprint, method = match.groups() if match else (name, None, None)
    domain = Domain.load(file)
    history = History(open_store(domain), domain.name)
    if fingerprint is None:
        made = history.newest("evaluate")
        if made is None:
            raise DataError(f"{file}: domain {domain.name!r} was not evaluated yet; run it first")
        scores = made.artifact
    else:
        scores = history.find(f"evaluate/{fingerprint}")
    found = read_scores(scores)
    method = found.zero_shot.own if method == ZERO_SHOT else method or next(iter(found.methods))
    known = [*found.methods, ZERO_SHOT, *ZERO_SHOTS]
    if method not in known:
        near = difflib.get_close_matches(method, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise DataError(f"{name}: no model by {method!r} was evaluated; {hint}")
    table = read_parquet(scores.read("predictions.parquet"))
    classes = pl.Series(found.classes, dtype=pl.String)
    made_from: dict[str, Artifact] = {}
    for each in history.inventory.reachable([scores]):
        made_from.setdefault(history.label(each), each)
    answers = table.select(
        "key",
        "path",
        truth=pl.col("truth").map_elements(classes.__getitem__, pl.String),
        label=pl.col(method).map_elements(classes.__getitem__, pl.String),
        labels=pl.col(f"{method}_seeds").list.eval(pl.element().map_elements(classes.__getitem__, pl.String)),
    )
    title = f"{domain.name}, {method.replace('_', ' ')}, evaluation {scores.fingerprint[:12]}, by {file}"
    return Run(title, method, scores, found.classes, answers, made_from)


def compare(one: Run, other: Run) -> Comparison:
    """Put two runs beside each other, on the images that both have: of the same path and content.

    Raises:
        DataError: they are the same, or share no image.
    """
    if one.scores.ref == other.scores.ref and one.method == other.method:
        raise DataError(f"A and B are both {one.name}; give FILE@FINGERPRINT (see `latteflow show FILE`)")
    both = one.answers.join(other.answers, on="key", how="inner", suffix="_other", maintain_order="left")
    if not both.height:
        raise DataError(f"{one.name} and {other.name} share no image: an image is known by its path and its content")
    known = both.filter(pl.col("truth") == pl.col("truth_other"))
    top1 = gain = None
    per_class: list[Change] = []
    if known.height:
        right = [_right(known, name) for name in ("labels", "labels_other")]
        top1 = float(right[0].mean()), float(right[1].mean())
        gain = Gain.of(right, [(known[name] == known["truth"]).to_numpy() for name in ("label", "label_other")])
        truth = known["truth"].to_numpy()
        for name in dict.fromkeys([*one.classes, *other.classes]):
            own = truth == name
            if own.any():
                per_class.append(Change(name, int(own.sum()), *(float(each[own].mean()) for each in right)))
    counts, changed = _changed(other, both)
    return Comparison(
        one=one,
        other=other,
        n=both.height,
        labelled=known.height,
        top1=top1,
        gain=gain,
        agreement=float(np.mean((both["label"] == both["label_other"]).to_numpy())),
        per_class=per_class,
        changed=changed,
        counts=counts,
        settings=list(_settings(one, other)),
        lineage=[
            (label, *(run.made_from[label].fingerprint if label in run.made_from else "" for run in (one, other)))  # type: ignore[misc]
            for label in dict.fromkeys([*one.made_from, *other.made_from])
        ],
    )


def page_of(found: Comparison) -> str:
    """The comparison as one self-contained page."""
    axis = make_axis([0.0, found.gain.gain, *found.gain.gain_interval], 4) if found.gain else None
    classes = sorted({(each.number, each.truth or each.after) for each in found.changed})
    per_class: Changes = sorted_changes(found.per_class, OF_A_CLASS)
    return html("compare.html.j2", c=found, gain_axis=axis, per_class=per_class, classes=classes)


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page; returns where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(found), encoding="utf-8")
    return path


def _right(known: pl.DataFrame, name: str) -> np.ndarray:
    """Share of the seeds that are right about each image, ``(n,)``."""
    rows = known.select(name, "truth").iter_rows()
    return np.array([np.mean([label == truth for label in labels]) for labels, truth in rows])


def _changed(other: Run, both: pl.DataFrame) -> tuple[dict[str, int], list[Changed]]:
    """How many images have another answer now, by kind, and the first of each by key, which is a digest."""
    truth = pl.when(pl.col("truth") == pl.col("truth_other")).then("truth")
    kind = (
        pl.when(pl.col("label_other") == truth)
        .then(pl.lit("better"))
        .when(pl.col("label") == truth)
        .then(pl.lit("worse"))
        .otherwise(pl.lit("other"))
    )
    moved = both.filter(pl.col("label") != pl.col("label_other")).with_columns(kind=kind, known=truth).sort("key")
    shown = moved.filter(pl.int_range(pl.len()).over("kind") < SHOWN).sort("kind", "key")
    index = read_index(other.images).filter(pl.col("key").is_in(shown["key"].implode()))
    pictures = {
        record.key: picture_url(thumbnail(opened(record), SIDE_PX)) for record in read_records(other.images, index)
    }
    number = {name: place for place, name in enumerate(other.classes)}
    changed = [
        Changed(
            kind=row["kind"],
            path=row["path_other"],
            before=row["label"],
            after=row["label_other"],
            truth=row["known"],
            picture=pictures[row["key"]],
            number=number[row["known"] or row["label_other"]],
        )
        for row in shown.iter_rows(named=True)
    ]
    return dict(moved["kind"].value_counts().iter_rows()), changed


def _settings(one: Run, other: Run) -> Iterator[tuple[str, str, str]]:
    """Settings that differ; what earlier artifacts they were made from is not a setting."""
    for label in dict.fromkeys([*one.made_from, *other.made_from]):
        values = [
            dict(_flat(run.made_from[label].inputs, label)) if label in run.made_from else {} for run in (one, other)
        ]
        if all(values):
            for name in dict.fromkeys([*values[0], *values[1]]):
                was, now = (each.get(name, "") for each in values)
                if was != now:
                    yield name, was, now


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from _flat(each, f"{prefix} {name}")
        elif not (isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each)):
            yield f"{prefix} {name}", each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
