"""adapt: one domain, all stages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefect import Task, flow
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from storage.errors import Damaged
from tasks.describe import describe
from tasks.domain import Domain
from tasks.embed import embed
from tasks.evaluate import evaluate
from tasks.group import group
from tasks.report import publish, report
from tasks.shard import shard
from tasks.stage import StageResult
from tasks.tune import tune

log = logging.getLogger("latteflow.flows")

Run = Callable[..., Any]
"""How a stage is called: here and now, or as a Prefect task whose result is still to come."""


def pipeline(domain: Domain, run: Run) -> list[Any]:
    """The graph, and nothing else: which stage feeds which."""
    images = run(shard, domain, "train")
    features = run(embed, domain, images)
    texts = run(describe, domain, images, features)
    groups = run(group, domain, images, features)
    tuned = run(tune, domain, images, features, texts, groups)

    unseen, unseen_features = images, features
    if domain.evaluation and domain.evaluation.source:
        unseen = run(shard, domain, "test")
        unseen_features = run(embed, domain, unseen)
    scores = run(evaluate, domain, unseen, unseen_features, features, tuned)
    page = run(report, domain, images, features, texts, groups, tuned, unseen, unseen_features, scores)
    return [images, unseen, features, unseen_features, texts, groups, tuned, scores, page]


def run_plainly(domain: Domain) -> list[StageResult]:
    """All stages in this process, without Prefect; finished work is taken from the store."""
    return _finish(domain, pipeline(domain, lambda stage, *args: stage(*args)))


@flow(name="adapt", flow_run_name="adapt-{domain.name}")
def adapt(domain: Domain) -> list[StageResult]:
    """All stages as Prefect tasks; those that do not wait for each other run side by side."""
    return _finish(domain, [future.result() for future in pipeline(domain, _submit)])


def repaired(run: Callable[[Domain], list[StageResult]], domain: Domain, attempts: int = 3) -> list[StageResult]:
    """Run, and run again where a stored file turned out to be damaged: it was set aside and is made anew."""
    for _ in range(attempts - 1):
        try:
            return run(domain)
        except Damaged as error:
            log.warning("%s", error)
    return run(domain)


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


def _finish(domain: Domain, results: list[StageResult]) -> list[StageResult]:
    publish(domain, scores=results[-2], page=results[-1])
    return list(dict.fromkeys(results))
