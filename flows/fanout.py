"""Work of one run that other work pools do: texts and features by ranges of shards, and training on machines for that.

The store is the truth: what is missing there is asked for, whoever asked before. Prefect starts the runs, shows them,
and says when they ended; one that did not end well is begun again, and makes only what is still missing.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from latteflow.models.settings import LanguageModelSettings, SidecarSettings
from latteflow.storage.errors import DataError
from latteflow.tasks.core.domain import Domain, WorkerSettings
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules
from latteflow.tasks.describe.describe import describe, missing_texts, tidy_texts
from latteflow.tasks.describe.group import group
from latteflow.tasks.describe.pair import pair
from latteflow.tasks.ingest.embed import embed, missing_features
from latteflow.tasks.tune.tune import tune

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


@dataclass(frozen=True)
class Work:
    """What a pool does for some stages, which then find it in the store.

    Attributes:
        name: of the flow and of its deployment, see prefect.yaml.
        stages: that wait for it.
        inputs: names that the flow has for the artifacts that these stages are given, in their order.
        missing: what each shard lacks; None: the work is one run.
        unit: of that; the setting of `workers` that is called so says how many go into one run.
    """

    name: str
    stages: tuple[Callable[..., StageResult], ...]
    inputs: tuple[str, ...]
    missing: Callable[..., list[int]] | None = None
    unit: str = ""

    @property
    def deployment(self) -> str:
        return f"{self.name}/{self.name}"


def _missing_texts(domain: Domain, images: StageResult, features: StageResult) -> list[int]:
    tidy_texts(domain, features)
    return missing_texts(domain, images, features)


FEATURES = Work("embed", (embed,), ("images",), missing_features, "images")
TEXTS = Work("describe", (describe, group), ("images", "features"), _missing_texts, "texts")
PAIRS = Work("pair", (pair,), ("images", "features", "screened"))
MODELS = Work("tune", (tune,), ("images", "features", "screened", "paired"))


def work_before(stage: Callable[..., StageResult], domain: Domain) -> Work | None:
    """What a pool is to do before a stage; texts that come from the CLIP or from rules are no work for one."""
    workers = domain.workers
    if workers is None:
        return None
    describer = domain.of_pairs().describer if stage is pair else domain.describer
    asked = isinstance(describer, LanguageModelSettings | SidecarSettings)
    given = {FEATURES: workers.images is not None, TEXTS: asked, PAIRS: asked, MODELS: workers.train}
    return next((work for work, is_given in given.items() if is_given and stage in work.stages), None)


def done_by_pool(work: Work, domain: Domain, *results: StageResult) -> dict[str, int]:
    """Have what is missing made by a pool, range by range or in one run, and wait for it.

    Args:
        results: what the stages that need it are given.

    Returns:
        How much was ``missing``, and in how many ``runs`` it was made.

    Raises:
        WorkersFailed: a part of it failed in every attempt.
    """
    if _is_made(work, domain, results):
        return {"missing": 0, "runs": 0}
    workers = domain.workers or WorkerSettings()
    given = {"domain": domain.model_dump(mode="json", exclude_unset=True)}
    given |= {name: asdict(each.ref) for name, each in zip(work.inputs, results, strict=False)}
    split = str(open_store(domain).open(results[0].ref, listed=False).inputs["split"])
    with get_client(sync_client=True) as client:
        pool = _Pool(client, domain, work, split)
        if work.missing is None:
            if not pool.adopt(given):
                pool.add(Attempt(f"{work.name}-{domain.name}", given))
            return {"missing": 1, "runs": pool.wait()}
        missing = work.missing(domain, *results)
        total = sum(missing)
        for first, last in pool.adopt(given):
            missing[first:last] = [0] * (last - first)
        for found in ranges(missing, getattr(workers, work.unit)):
            words = {**given, "first": found.start, "last": found.stop}
            name = f"{work.name}-{domain.name}-{found.start}-{found.stop}"
            pool.add(Attempt(name, words, sum(missing[found.start : found.stop])))
        with _progress(f"{domain.name}-{work.unit}", split, total) as told:
            return {"missing": total, "runs": pool.wait(told)}


def ranges(missing: Sequence[int], most: int) -> list[range]:
    """Stretches of shards that lack about so much each; shards that lack nothing are skipped where that is possible.

    Args:
        missing: of each shard.
        most: of a stretch; a shard that lacks more is one of its own.
    """
    found: list[range] = []
    total = 0
    for number, count in enumerate(missing):
        if not count:
            continue
        if found and total + count <= most:
            found[-1], total = range(found[-1].start, number + 1), total + count
        else:
            found.append(range(number, number + 1))
            total = count
    return found


def cancel_workers(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """Hook: whoever cancels a run cancels what it gave to other pools."""
    with get_client(sync_client=True) as client:
        own = FlowRunFilter.model_validate({"tags": {"all_": [_tag(flow_run.id)]}, **_ALIVE})
        for run in client.read_flow_runs(flow_run_filter=own):
            client.set_flow_run_state(run.id, Cancelling(message=f"cancelled with {flow_run.name}"))


_ALIVE: dict[str, Any] = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED"]}}}


class _Pool:
    """Runs of one deployment for a split of one domain, never more than ``workers.runs`` at once."""

    def __init__(self, client: SyncPrefectClient, domain: Domain, work: Work, split: str) -> None:
        from prefect.runtime import flow_run

        self._client, self._deployment, self._workers = client, work.deployment, domain.workers or WorkerSettings()
        where = hashlib.sha256(f"{domain.store}\n{domain.name}".encode()).hexdigest()[:12]
        # Splits are embedded side by side, and do not take each other's runs for those of an earlier attempt.
        self._mine = f"{work.name} {split} of {domain.name} {where}"
        self._tags = [self._mine, *([_tag(flow_run.id)] if flow_run.id else [])]
        self._waiting: deque[Attempt] = deque()
        self._open: dict[UUID, Attempt] = {}

    def add(self, attempt: Attempt) -> None:
        self._waiting.append(attempt)

    def adopt(self, given: Mapping[str, Any]) -> list[tuple[int, int]]:
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

    def wait(self, on_done: Callable[[int], None] = lambda size: None) -> int:
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
            f"{run.name} failed {attempt.number} times, at last as {why}. What was made is kept: look at the run's "
            "log, and run again"
        )


def _is_made(work: Work, domain: Domain, results: Sequence[StageResult]) -> bool:
    try:
        with rules(make=False):
            for stage in work.stages:
                stage(domain, *results)
    except NotMade:
        return False
    return True


def _waits(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_scheduled()


def _tag(flow_run_id: Any) -> str:
    return f"run {flow_run_id}"


@contextmanager
def _progress(what: str, split: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in the UI: what is there of what was missing."""
    key = what.replace("_", "-") + ("" if split == "train" else f"-{split}")
    artifact: Any = create_progress_artifact(0.0, key=key, description=f"{total} {what} by the pool")
    done = 0

    def on_done(size: int) -> None:
        nonlocal done
        done += size
        update_progress_artifact(artifact, min(100.0, 100.0 * done / max(total, 1)))

    yield on_done
    update_progress_artifact(artifact, 100.0)
