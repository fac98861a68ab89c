"""The graph of one domain, walked in this process. No Prefect here: a cached run should not wait for its import."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from latteflow.flows.errors import UsageError
from latteflow.storage.errors import Damaged, DataError
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules, seconds_taken
from latteflow.tasks.describe.describe import describe
from latteflow.tasks.describe.group import group
from latteflow.tasks.describe.pair import pair
from latteflow.tasks.describe.screen import screen
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import Split, shard
from latteflow.tasks.report.evaluate import evaluate
from latteflow.tasks.report.history import SPLIT_STAGES, History
from latteflow.tasks.report.report import publish, report
from latteflow.tasks.tune.check import check_models
from latteflow.tasks.tune.select import select
from latteflow.tasks.tune.tune import tune

T = TypeVar("T")
log = logging.getLogger("latteflow.flows")

Run = Callable[..., Any]
"""How a stage is called: here and now, as a Prefect task, or not at all, to see the graph."""

STAGES = ("shard", "embed", "describe", "group", "screen", "pair", "tune", "select", "evaluate", "report")
TUNING = STAGES[: STAGES.index("tune") + 1]
"""Those that the models come from."""


def pipeline(domain: Domain, run: Run) -> list[Any]:
    """The graph, and nothing else: which stage feeds which."""
    images = run(shard, domain, "train")
    features = run(embed, domain, images)
    texts = run(describe, domain, images, features)
    groups = run(group, domain, images, features)
    screened = run(screen, domain, images, features, texts, groups)
    pairs = [run(pair, domain, images, features, screened)] if domain.compares else []
    tuned = run(tune, domain, images, features, screened, *pairs)
    selected = run(select, domain, images, features, screened, tuned)

    unseen, unseen_features = images, features
    if domain.evaluation and domain.evaluation.source:
        unseen = run(shard, domain, "test")
        unseen_features = run(embed, domain, unseen)
    general = []
    if domain.evaluation and domain.evaluation.general:
        others = run(shard, domain, "general")
        general = [others, run(embed, domain, others)]
    scores = run(evaluate, domain, unseen, unseen_features, images, features, tuned, *general)
    made = [images, unseen, features, unseen_features, texts, groups, screened, *pairs, tuned, selected]
    page = run(report, domain, *made, *general, scores)
    return [*made, *general, scores, page]


@dataclass(frozen=True, eq=False)
class Step:
    """A stage in the graph, not called yet; ``args`` are those after the domain: a split, and the steps before."""

    stage: Callable[..., StageResult]
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.stage.__name__

    @property
    def label(self) -> str:
        return f"{self.name} {self.split}" if self.name in SPLIT_STAGES else self.name

    @property
    def feeders(self) -> list[Step]:
        return list(dict.fromkeys(arg for arg in self.args if isinstance(arg, Step)))

    @property
    def split(self) -> Split:
        """Of the images that this step is about."""
        return self.feeders[0].split if self.feeders else self.args[0]

    def call(self, domain: Domain, done: Callable[[Step], StageResult]) -> StageResult:
        """Run the stage on what the steps before it came to."""
        return self.stage(domain, *(done(arg) if isinstance(arg, Step) else arg for arg in self.args))


def graph(domain: Domain) -> list[Step]:
    """The steps of a domain, each after those it needs."""
    return list(dict.fromkeys(pipeline(domain, lambda stage, domain, *args: Step(stage, args))))


def run_plainly(
    domain: Domain, *, start: str | None = None, only: str | None = None, refresh: Iterable[str] = ()
) -> list[StageResult]:
    """The stages in this process, without Prefect; finished work is taken from the store.

    Args:
        start: run this stage and what depends on it. Everything else is taken as it is: the images are those of the
            newest `shard` artifact, the source is not looked at, and a stage that would have to run is an error.
        only: as ``start``, and what depends on the stage does not run either.
        refresh: stages to make anew even if they are cached.

    Raises:
        UsageError: there is no such stage.
        ModelError: a model cannot be had; before any stage.
        DataError: a stage before ``start`` or ``only`` is not up to date.
    """
    refresh = list(refresh)
    for name in [*refresh, *filter(None, [start, only])]:
        check_stage(name)
    steps = graph(domain)
    for name in filter(None, [start, only]):
        if name not in {step.name for step in steps}:
            raise UsageError(f"no method of `method: {domain.method}` needs the stage {name!r}; pc_clip does")
    check_models(domain)
    done: dict[Step, StageResult] = {}
    wanted = _wanted(steps, start, only)
    needed = wanted | _before(wanted)
    frozen = needed - wanted if start or only else set()
    for step in steps:
        if step in frozen:
            done[step] = _as_it_is(domain, step, done, "--only" if only else "--from")
        elif step in needed:
            with rules(refresh=refresh):
                done[step] = step.call(domain, done.__getitem__)
    if steps[-1] in done:
        publish(domain, scores=done[steps[-2]], page=done[steps[-1]])
    return list(done.values())


def as_they_are(domain: Domain, *names: str) -> list[StageResult]:
    """The artifacts of these stages of the training images as the last run left them; nothing runs.

    Raises:
        DataError: one is not there.
    """
    done: dict[Step, StageResult] = {}
    for step in graph(domain):
        if step.name in names and step.split == "train":
            done[step] = _as_it_is(domain, step, done, "describe")
    return list(done.values())


def repaired(run: Callable[[Domain], T], domain: Domain, attempts: int = 3) -> T:
    """Run, and run again where a stored file turned out to be damaged: it was set aside and is made anew."""
    for _ in range(attempts - 1):
        try:
            return run(domain)
        except Damaged as error:
            log.warning("%s", error)
    return run(domain)


def check_stage(name: str) -> None:
    """Raises UsageError, with what was probably meant, if there is no such stage."""
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, 1)
        hint = f"did you mean {near[0]}?" if near else f"stages are {', '.join(STAGES)}"
        raise UsageError(f"there is no stage {name!r}; {hint}")


def _wanted(steps: list[Step], start: str | None, only: str | None) -> set[Step]:
    """The steps that may run."""
    if only:
        return {step for step in steps if step.name == only}
    found: set[Step] = set()
    for step in steps:
        if start is None or step.name == start or found & set(step.feeders):
            found.add(step)
    return found


def _before(steps: set[Step]) -> set[Step]:
    feeders = {feeder for step in steps for feeder in step.feeders}
    return feeders | _before(feeders) if feeders else set()


def _as_it_is(domain: Domain, step: Step, done: dict[Step, StageResult], option: str) -> StageResult:
    store = open_store(domain)
    history = History(store, domain.name)
    if step.name == "shard":
        found = history.newest("shard", step.split)
        if found is None:
            raise DataError(f"{option}: no images were sharded yet ({step.split}); run without {option}")
        took = seconds_taken(store, found.artifact)
        return StageResult(found.artifact.ref, step.label, True, took, found.artifact.counts)
    try:
        with rules(make=False):
            return step.call(domain, done.__getitem__)
    except NotMade as missing:
        why = "; ".join(history.why(missing, step.split))
        raise DataError(f"{option}: {missing.label} would have to run first ({why}); run without {option}") from None
