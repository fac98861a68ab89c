"""docs/python.md runs as it stands, from top to bottom, and says what the names are."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

import latteflow

DOCS = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_page_runs(domain: latteflow.Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {"some_images": sorted((tmp_path / "test").glob("*.png"))[:3]}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(compile(block, DOCS.name, "exec"), known)
    table, run = known["table"], known["run"]
    assert isinstance(table, pl.DataFrame) and table.height == 12 and isinstance(run, latteflow.Run)
    assert {"shard train", "embed test", "tune", "report"} <= {*run}
    assert [run["tune"].fingerprint] == [latteflow.newest(domain)["tune"].fingerprint]
    with pytest.raises(latteflow.StorageError, match="has no shards"):
        next(run["tune"].samples())
    with pytest.raises(latteflow.StorageError, match="has no table"):
        run["report"].frame()


def test_every_name_has_words() -> None:
    assert all(getattr(latteflow, name).__doc__ for name in latteflow.__all__)


def test_nothing_was_run(domain: latteflow.Domain) -> None:
    with pytest.raises(latteflow.DataError, match="no complete run"):
        latteflow.newest(domain)
