"""adapt: one domain, all stages, as a Prefect flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows.pipeline import pipeline
from tasks.domain import Domain
from tasks.report import publish
from tasks.stage import StageResult


@flow(name="adapt", flow_run_name="adapt-{domain.name}")
def adapt(domain: Domain) -> list[StageResult]:
    """All stages as Prefect tasks; those that do not wait for each other run side by side."""
    results = [future.result() for future in pipeline(domain, _submit)]
    publish(domain, scores=results[-2], page=results[-1])
    return list(dict.fromkeys(results))


def _submit(stage: Callable[..., StageResult], *args: Any) -> Any:
    # Our store decides what is cached; Prefect's own cache keys cover neither helpers nor models.
    def skin(*inputs: Any) -> Any:
        result = stage(*inputs)
        if result.cached:
            return Completed(name="Cached", message=result.ref.fingerprint, data=result)
        return result

    split = f"-{args[1]}" if isinstance(args[1], str) else ""
    thin = Task(skin, name=stage.__name__, task_run_name=f"{stage.__name__}{split}", cache_policy=NO_CACHE)
    return thin.submit(*args)
