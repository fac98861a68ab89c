"""Work of one run that other work pools do: ranges of shards on GPU workers, training on machines for that.

The store is the truth: what is missing there is asked for, whoever asked before. Prefect starts the runs, shows them,
and says when they ended; one that did not end well is begun again, and asks only for texts that are still missing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain, WorkerSettings
from latteflow.tasks.core.stage import NotMade, StageResult, rules
from latteflow.tasks.describe.describe import describe, missing_texts, tidy_texts
from latteflow.tasks.describe.group import group

DESCRIBE, PAIR, TUNE = "describe/describe", "pair/pair", "tune/tune"
"""Deployments, see prefect.yaml."""
_LOOK_S = (1.0, 15.0)
"""Between two looks at the runs; at first and at last."""
_LATE_S = 120.0
log = logging.getLogger("latteflow.flows")


class WorkersFailed(DataError):
    """Work that was given to a pool was not done."""


@dataclass(frozen=True)
class Attempt:
    """One run of a deployment, for a part of the work."""

    name: str
    parameters: dict[str, Any]
    size: int = 1
    number: int = 1


def write_on_pool(domain: Domain, images: StageResult, features: StageResult) -> dict[str, int]:
    """Have the missing texts written by the pool `gpu`, range by range, and wait for them.

    Returns:
        ``texts`` that were missing, and in how many ``runs`` they were written.

    Raises:
        WorkersFailed: a range failed in every attempt.
    """
    workers = domain.workers or WorkerSettings()
    if _is_made(domain, images, features):
        return {"texts": 0, "runs": 0}
    given = {"domain": _as_given(domain), "images": asdict(images.ref), "features": asdict(features.ref)}
    with get_client(sync_client=True) as client:
        pool = _Pool(client, domain, DESCRIBE, workers)
        tidy_texts(domain, features)
        missing = missing_texts(domain, images, features)
        total = sum(missing)
        for first, last in pool.adopt(given):
            missing[first:last] = [0] * (last - first)
        for found in ranges(missing, workers.texts):
            words = {**given, "first": found.start, "last": found.stop}
            name = f"describe-{domain.name}-{found.start}-{found.stop}"
            pool.add(Attempt(name, words, sum(missing[found.start : found.stop])))
        with _progress(domain, total) as told:
            runs = pool.wait(told)
    return {"texts": total, "runs": runs}


def pairs_on_pool(domain: Domain, images: StageResult, features: StageResult, screened: StageResult) -> None:
    """Have the texts about pairs written by the pool `gpu`, in one run; the stage `pair` then finds its artifact.

    Raises:
        WorkersFailed: that failed.
    """
    _stage_on_pool(PAIR, domain, images=images, features=features, screened=screened)


def train_on_pool(
    domain: Domain, images: StageResult, features: StageResult, screened: StageResult, paired: StageResult | None = None
) -> None:
    """Have the models trained by the pool `train`; the stage `tune` then finds them.

    Raises:
        WorkersFailed: that failed.
    """
    more = {"paired": paired} if paired else {}
    _stage_on_pool(TUNE, domain, images=images, features=features, screened=screened, **more)


def _stage_on_pool(deployment: str, domain: Domain, **inputs: StageResult) -> None:
    given = {"domain": _as_given(domain), **{name: asdict(each.ref) for name, each in inputs.items()}}
    with get_client(sync_client=True) as client:
        pool = _Pool(client, domain, deployment, domain.workers or WorkerSettings())
        if not pool.adopt(given):
            pool.add(Attempt(f"{deployment.split('/')[0]}-{domain.name}", given))
        pool.wait(lambda done: None)


def ranges(missing: Sequence[int], most: int) -> list[range]:
    """Stretches of shards with about so many missing texts each; shards without any are skipped where that is possible.

    Args:
        missing: texts of each shard.
        most: texts of a stretch; a shard that has more is one of its own.
    """
    found: list[range] = []
    texts = 0
    for number, count in enumerate(missing):
        if not count:
            continue
        if found and texts + count <= most:
            found[-1], texts = range(found[-1].start, number + 1), texts + count
        else:
            found.append(range(number, number + 1))
            texts = count
    return found


def cancel_workers(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """Hook: whoever cancels a run cancels what it gave to other pools."""
    with get_client(sync_client=True) as client:
        own = FlowRunFilter.model_validate({"tags": {"all_": [_tag(flow_run.id)]}, **_ALIVE})
        for run in client.read_flow_runs(flow_run_filter=own):
            client.set_flow_run_state(run.id, Cancelling(message=f"cancelled with {flow_run.name}"))


_ALIVE: dict[str, Any] = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED"]}}}


class _Pool:
    """Runs of one deployment for one domain, never more than ``workers.runs`` at once."""

    def __init__(self, client: SyncPrefectClient, domain: Domain, deployment: str, workers: WorkerSettings) -> None:
        from prefect.runtime import flow_run

        self._client, self._deployment, self._workers = client, deployment, workers
        where = hashlib.sha256(f"{domain.store}\n{domain.name}".encode()).hexdigest()[:12]
        self._mine = f"{deployment.split('/')[0]} of {domain.name} {where}"
        self._tags = [self._mine, *([_tag(flow_run.id)] if flow_run.id else [])]
        self._waiting: deque[Attempt] = deque()
        self._open: dict[UUID, Attempt] = {}

    def add(self, attempt: Attempt) -> None:
        self._waiting.append(attempt)

    def adopt(self, given: dict[str, Any]) -> list[tuple[int, int]]:
        """Take over runs that an earlier attempt of this run left alive; those about other artifacts are cancelled.

        Returns:
            first and last shard of each.
        """
        alive = FlowRunFilter.model_validate({"tags": {"all_": [self._mine]}, **_ALIVE})
        found = []
        for run in self._client.read_flow_runs(flow_run_filter=alive):
            words = run.parameters
            if all(words.get(name) == value for name, value in given.items()):
                first, last = words.get("first", 0), words.get("last", 1)
                self._open[run.id] = Attempt(run.name, words)
                found.append((first, last))
            else:
                self._client.set_flow_run_state(run.id, Cancelling(message="the domain has changed since"))
        if found:
            log.info("%s: %d runs of an earlier attempt are still at work", self._mine, len(found))
        return found

    def wait(self, on_done: Any) -> int:
        """Until everything is done; returns how many runs that took.

        Raises:
            WorkersFailed: a part of the work failed in every attempt.
        """
        runs, pause, begun, told = 0, _LOOK_S[0], time.monotonic(), False
        while self._waiting or self._open:
            while self._waiting and len(self._open) < self._workers.runs:
                attempt = self._waiting.popleft()
                self._open[self._start(attempt)] = attempt
            time.sleep(pause)
            pause = min(pause * 1.3, _LOOK_S[1])
            states = self._states()
            ended = [run for run in states if run.state is not None and run.state.is_final()]
            for run in ended:
                attempt = self._open.pop(run.id)
                runs += 1
                if run.state is not None and run.state.is_completed():
                    on_done(attempt.size)
                else:
                    self._again(attempt, run)
            if ended:
                pause = _LOOK_S[0]
            elif not told and time.monotonic() - begun > _LATE_S and all(_waits(run) for run in states):
                log.warning("no worker has taken any of %d runs of %s; start one", len(states), self._deployment)
                told = True
        return runs

    def _start(self, attempt: Attempt) -> UUID:
        run: Any = run_deployment(
            self._deployment, parameters=attempt.parameters, flow_run_name=attempt.name, timeout=0, tags=self._tags
        )
        return UUID(str(run.id))

    def _states(self) -> list[FlowRun]:
        # All in one request, however many they are.
        wanted = FlowRunFilter.model_validate({"id": {"any_": list(self._open)}})
        return self._client.read_flow_runs(flow_run_filter=wanted, limit=200)

    def _again(self, attempt: Attempt, run: FlowRun) -> None:
        state = run.state
        why = f"{state.name if state else ''}: {(state.message or '').strip() if state else ''}"
        if attempt.number < self._workers.attempts:
            log.warning("%s ended as %s; beginning again", run.name, why)
            self._waiting.append(replace(attempt, number=attempt.number + 1))
            return
        for other in self._open:
            self._client.set_flow_run_state(other, Cancelling(message=f"{run.name} failed"))
        raise WorkersFailed(
            f"{run.name} failed {attempt.number} times, at last as {why}. What was written is kept: look at the run's "
            "log, and run again"
        )


def _is_made(domain: Domain, images: StageResult, features: StageResult) -> bool:
    try:
        with rules(make=False):
            describe(domain, images, features)
            group(domain, images, features)
    except NotMade:
        return False
    return True


def _as_given(domain: Domain) -> dict[str, Any]:
    return domain.model_dump(mode="json", exclude_unset=True)


def _waits(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_scheduled()


def _tag(flow_run_id: Any) -> str:
    return f"run {flow_run_id}"


@contextmanager
def _progress(domain: Domain, total: int) -> Iterator[Any]:
    """A bar in the UI: texts that are there of those that were missing."""
    key = f"{domain.name.replace('_', '-')}-texts"
    artifact: Any = create_progress_artifact(0.0, key=key, description=f"{total} texts by the pool")
    done = 0

    def on_done(size: int) -> None:
        nonlocal done
        done += size
        update_progress_artifact(artifact, min(100.0, 100.0 * done / max(total, 1)))

    yield on_done
    update_progress_artifact(artifact, 100.0)
