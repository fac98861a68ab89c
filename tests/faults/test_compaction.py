"""Ten thousand small parts of earlier versions: read, compacted by processes that are killed, and nothing is lost."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from faults.harness import Driver, Tally, difference, tree

from latteflow.storage.captions import CAPTION_SCHEMA, CaptionStore, caption_key, describer_id
from latteflow.storage.fingerprint import sha256
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import parquet

pytestmark = pytest.mark.slow
KILLED = -9
PARTS, TEXTS = 10_000, 7_000
WHO = describer_id({"kind": "image", "model": "m"})
LATER = {1: ("prompt", "sampling", "engine", "detail"), 2: ("prompt", "sampling", "engine", "detail"), 3: ()}
"""Columns that a version has not; the first one has no generation either."""


def write_part(folder: Path, number: int) -> tuple[str, str]:
    """A part with one text, as one of the three versions wrote it; key and text. Some have a newer text for a key."""
    version, anew = 1 + number % 3, number >= TEXTS
    if anew:
        version = 2 + number % 2  # the first version asked for nothing anew
    members = [sha256(f"{number % TEXTS}".encode())]
    text = f"text {number}"
    row = {
        "caption_key": caption_key(WHO, members), "kind": "image", "members": members, "text": text, "flags": [],
        "finish_reason": "stop", "prompt_tokens": 3, "output_tokens": 4, "model": "m", "revision": "1",
        "prompt_id": "p", "prompt": "", "sampling": "{}", "engine": "e", "detail": None,
    }  # fmt: skip
    table = pl.DataFrame([row], schema=CAPTION_SCHEMA).drop(LATER[version])
    if version > 1:
        table = table.with_columns(generation=pl.lit(int(anew), pl.Int32))
    data = parquet(table)
    (folder / f"{sha256(data)[:32]}{f'.v{version}' if version > 1 else ''}.parquet").write_bytes(data)
    return row["caption_key"], text


@pytest.fixture
def store(quick: Path) -> Path:
    folder = quick / "store/captions" / WHO
    folder.mkdir(parents=True)
    return quick / "store"


def texts(store: Path) -> list[tuple[str, str]]:
    """What a reader that begins now sees."""
    found = CaptionStore(ObjectStore(str(store))).scan(WHO).select("caption_key", "text").collect()
    return sorted(found.iter_rows())


def compact_twice(driver: Driver, **command: Any) -> None:
    """Files of one text are mostly about the file: the first time gives few parts, and they are small."""
    for _ in range(2):
        driver.finish(work="compact", **command)


def test_ten_thousand_small_parts_and_kills_while_they_are_compacted(
    driver: Driver, small: Path, store: Path, quick: Path, tally: Tally
) -> None:
    folder = store / "captions" / WHO
    said = dict(write_part(folder, number) for number in range(PARTS))  # a later text takes the place of an earlier one
    assert len(said) == TEXTS and len(list(folder.iterdir())) == PARTS
    assert texts(store) == sorted(said.items())
    captions = CaptionStore(ObjectStore(str(store)))
    assert captions.known(WHO, [*said, sha256(b"unknown")]) == said.keys()

    command = {"domain": small, "journal": quick / "journal"}
    shutil.copytree(store, quick / "whole")
    compact_twice(driver, domain=small, store=quick / "whole")
    dice = random.Random(19)
    kills = [
        {"kill": {"moment": "half", "commit": 0}},  # in the directory
        {"kill": {"moment": "before", "commit": 1}},  # the directory is there, and its part is not
        {"kill": {"moment": "half", "commit": 1}},
        {"seconds": dice.uniform(0.2, 1.0)},  # while it reads
        {"kill": {"moment": "after", "commit": 1}},  # the part is there, and all old ones
        {"kill": {"moment": "after", "commit": dice.randrange(1000, 3000)}},  # some of the old ones are gone
        {"kill": {"moment": "before", "commit": dice.randrange(1000, 3000)}},
        {"kill": {"moment": "before", "commit": 1}},
    ]
    for how in kills:
        tally.inflicted["kill compaction"] += 1
        assert driver.run(work="compact", **command, store=store, **how)["statuses"] == [KILLED], how
        assert texts(store) == sorted(said.items())
        tally.survived["kill compaction"] += 1
    assert 2 < len(list(folder.glob("*.parquet"))) < PARTS
    compact_twice(driver, **command, store=store)
    assert texts(store) == sorted(said.items())
    assert CaptionStore(ObjectStore(str(store))).known(WHO, said) == said.keys()
    assert difference(tree(ObjectStore(str(store))), tree(ObjectStore(str(quick / "whole")))) == {}
    assert len(list(folder.glob("*.parquet"))) == len(list(folder.glob("*.keys"))) == 1
