"""promote: which adapted model a domain serves, and the rule by which another takes its place. No label is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from models import clip, metrics
from models.settings import Method
from storage.artifacts import Artifact, ArtifactRef, ArtifactStore, ArtifactWriter
from storage.errors import DataError, NotFound
from storage.fingerprint import canonical_json, sha256
from storage.register import Register
from storage.shards import read_index
from tasks.domain import Domain
from tasks.features import Features, centred, read_features
from tasks.stage import StageResult, open_store, run_stage
from tasks.tune import read_tuned, tuned_features

VERSION = 1
NEIGHBOURS = 10
MOST_IMAGES = 20_000
"""Scores are over at most so many images; which ones depends on their keys alone, which are digests."""
_REMEMBERED = 50
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Champion:
    """The model that a domain serves. See :class:`storage.register.Register` for what a version is.

    Attributes:
        tuned, images: the `tune` artifact it lies in, and the `shard` artifact it was tuned on.
        score, zero_shot: of the day it was chosen, see :func:`scores`.
        about: digest of the classes and the CLIP; models that differ here cannot be compared.
        at: when, ISO 8601 in UTC.
        previous: version that it took the place of; 0 if none.
        rejected: models that were rolled back from and are not chosen again.
    """

    tuned: ArtifactRef
    images: ArtifactRef
    method: Method
    seed: int | None
    score: float
    zero_shot: float
    about: str
    at: str
    reason: str
    previous: int = 0
    rejected: tuple[str, ...] = ()
    version: int = 0

    @property
    def name(self) -> str:
        """Of the model: the same only for the same content."""
        return _name(self.tuned, self.method, self.seed)

    @classmethod
    def of(cls, version: int, record: Mapping[str, Any]) -> Champion:
        """The champion that a record of the register stands for."""
        refs = {name: ArtifactRef(**record[name]) for name in ("tuned", "images")}
        return cls(**{**record, **refs, "rejected": tuple(record["rejected"]), "version": version})

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "version"}


@dataclass(frozen=True)
class Decision:
    """Whether a challenger takes the champion's place, and why."""

    promote: bool
    reason: str
    method: Method
    seed: int | None
    score: float
    zero_shot: float
    champion: float | None = None


@dataclass(frozen=True)
class Scores:
    """Of a model on a domain's own images, without labels.

    Attributes:
        consistency: how much more often images have the class of their nearest neighbours than chance would have it,
            (agreement - chance) / (1 - chance), as Cohen's kappa; 0 for a model that says one class of everything.
        classes: effective number of classes it tells apart, exp of the entropy of its predictions.
    """

    consistency: float
    classes: float


def better(challenger: Scores, zero_shot: Scores, champion: Scores | None) -> tuple[bool, str]:
    """Whether a challenger is to be served, and why; a simple rule until `models.selection` has its own."""
    said = f"consistency {challenger.consistency:.4f}"
    if challenger.classes < zero_shot.classes / 2:
        return False, f"collapsed: tells {challenger.classes:.1f} classes apart, zero-shot {zero_shot.classes:.1f}"
    if challenger.consistency <= zero_shot.consistency:
        return False, f"{said} is not above zero-shot's {zero_shot.consistency:.4f}"
    if champion is not None and challenger.consistency < champion.consistency:
        return False, f"{said} is below the champion's {champion.consistency:.4f}"
    against = f", champion {champion.consistency:.4f}" if champion is not None else ""
    return True, f"{said}, zero-shot {zero_shot.consistency:.4f}{against}"


def read_champion(domain: Domain) -> Champion | None:
    """The model that the domain serves; None before the first was promoted."""
    version, record = _register(domain).read()
    return Champion.of(version, record) if record else None


def champion(domain: Domain) -> Champion:
    """As :func:`read_champion`.

    Raises:
        DataError: nothing was promoted yet.
    """
    found = read_champion(domain)
    if found is None:
        raise DataError(
            f"domain {domain.name!r} has no champion yet; `latteflow promote` or the flow `retune` makes one"
        )
    return found


def champions(store: ArtifactStore, domain: str) -> list[Champion]:
    """All that were ever served, oldest first."""
    register = Register(store.objects, f"{domain}/champion")
    return [Champion.of(version, register.record(version)) for version in register.versions()]


def promote(domain: Domain, images: StageResult, features: StageResult, tuned: StageResult) -> Decision:
    """Decide about the best of the tuned models, and make it the champion if it is better.

    Two that decide at once do no harm: who comes second decides again.
    """
    while True:
        now = read_champion(domain)
        decision = decide(domain, images, features, tuned, now)
        log.info("promote %s %s: %s", domain.name, "yes" if decision.promote else "no", decision.reason)
        if not decision.promote:
            return decision
        new = Champion(
            tuned.ref, images.ref, decision.method, decision.seed, decision.score, decision.zero_shot, _about(domain),
            datetime.now(UTC).isoformat(timespec="seconds"), decision.reason,
            now.version if now else 0, now.rejected if now else (),
        )  # fmt: skip
        if _register(domain).replace(now.version if now else 0, new.record()):
            return decision


def rollback(domain: Domain) -> Champion:
    """Serve the champion before this one again. The present one is never chosen again.

    Raises:
        DataError: there is none before it, or its model is gone.
    """
    now = champion(domain)
    if not now.previous:
        raise DataError(f"domain {domain.name!r} has no earlier champion to go back to")
    register = _register(domain)
    try:
        before = Champion.of(now.previous, register.record(now.previous))
        open_store(domain).open(before.tuned)
    except NotFound as error:
        raise DataError(f"the champion before this one cannot be served: {error}") from error
    rejected = (*now.rejected, now.name)[-_REMEMBERED:]
    record = {**before.record(), "reason": f"rolled back from version {now.version}", "rejected": rejected}
    record["at"] = datetime.now(UTC).isoformat(timespec="seconds")
    if not register.replace(now.version, record):
        raise DataError("another model was promoted just now; look at it, and try again")
    return Champion.of(now.version + 1, record)


def decide(
    domain: Domain, images: StageResult, features: StageResult, tuned: StageResult, now: Champion | None
) -> Decision:
    """The best model of the domain's first method, one of several seeds, against zero-shot and the champion.

    Scored are the images that the champion was tuned on, as far as they are still there: new images do not vote about
    the model that was tuned on them. The decision is an artifact, so that nothing is scored twice.

    Files: ``decision.json``.
    """
    store = open_store(domain)
    method = domain.method[0]
    seeds = domain.seeds_of(method)
    if now is not None and now.name in (_name(tuned.ref, method, seed) for seed in seeds):
        return Decision(False, "it is the champion already", method, now.seed, now.score, now.zero_shot)
    rival = now if now is not None and now.about == _about(domain) else None
    allowed = [seed for seed in seeds if now is None or _name(tuned.ref, method, seed) not in now.rejected]
    if not allowed:
        return Decision(False, "it was rolled back from", method, seeds[0], 0.0, 0.0)
    inputs = {
        "shards": images.ref.digest, "embed": features.ref.digest, "tune": tuned.ref.digest, "method": method,
        "seeds": allowed, "champion": rival.name if rival else None,
    }  # fmt: skip

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = _decided(domain, store, images.ref, features.ref, tuned.ref, allowed, rival)
        writer.put("decision", inputs, {"decision.json": json.dumps(asdict(found), indent=2).encode()})
        return {"promote": int(found.promote)}

    result = run_stage(store, domain, "promote", VERSION, inputs, body)
    return Decision(**json.loads(store.open(result.ref).read("decision.json")))


def _decided(
    domain: Domain,
    store: ArtifactStore,
    images: ArtifactRef,
    features: ArtifactRef,
    tuned: ArtifactRef,
    seeds: list[int | None],
    now: Champion | None,
) -> Decision:
    shards, found, models = store.open(images), read_features(store.open(features)), store.open(tuned)
    rival = _opened(store, now.tuned) if now else None
    own = _opened(store, now.images) if now else None
    scorer = _Scorer(domain, shards, found, own)
    zero_shot = scorer.zero_shot()
    method = domain.method[0]
    scored = [(scorer.of(models, method, seed), seed) for seed in seeds]
    best, seed = max(scored, key=lambda each: each[0].consistency)
    against = scorer.of(rival, now.method, now.seed) if now and rival else None
    yes, why = better(best, zero_shot, against)
    return Decision(
        yes, why, method, seed, best.consistency, zero_shot.consistency, against.consistency if against else None
    )


class _Scorer:
    """Scores of models on the same images."""

    def __init__(self, domain: Domain, images: Artifact, found: Features, only: Artifact | None) -> None:
        import torch

        from models.transduction import nearest

        self._domain, self._images, self._found = domain, images, found
        wanted = set(read_index(only)["key"]) if only is not None else set(found.keys)
        rows = [row for _, row in sorted((key, row) for row, key in enumerate(found.keys) if key in wanted)]
        self._rows = np.array((rows or list(range(len(found.keys))))[:MOST_IMAGES])
        features = centred(found.embeds, found.centre)[self._rows]
        k = min(NEIGHBOURS, len(self._rows) - 1)
        self._near = nearest(torch.from_numpy(features), k)[0].numpy() if k > 0 else np.zeros((len(self._rows), 0), int)

    def zero_shot(self) -> Scores:
        """The better of plain and centred zero-shot."""
        found = self._found
        spaces = (found.features, centred(found.embeds, found.centre))
        return max((self._score(each, found.class_features) for each in spaces), key=lambda each: each.consistency)

    def of(self, models: Artifact, method: Method, seed: int | None) -> Scores:
        """A model of a `tune` artifact."""
        tuned = read_tuned(models, method, seed)
        return self._score(tuned_features(self._domain, tuned, self._images, self._found), tuned.prototypes)

    def _score(self, features: np.ndarray, weights: np.ndarray) -> Scores:
        return scores(metrics.predict(features[self._rows], weights, 1.0).labels, self._near, len(weights))


def scores(predicted: np.ndarray, near: np.ndarray, n_classes: int) -> Scores:
    """Of predictions.

    Args:
        predicted: class of each image, ``(n,)``.
        near: rows of its nearest neighbours, by features that no adapted model has, ``(n, k)``.
    """
    shares = np.bincount(predicted, minlength=n_classes) / len(predicted)
    chance = float((shares**2).sum())
    agreement = float((predicted[near] == predicted[:, None]).mean()) if near.size else chance
    some = shares[shares > 0]
    consistency = (agreement - chance) / (1 - chance) if chance < 1 else 0.0
    return Scores(consistency, float(np.exp(-(some * np.log(some)).sum())))


def _register(domain: Domain) -> Register:
    return Register(open_store(domain).objects, f"{domain.name}/champion")


def _name(tuned: ArtifactRef, method: str, seed: int | None) -> str:
    return f"{tuned.digest} {method} {seed}"


def _about(domain: Domain) -> str:
    classes = [domain.prompt_name(name) for name in domain.classes]
    return sha256(canonical_json({"classes": classes, "clip": clip.identity(domain.clip)}))


def _opened(store: ArtifactStore, ref: ArtifactRef) -> Artifact | None:
    try:
        return store.open(ref)
    except NotFound as error:
        log.warning("the champion's %s cannot be read (%s); it is judged without", ref.stage, error)
        return None
