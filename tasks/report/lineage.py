"""One image, followed through a run: source, shard, pseudo-label, texts, model, prediction."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.names import printable
from latteflow.storage.shards import read_index, read_quarantine
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.describe.screen import read_screened
from latteflow.tasks.report.history import SPLIT_STAGES, History
from latteflow.tasks.report.scores import read_scores

_FUZZY = 20_000
"""Paths that are searched for what was probably meant."""


@dataclass(frozen=True)
class Guess:
    """A class that somebody saw in the image, and how sure they were (0 to 1)."""

    by: str
    name: str
    probability: float | None = None


@dataclass(frozen=True)
class Said:
    """A text about the image, or about a group that it is in."""

    kind: str
    text: str
    flags: Sequence[str]
    by: str
    weight: float | None = None
    """What it counts in training: 0 to 1; None where it was not screened."""


@dataclass(frozen=True)
class Lineage:
    """What a run knows of an image; ``artifacts`` holds fingerprints by the label of the stage."""

    key: str
    path: str
    sha256: str
    split: str
    shard: str = ""
    bytes: int = 0
    width: int = 0
    height: int = 0
    removed: bool = False
    duplicate_of: str | None = None
    refused: str = ""
    pseudo_labels: Sequence[Guess] = ()
    texts: Sequence[Said] = ()
    predictions: Sequence[Guess] = ()
    truth: str | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)


def newest_artifacts(history: History) -> dict[str, Artifact]:
    """By label: those of the newest complete run; without one, the newest of each stage."""
    found = history.newest_run()
    if found:
        return found
    for stage in history.inventory.stages:
        for split in ("train", "test") if stage in SPLIT_STAGES else ("train",):
            if (made := history.newest(stage, split)) is not None:
                found[f"{stage} {split}" if stage in SPLIT_STAGES else stage] = made.artifact
    return found


def lineage(domain: Domain, history: History, image: str) -> Lineage:
    """Follow an image of the newest run.

    Args:
        image: its path below the source or on this machine, its key, or the beginning of its key.

    Raises:
        DataError: there is no such image, or nothing was run yet.
    """
    artifacts = newest_artifacts(history)
    shards = {split: artifacts[f"shard {split}"] for split in ("train", "test") if f"shard {split}" in artifacts}
    if not shards:
        raise DataError(f"domain {domain.name!r} has no images yet; `latteflow run` makes shards of them")
    for split, images in shards.items():
        row = _find(read_quarantine(images), _names(domain, split, image))
        if row is not None:
            refused = f"{row['reason']}: {row['detail']}"
            own = {f"shard {split}": images.fingerprint}
            return Lineage(row["key"], row["path"], row["sha256"], split, refused=refused, artifacts=own)
        row = _find(read_index(images, removed=True), _names(domain, split, image))
        if row is not None:
            return _followed(domain, artifacts, split, row)
    paths = pl.concat(read_index(images).select("path") for images in shards.values())["path"].to_list()
    near = difflib.get_close_matches(image, paths[:_FUZZY], 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"its images have paths like {paths[0]!r}"
    raise DataError(f"domain {domain.name!r} has no image {image!r}; {hint}")


def _names(domain: Domain, split: str, image: str) -> list[str]:
    """What an image may be called in the index: as given, or its path on this machine below the source."""
    held_out = split == "test" and domain.evaluation is not None and domain.evaluation.source
    sources = held_out or domain.source
    names = [image, printable(image)]
    for number, source in enumerate(sources):
        if "://" not in source and (absolute := str(Path(image).absolute())).startswith(f"{source}/"):
            below = printable(absolute.removeprefix(f"{source}/"))
            names.append(f"{number}/{below}" if len(sources) > 1 else below)
    return names


def _find(table: pl.DataFrame, names: Sequence[str]) -> dict[str, Any] | None:
    found = table.filter(pl.col("path").is_in(list(names)))
    if not found.height and len(names[0]) >= 6:
        found = table.filter(pl.col("key").str.starts_with(names[0]))
        if found.height > 1:
            raise DataError(f"{names[0]!r} begins the keys of {found.height} images; give more of the key")
    # A file that changed has an image for each of its contents; the last one in the shards is the newest.
    return found.row(-1, named=True) if found.height else None


def _followed(domain: Domain, artifacts: Mapping[str, Artifact], split: str, row: Mapping[str, Any]) -> Lineage:
    key, images = row["key"], artifacts[f"shard {split}"]
    classes: Sequence[str] = domain.classes
    predictions: list[Guess] = []
    truth = None
    if (scores := artifacts.get("evaluate")) is not None:
        classes = read_scores(scores).classes
        for said in read_parquet(scores.read("predictions.parquet")).filter(pl.col("key") == key).iter_rows(named=True):
            truth = None if said["truth"] is None else classes[said["truth"]]
            methods = [name.removesuffix("_probability") for name in said if name.endswith("_probability")]
            predictions += [Guess(name, classes[said[name]], said[f"{name}_probability"]) for name in methods]
    used = [f"shard {split}", f"embed {split}", "describe", "group", "screen", "pair", "tune", "evaluate"]
    removed = read_parquet(images.read("removed.parquet")).filter(pl.col("key") == key).height > 0
    duplicates = read_parquet(images.read("duplicates.parquet")).filter(pl.col("key") == key)
    return Lineage(
        **{name: row[name] for name in ("key", "path", "sha256", "shard", "bytes", "width", "height")},
        split=split,
        removed=removed,
        duplicate_of=duplicates["duplicate_of"].item() if duplicates.height else None,
        pseudo_labels=list(_pseudo_labels(artifacts.get(f"embed {split}"), key, classes)),
        texts=list(_texts(artifacts, key, row["shard"])),
        predictions=predictions,
        truth=truth,
        artifacts={label: artifacts[label].fingerprint for label in used if label in artifacts},
    )


def _pseudo_labels(embedded: Artifact | None, key: str, classes: Sequence[str]) -> Iterator[Guess]:
    if embedded is None:
        return
    for row in read_parquet(embedded.read("zero_shot.parquet")).filter(pl.col("key") == key).iter_rows(named=True):
        for number, probability in zip(row["labels"], row["probabilities"], strict=True):
            if number < len(classes):  # fewer, if the domain file lost a class since
                yield Guess("zero-shot", classes[number], probability)


def _texts(artifacts: Mapping[str, Artifact], key: str, shard: str) -> Iterator[Said]:
    files = [("describe", f"{shard}.captions.parquet", "images"), ("group", "groups.parquet", "groups")]
    for stage, name, kind in files:
        if stage not in artifacts or name not in artifacts[stage].files:
            continue
        about = pl.col("member_keys").list.contains(key)
        screened = {}
        if (found := artifacts.get("screen")) is not None:
            rows = read_screened(found, kind).filter(about).iter_rows(named=True)
            screened = {(row["caption_key"], *row["member_keys"]): row for row in rows}
        for row in read_parquet(artifacts[stage].read(name)).filter(about).iter_rows(named=True):
            if row["text"] is None:
                continue
            own = screened.get((row["caption_key"], *row["member_keys"]), row)
            members = len(row["member_keys"])
            yield Said(
                kind="image" if members == 1 else f"group of {members}",
                text=row["text"],
                flags=own["flags"] or [],
                by=f"{row['model']} {row['revision'][:12]}".strip(),
                weight=own.get("weight"),
            )
