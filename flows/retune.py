"""retune: the nightly run of one domain.

What is new is sharded, described and grouped; a challenger is tuned, and takes the champion's place if it is better by
a rule that reads no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from prefect.runtime import flow_run
from prefect.states import Completed

from latteflow.flows import shown
from latteflow.flows.adapt import stages
from latteflow.flows.fanout import cancel_workers
from latteflow.flows.parameters import DomainOrFile, domain_flow
from latteflow.flows.pipeline import repaired
from latteflow.storage.artifacts import Artifact
from latteflow.storage.lease import Busy, lease
from latteflow.storage.shards import newest, read_index
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.ship.promote import Decision, promote

LATE = timedelta(hours=6)
"""A night that could not begin for so long is left to the next one."""


@dataclass(frozen=True)
class Night:
    """What a night found and did.

    Attributes:
        new, removed: images that came and went since the last run.
        retired: texts of the last run about images that went; they stay in the store, and nothing uses them.
        made: stages that ran; the others were cached.
        decision: about the challenger.
    """

    new: int
    removed: int
    retired: int
    made: tuple[str, ...]
    decision: Decision


@domain_flow(on_cancellation=[cancel_workers])
def retune(domain: DomainOrFile) -> Any:
    """Take in what is new, tune a challenger, and serve it if it is better than zero-shot and than the champion.

    Ends as *Skipped* if another run of the domain is under way, or if the night is long past; nothing piles up.
    """
    due = flow_run.scheduled_start_time
    if due is not None and datetime.now(UTC) - due > LATE:
        return Completed(name="Skipped", message=f"was due at {due:%Y-%m-%d %H:%M} UTC; left to the next night")
    try:
        with lease(open_store(domain).objects, f"{domain.name}/lock", wait=False):
            night = repaired(_night, domain)
    except Busy as busy:
        return Completed(name="Skipped", message=str(busy))
    shown.night(domain, night)
    name = "Promoted" if night.decision.promote else "Kept" if night.made else "Unchanged"
    return Completed(name=name, message=night.decision.reason, data=night)


def _night(domain: Domain) -> Night:
    store = open_store(domain)
    before = newest(store, domain.name, "train")
    described = History(store, domain.name).newest("describe")
    results = stages(domain)
    found = {each.label: each for each in results}
    now = store.open(found["shard train"].ref)
    was = _keys(before) if before else set()
    removed = was - _keys(now)
    return Night(
        new=len(_keys(now) - was),
        removed=len(removed),
        retired=_texts_about(described.artifact, removed) if described and removed else 0,
        made=tuple(each.label for each in results if not each.cached),
        decision=promote(domain, *(found[name] for name in ("shard train", "embed train", "screen", "tune"))),
    )


def _keys(shards: Artifact) -> set[str]:
    return set(read_index(shards)["key"])


def _texts_about(described: Artifact, keys: set[str]) -> int:
    tables = (read_parquet(described.read(name)) for name in described.names(".captions.parquet"))
    return sum(table.filter(pl.col("member_keys").list.first().is_in(list(keys))).height for table in tables)
