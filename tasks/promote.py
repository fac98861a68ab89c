"""promote: which adapted model a domain serves, and the rule by which another takes its place. No label is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
MOST_IMAGES = 20_000
"""At most so many images vote; which ones depends on their keys alone, which are digests."""
_REMEMBERED = 50
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Champion:
    """The model that a domain serves. See :class:`storage.register.Register` for what a version is.

    Attributes:
        tuned, images: the `tune` artifact it lies in, and the `shard` artifact it was tuned on.
        score: how far neighbours vouch for it against zero-shot, -1 to 1, on the day it was chosen.
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
    score: float = 0.0


def better(
    features: Tensor, challenger: Tensor, zero_shots: Mapping[str, Tensor], champion: Tensor | None, n_classes: int
) -> tuple[bool, str]:
    """Whether a challenger is to be served, and why. No label is read: see :mod:`models.selection`.

    Args:
        features: unit image features that no adapted model has shaped, ``(n, dim)``.
        challenger, champion: classes of the images, ``(n,)``; the same of each zero-shot.
    """
    from models.selection import duel, judge

    verdict = judge(features, challenger, zero_shots, n_classes)
    if not verdict.accepted or champion is None:
        return verdict.accepted, verdict.reason
    against = duel(features, challenger, champion)
    if against < 0:
        return False, f"neighbours vouch for the champion (duel with it {against:+.3f})"
    return True, f"{verdict.reason}; duel with the champion {against:+.3f}"


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
            tuned.ref, images.ref, decision.method, decision.seed, decision.score, _about(domain),
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

    The images that the champion was tuned on vote, as far as they are still there: new images have no say about the
    model that was tuned on them. The decision is an artifact, so that nothing is decided twice.

    Files: ``decision.json``.
    """
    store = open_store(domain)
    method = domain.method[0]
    seeds = domain.seeds_of(method)
    if now is not None and now.name in (_name(tuned.ref, method, seed) for seed in seeds):
        return Decision(False, "it is the champion already", method, now.seed, now.score)
    rival = now if now is not None and now.about == _about(domain) else None
    allowed = [seed for seed in seeds if now is None or _name(tuned.ref, method, seed) not in now.rejected]
    if not allowed:
        return Decision(False, "it was rolled back from", method, seeds[0])
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
    from models.selection import best, duel

    models, rival = store.open(tuned), _opened(store, now.tuned) if now else None
    voters = _Voters(
        domain, store.open(images), read_features(store.open(features)), _opened(store, now.images) if now else None
    )
    method = domain.method[0]
    said = {str(place): voters.of(models, method, seed) for place, seed in enumerate(seeds)}
    place = best(voters.features, said)
    zero_shots = voters.zero_shots()
    champion = voters.of(rival, now.method, now.seed) if now and rival else None
    yes, why = better(voters.features, said[place], zero_shots, champion, len(domain.classes))
    score = min(duel(voters.features, said[place], each) for each in zero_shots.values())
    return Decision(yes, why, method, seeds[int(place)], score)


class _Voters:
    """Images that vote, and what models say of them."""

    def __init__(self, domain: Domain, images: Artifact, found: Features, only: Artifact | None) -> None:
        self._domain, self._images, self._found = domain, images, found
        wanted = set(read_index(only)["key"]) if only is not None else set(found.keys)
        rows = [row for _, row in sorted((key, row) for row, key in enumerate(found.keys) if key in wanted)]
        self._rows = np.array((rows or list(range(len(found.keys))))[:MOST_IMAGES])
        self._centred = centred(found.embeds, found.centre)
        self.features = _tensor(self._centred[self._rows])

    def zero_shots(self) -> dict[str, Tensor]:
        """Plain and centred."""
        found = self._found
        spaces = {"plain zero-shot": found.features, "centred zero-shot": self._centred}
        return {name: self._classes(each, found.class_features) for name, each in spaces.items()}

    def of(self, models: Artifact, method: Method, seed: int | None) -> Tensor:
        """Classes by a model of a `tune` artifact."""
        tuned = read_tuned(models, method, seed)
        return self._classes(tuned_features(self._domain, tuned, self._images, self._found), tuned.prototypes)

    def _classes(self, features: np.ndarray, weights: np.ndarray) -> Tensor:
        return _tensor(metrics.predict(features[self._rows], weights, 1.0).labels.copy())


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(array)


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
