"""adapt: one domain, all stages, as a Prefect flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from latteflow.flows import shown
from latteflow.flows.fanout import PAIRS, TEXTS, Work, cancel_workers, done_by_pool, work_before
from latteflow.flows.parameters import DomainOrFile, domain_flow, told
from latteflow.flows.pipeline import pipeline, repaired
from latteflow.storage.lease import lease
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.progress import Log, watch
from latteflow.tasks.core.stage import StageResult, open_store
from latteflow.tasks.describe.texts import collecting
from latteflow.tasks.report.history import SPLIT_STAGES
from latteflow.tasks.report.report import publish
from latteflow.tasks.tune.check import check_models


@domain_flow(on_cancellation=[cancel_workers])
def adapt(domain: DomainOrFile) -> list[StageResult]:
    """Adapt a CLIP model to one image domain, without labels; finished work is taken from the store.

    One run for each domain at a time: another waits until this one has ended.
    """
    with lease(open_store(domain).objects, f"{domain.name}/lock", wait=True):
        return repaired(stages, domain)


def stages(domain: Domain) -> list[StageResult]:
    """All stages as tasks of the flow that is running; those that do not wait for each other run side by side."""
    check_models(domain)
    submit = _Submit()
    futures = pipeline(domain, submit)
    for future in submit.futures:  # in order: what failed says why, what came after it only that it did not begin
        future.result()
    results = [future.result() for future in futures]
    publish(domain, scores=results[-2], page=results[-1])
    found = list(dict.fromkeys(results))
    shown.stages(domain, found)
    return found


class _Submit:
    """How a stage is called under Prefect: as a task, after what other pools do for it."""

    def __init__(self) -> None:
        self.futures: list[Any] = []
        """All that were submitted, none before those that it waits for."""
        self._elsewhere: dict[tuple[Any, ...], Any] = {}
        self._splits: dict[int, str] = {}

    def __call__(self, stage: Callable[..., StageResult], domain: Domain, *args: Any) -> Any:
        split = args[0] if isinstance(args[0], str) else self._splits[id(args[0])]
        end = f"-{split}" if stage.__name__ in SPLIT_STAGES else ""
        label = f"{stage.__name__}{end}"
        work = work_before(stage, domain)
        before = [self._first(work, f"{domain.name}-{work.name}-on-pool{end}", domain, *args)] if work else None
        task = _task(_skin(stage, label), f"{domain.name}-{label}", stage.__name__)
        self.futures.append(task.submit(domain, *args, wait_for=before))
        self._splits[id(self.futures[-1])] = split
        return self.futures[-1]

    def _first(self, work: Work, run_name: str, domain: Domain, *args: Any) -> Any:
        """The task that has the work done, once for all stages that wait for it."""
        if (work, *args) not in self._elsewhere:
            task = _task(done_by_pool, run_name, f"{work.name}-on-pool")
            self._elsewhere[work, *args] = task.submit(work, domain, *args)
            self.futures.append(self._elsewhere[work, *args])
        return self._elsewhere[work, *args]


def _skin(stage: Callable[..., StageResult], label: str) -> Callable[..., Any]:
    def skin(domain: Domain, *inputs: Any) -> Any:
        watch(Log(), shown.Bar(domain, label))
        if work_before(stage, domain) in (TEXTS, PAIRS):
            with collecting():
                result = stage(domain, *inputs)
        else:
            result = stage(domain, *inputs)
        if result.cached:
            return Completed(name="Cached", message=result.ref.fingerprint, data=result)
        return result

    return skin


def _task(work: Callable[..., Any], run_name: str, name: str) -> Task[..., Any]:
    # Our store decides what is cached; Prefect's own cache keys cover neither helpers nor models.
    return Task(told(work), name=name, task_run_name=run_name, cache_policy=NO_CACHE)
