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
from latteflow.flows.parameters import MISTAKES, DomainOrFile, domain_flow
from latteflow.flows.pipeline import repaired
from latteflow.storage.artifacts import Artifact
from latteflow.storage.lease import Busy, lease
from latteflow.storage.shards import newest, read_index
from latteflow.storage.tables import read_parquet
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.report.history import History
from latteflow.tasks.ship.nights import Night, nights, remember
from latteflow.tasks.ship.promote import Decision, promote, read_champion

LATE = timedelta(hours=6)
"""A night that could not begin for so long is left to the next one."""


@dataclass(frozen=True)
class Found:
    """What a night found and did.

    Attributes:
        images: the `shard` stage of the training images.
        new, removed: images that came and went since the last run.
        retired: texts of the last run about images that went; they stay in the store, and nothing uses them.
        made: stages that ran; the others were cached.
        decision: about the challenger.
    """

    images: StageResult
    new: int
    removed: int
    retired: int
    made: tuple[str, ...]
    decision: Decision


@domain_flow(on_cancellation=[cancel_workers])
def retune(domain: DomainOrFile) -> Any:
    """Take in what is new, tune a challenger, and serve it if it is better than zero-shot and than the champion.

    Ends as *Skipped* if another run of the domain is under way, or if the night is long past; nothing piles up.
    However it ends, the domain's list of nights has a line more.
    """
    begun = datetime.now(UTC)
    try:
        state, found = _held(domain, begun)
    except MISTAKES as error:
        _remember(domain, begun, "Failed", str(error))
        raise
    _remember(domain, begun, state.name, state.message, found)
    return state


def _held(domain: Domain, begun: datetime) -> tuple[Any, Found | None]:
    """How the night ended, and what it found if it was held."""
    due = flow_run.scheduled_start_time
    if due is not None and begun - due > LATE:
        why = f"was due at {due:%Y-%m-%d %H:%M} UTC; left to the next night"
        return Completed(name="Skipped", message=why), None
    try:
        with lease(open_store(domain).objects, f"{domain.name}/lock", wait=False):
            found = repaired(_night, domain)
    except Busy as busy:
        return Completed(name="Skipped", message=str(busy)), None
    name = "Promoted" if found.decision.promote else "Kept" if found.made else "Unchanged"
    return Completed(name=name, message=found.decision.reason, data=found), found


def _remember(domain: Domain, begun: datetime, state: str, why: str, found: Found | None = None) -> None:
    store, served = open_store(domain), read_champion(domain)
    told: dict[str, Any] = {}
    if found is not None:
        counts = found.images.counts
        told = {name: getattr(found, name) for name in ("new", "removed", "retired", "made")}
        told |= {name: counts.get(name, 0) for name in ("images", "quarantined")}
    seconds = (datetime.now(UTC) - begun).total_seconds()
    at, version = begun.isoformat(timespec="seconds"), served.version if served else 0
    remember(store, domain.name, Night(at, state, why, round(seconds, 1), champion=version, **told))
    shown.nights(domain, nights(store, domain.name, newest=60))


def _night(domain: Domain) -> Found:
    store = open_store(domain)
    before = newest(store, domain.name, "train")
    described = History(store, domain.name).newest("describe")
    results = stages(domain)
    found = {each.label: each for each in results}
    now = store.open(found["shard train"].ref)
    was = _keys(before) if before else set()
    removed = was - _keys(now)
    return Found(
        images=found["shard train"],
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
