"""What the report adds up."""

from pathlib import Path

import polars as pl
import pytest

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.captions import CAPTION_SCHEMA
from latteflow.storage.objects import ObjectStore
from latteflow.storage.tables import parquet
from latteflow.tasks.report.report import _tokens


@pytest.mark.parametrize("stage", ["describe", "group", "pair"])
def test_tokens_are_more_than_32_bits_hold(tmp_path: Path, stage: str) -> None:
    kinds = {name: CAPTION_SCHEMA[name] for name in ("prompt_tokens", "output_tokens")}
    counts = pl.DataFrame({"prompt_tokens": [2**31 - 1, 2, None], "output_tokens": [2**31 - 1] * 3}, schema=kinds)
    writer = ArtifactStore(ObjectStore(str(tmp_path))).writer("d", stage, 1, {})
    for part in ("shard-00000", "shard-00001"):
        writer.put(part, {"part": part}, {f"{part}.captions.parquet": parquet(counts)})
    writer.put("state", {}, {"state.parquet": parquet(pl.DataFrame({"key": ["a"]}))})
    assert _tokens(writer.finish({})) == (2 * (2**31 + 1), 6 * (2**31 - 1))
