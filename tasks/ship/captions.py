"""captions: the texts of a run as a folder to share: Parquet that Hugging Face ``datasets`` reads, and a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from latteflow.storage.artifacts import Artifact
from latteflow.storage.errors import DataError
from latteflow.storage.folders import check_place, whole_folder
from latteflow.storage.shards import read_index
from latteflow.storage.tables import parquet, read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe.pair import read_pairs
from latteflow.tasks.describe.screen import read_screened
from latteflow.tasks.ship.card import caption_card

_CARD, _ALWAYS, _SOMETIMES = "README.md", ("images", "groups"), ("classes", "pairs")
_OF_ALL = (
    "text", "flags", "finish_reason", "prompt_tokens", "output_tokens", "model", "revision", "prompt_id", "prompt",
    "sampling", "engine", "detail",
)  # fmt: skip


def write_captions(domain: Domain, stages: Mapping[str, StageResult], folder: Path) -> dict[str, int]:
    """Write the texts that a run has, each kind as a table, and README.md.

    Files: ``images.parquet``, ``groups.parquet`` and, where there are such texts, ``classes.parquet`` and
    ``pairs.parquet``; the card says what the columns are.

    Args:
        stages: by label: shard train, describe, group, screen and, if the domain compares, pair.
        folder: new, empty, or with texts that were written before, whose place the new ones take when they are whole.

    Returns:
        How many texts of each kind.

    Raises:
        DataError: the folder holds other things, or there can be none.
    """
    _check(folder)
    store = open_store(domain)
    found = {label: store.open(stage.ref) for label, stage in stages.items()}
    paths = read_index(found["shard train"], removed=True).select("key", "path")
    tables = {name: _told(domain, table, paths) for name, table in _tables(found).items()}
    fingerprints = {label: artifact.fingerprint for label, artifact in found.items()}
    with whole_folder(folder) as new:
        for name, table in tables.items():
            (new / f"{name}.parquet").write_bytes(parquet(table))
        (new / _CARD).write_text(caption_card(domain, tables, fingerprints), encoding="utf-8")
    return {name: table.height for name, table in tables.items()}


def _check(folder: Path) -> None:
    check_place(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    always, sometimes = ({f"{kind}.parquet" for kind in kinds} for kinds in (_ALWAYS, _SOMETIMES))
    is_earlier = always | {_CARD} <= names
    others = names - (always | sometimes | {_CARD} if is_earlier else set())
    if others:
        raise DataError(f"folder {folder} holds {min(others)!r} that is not of texts; give a new or empty folder")


def _tables(found: Mapping[str, Artifact]) -> dict[str, pl.DataFrame]:
    """The texts of each kind as the stages keep them; ``label`` is a number of a class, ``keys`` are images."""
    described, keys = found["describe"], pl.col("member_keys").alias("keys")
    said = {
        "images": pl.concat([read_parquet(described.read(name)) for name in described.names(".captions.parquet")]),
        "groups": read_parquet(found["group"].read("groups.parquet")),
    }
    for kind, table in said.items():  # the screen keeps the order of the rows
        screened = read_screened(found["screen"], kind).select("flags", "weight", "label")
        said[kind] = table.with_columns(keys, *screened.get_columns())
    if "classes.parquet" in described.files:
        said["classes"] = read_parquet(described.read("classes.parquet"))
    if "pair" in found:
        said["pairs"] = read_pairs(found["pair"]).with_columns(keys=pl.concat_list("first", "second"))
    return said


def _told(domain: Domain, table: pl.DataFrame, paths: pl.DataFrame) -> pl.DataFrame:
    """With paths and class names, and without what only the store needs."""
    own = [name for name in ("weight", "status", "rule", "raw") if name in table.columns]
    first = []
    if "keys" in table.columns:
        of_row = table.select("keys").with_row_index("row").explode("keys")
        named = of_row.join(paths, left_on="keys", right_on="key", how="left", maintain_order="left")
        lists = named.group_by("row", maintain_order=True).agg(paths="path")
        table, first = table.with_columns(lists["paths"]), ["paths", "keys"]
    if "label" in table.columns:
        table = table.with_columns(pl.Series("class", [domain.classes[label] for label in table["label"]]))
        first.append("class")
    return table.select(*first, *_OF_ALL, *own)
