"""plan: what a run would do and why, without doing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import polars as pl

from latteflow.flows.pipeline import Step, graph
from latteflow.models.settings import LanguageModelSettings
from latteflow.storage.artifacts import Artifact
from latteflow.storage.captions import CaptionStore, caption_key, describer_id
from latteflow.storage.errors import NotFound
from latteflow.storage.shards import Greys, read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import NotMade, StageResult, open_store, rules
from latteflow.tasks.describe.reckon import mean_prompt_tokens
from latteflow.tasks.ingest.changes import Images, image_changes
from latteflow.tasks.ingest.shard import look
from latteflow.tasks.report.history import History
from latteflow.tasks.tune.check import check_models
from latteflow.tasks.tune.tune import missing_models

# The inputs of a stage whose change makes all of its work anew; any other change leaves the parts of old images.
_REMAKES = {
    "embed": {"clip", "neighbours"},
    "describe": {"describer", "prompts"},
    "group": {"describer", "prompts", "size"},
    "pair": {"describer", "prompts", "pairs"},
}
_AT_ONCE = 50_000
"""Images whose keys are in memory."""
_UNITS = {"describe": "texts", "group": "texts", "pair": "texts", "tune": "models", "select": "models", "report": "run"}


class Tokens(NamedTuple):
    """Of a number of texts."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Planned:
    """What would become of one stage.

    Attributes:
        reasons: why it would run; empty where its artifact is there.
        behind: the stages before it that would run.
        result: its artifact; where it would run, the newest one, if there is any.
        images: of the split that the stage is about.
        unit: what the stage makes: images, texts, models, or one run.
        work: how many of them are to be made.
        at_most: ``work`` is a bound: what is to be made depends on a stage that would run before.
        tokens, seconds: estimates from earlier texts and runs, or from the domain's prices, and tokens also from the
            processor of the describer's model; None where there are none, or, for tokens, no texts.
    """

    label: str
    reasons: tuple[str, ...]
    behind: tuple[str, ...]
    result: StageResult | None
    images: Images
    unit: str
    work: int = 0
    at_most: bool = False
    tokens: Tokens | None = None
    seconds: float | None = 0.0

    @property
    def only_behind(self) -> bool:
        """It would run for no reason but that its input changes."""
        return bool(self.behind) and len(self.reasons) == 1 and self.result is not None


def plan(domain: Domain) -> list[Planned]:
    """Every stage of a run, in order. Looks at the source and at what earlier runs left; loads no model.

    Raises:
        DataError: the source is missing or empty.
        ModelError: a model cannot be had.
    """
    check_models(domain)
    planner = _Planner(domain)
    return [planner.plan(step) for step in graph(domain)]


class _Planner:
    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._store = open_store(domain)
        self._history = History(self._store, domain.name)
        self._planned: dict[Step, Planned] = {}

    def plan(self, step: Step) -> Planned:
        before = [self._planned[each] for each in step.feeders]
        behind = tuple(each.label for each in before if each.reasons)
        unit = _UNITS.get(step.name, "images")
        if before:
            found, missing = self._ask(step) if all(each.result for each in before) else (None, None)
            images = before[0].images
        else:
            found, missing, images = self._look(step)
        if found is not None and not behind:
            planned = Planned(step.label, (), (), found, images, unit)
        else:
            made = self._history.newest(step.name, step.split)
            old = made.artifact if made else None
            reasons = self._reasons(step, missing, old, behind, images)
            stand_in = StageResult(old.ref, step.label, True, 0.0, old.counts) if old else None
            planned = Planned(step.label, reasons, behind, stand_in, images, unit)
            planned = self._estimated(step, planned, missing, old)
        self._planned[step] = planned
        return planned

    def _look(self, step: Step) -> tuple[StageResult | None, NotMade | None, Images]:
        """As :meth:`_ask`, of a stage that reads the source, and what became of that: by one look at it."""
        with look(self._store, self._domain, step.split) as seen:
            try:
                with rules(make=False):
                    found = step.stage(self._domain, step.split, seen)
            except NotMade as missing:
                return None, missing, image_changes(self._store, self._domain, step.split, seen)
            return found, None, Images(0, found.counts["images"], 0)

    def _ask(self, step: Step) -> tuple[StageResult | None, NotMade | None]:
        """The artifact from what the stages before it came to, or what it would be made from.

        Where a stage before it would run, its newest artifact stands in: what differs then is this stage's own doing.
        """
        try:
            with rules(make=False):
                return step.call(self._domain, self._result), None
        except NotMade as missing:
            return None, missing
        except NotFound:
            return None, None  # what stood in is gone by now

    def _result(self, step: Step) -> StageResult:
        found = self._planned[step].result
        assert found is not None
        return found

    def _reasons(
        self, step: Step, missing: NotMade | None, old: Artifact | None, behind: tuple[str, ...], images: Images
    ) -> tuple[str, ...]:
        if old is None:
            return ("not made yet",)
        reasons = [f"input changes: {', '.join(behind)}"] if behind else []
        changes = {"new": images.new, "removed": images.removed} if not step.feeders else {}
        if any(changes.values()):
            reasons.append(f"images: {', '.join(f'{number} {word}' for word, number in changes.items() if number)}")
        if missing is not None:
            reasons += self._history.why(missing, step.split, told={"images"} if any(changes.values()) else set())
        return tuple(reasons)

    def _estimated(self, step: Step, planned: Planned, missing: NotMade | None, old: Artifact | None) -> Planned:
        anew = old is None or (missing is not None and bool(missing.changes(old) & _REMAKES.get(step.name, set())))
        everything = planned.images.new + planned.images.kept
        at_most = False
        if step.name in ("describe", "group", "pair"):
            work, at_most = self._texts(step, planned, missing, old, anew=anew)
        elif step.name == "tune":
            work = self._models(step, planned)
        elif step.name == "select":
            work = self._all_models()
        elif step.name == "report":
            work = 1
        else:
            work = everything if anew or step.name in ("screen", "evaluate") else planned.images.new
        rate = self._history.seconds_per(step.name, planned.unit)
        if rate is None and planned.unit == "texts" and self._domain.prices.texts_per_second:
            rate = 1 / self._domain.prices.texts_per_second
        inputs = missing.inputs if missing else old.inputs if old else None
        return replace(
            planned,
            work=work,
            at_most=at_most,
            tokens=self._tokens(step.name, work, inputs) if planned.unit == "texts" else None,
            seconds=None if rate is None else rate * work,
        )

    def _models(self, step: Step, planned: Planned) -> int:
        """Models that no run has trained yet; all of them, where what they are trained on changes."""
        _, embedded, screened, *pairs = step.args
        if {*planned.behind} - {"pair"} or not (self._planned[embedded].result and self._planned[screened].result):
            return self._all_models()
        paired = self._result(pairs[0]) if pairs and "pair" not in planned.behind else None
        return missing_models(self._domain, self._result(embedded), self._result(screened), paired)

    def _all_models(self) -> int:
        return sum(len(self._domain.seeds_of(method)) for method in self._domain.method)

    def _texts(
        self, step: Step, planned: Planned, missing: NotMade | None, old: Artifact | None, *, anew: bool
    ) -> tuple[int, bool]:
        """Texts that no describer has written yet, and whether that is a bound."""
        if step.name == "pair":
            n = planned.images.new + planned.images.kept
            return min(self._domain.pairs.budget, n * (n - 1) // 2), True
        images, embedded = (self._planned[each] for each in step.feeders[:2])
        everything = planned.images.new + planned.images.kept
        pack = self._domain.prompt_pack
        asked = ("",) if pack is None else pack.group if step.name == "group" else pack.image
        # Tags are relative to the mean feature, so all of them change with the features.
        shifted = pack is None and self._domain.describer.kind == "tags" and bool(embedded.reasons)
        some = embedded.only_behind and not anew and not shifted
        if step.name == "group":
            touched = self._domain.group.size * (planned.images.new + planned.images.removed)
            return len(asked) * (min(everything, touched) if some else everything), True
        if any("{class}" in question for question in asked):  # new images have no pseudo-label yet
            return len(asked) * (planned.images.new if some else everything), True
        contents = planned.images.new_contents
        if images.result and not some:
            contents = pl.concat([contents, _contents(self._store.open(images.result.ref))])
        contents = contents.unique()
        inputs = missing.inputs if missing else old.inputs if old else None
        if inputs is None or shifted:
            return len(asked) * len(contents), not shifted
        who = describer_id({"kind": "image", **inputs["describer"]})
        return self._unwritten(who, contents, asked), False

    def _unwritten(self, who: str, contents: pl.Series, asked: Sequence[str]) -> int:
        """How many of the questions about these images nobody has answered."""
        captions = CaptionStore(self._store.objects)
        if not captions.has_texts(who):
            return len(contents) * len(asked)
        count = 0
        for start in range(0, len(contents), _AT_ONCE):
            some = contents[start : start + _AT_ONCE]
            keys = {caption_key(who, [content], question) for content in some for question in asked}
            count += len(keys - captions.known(who, keys))
        return count

    def _tokens(self, stage: str, texts: int, inputs: Mapping[str, Any] | None) -> Tokens | None:
        """By the texts that the describer wrote so far, else by the domain's prices, else by the model's processor."""
        domain = self._domain.of_pairs() if stage == "pair" else self._domain
        describer, prices = domain.describer, domain.prices
        if not isinstance(describer, LanguageModelSettings):
            return Tokens(0, 0)
        prompt, output = prices.prompt_tokens, prices.output_tokens
        if inputs is not None:
            who = describer_id({"kind": "image" if stage == "describe" else stage, **inputs["describer"]})
            written = CaptionStore(self._store.objects).sample(who).filter(pl.col("prompt_tokens") > 0)
            if written.height:
                prompt, output = written.select(pl.mean("prompt_tokens", "output_tokens")).row(0)
        if prompt is None and texts:
            prompt = mean_prompt_tokens(self._store, domain, stage)
        output = describer.max_tokens if output is None else output
        return None if prompt is None else Tokens(round(texts * prompt), round(texts * output))


def _contents(shards: Artifact) -> pl.Series:
    """Digests of the live images as they are seen."""
    greys, rows = Greys(shards), read_index(shards).select("key", "sha256")
    if not greys.any:
        return rows["sha256"]
    return pl.Series([greys.content(*row) for row in rows.iter_rows()], dtype=pl.String)


def cost(domain: Domain, planned: Sequence[Planned]) -> float | None:
    """Of the texts of a plan, by the domain's prices; None where a price or an estimate is missing."""
    prices = domain.prices
    texts = [each for each in planned if each.reasons and each.unit == "texts" and each.work]
    by_token = (prices.million_prompt_tokens, prices.million_output_tokens)
    if not texts or (prices.gpu_hour is None and None in by_token):
        return None
    whole = 0.0
    for each in texts:
        if prices.gpu_hour is not None:
            if each.seconds is None:
                return None
            whole += prices.gpu_hour * each.seconds / 3600
        if None not in by_token:
            if each.tokens is None:
                return None
            whole += sum(price * count for price, count in zip(by_token, each.tokens, strict=True) if price) / 1e6
    return whole
