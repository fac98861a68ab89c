"""promote: which adapted model a domain serves, and the rule by which another takes its place. No label is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from latteflow.models.towers import clip
from latteflow.storage.artifacts import Artifact, ArtifactRef, ArtifactStore, ArtifactWriter
from latteflow.storage.errors import DataError, NotFound
from latteflow.storage.fingerprint import canonical_json, sha256
from latteflow.storage.register import Register
from latteflow.storage.shards import read_index
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.tune.select import Views, read_selection, select

VERSION = 1
_REMEMBERED = 50
NO_CHAMPION = "domain {name!r} has no champion yet; `latteflow promote` or the flow `retune` makes one"
log = logging.getLogger("latteflow.tasks")


@dataclass(frozen=True)
class Champion:
    """The model that a domain serves. See :class:`storage.register.Register` for what a version is.

    Attributes:
        tuned, images: the `tune` artifact it lies in, and the `shard` artifact it was tuned on.
        score: of the day it was chosen, see :class:`tasks.tune.select.Judged`.
        about: digest of the classes and the CLIP; models that differ here cannot be compared.
        at: when, ISO 8601 in UTC.
        previous: version that it took the place of; 0 if none.
        rejected: models that were rolled back from and are not chosen again.
    """

    tuned: ArtifactRef
    images: ArtifactRef
    method: str
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
    method: str
    seed: int | None
    score: float
    champion: float | None = None
    """Its duel with the champion; None where they did not meet."""


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
        raise DataError(NO_CHAMPION.format(name=domain.name))
    return found


def champions(store: ArtifactStore, domain: str) -> list[Champion]:
    """All that were ever served, oldest first."""
    register = Register(store.objects, f"{domain}/champion")
    return [Champion.of(version, register.record(version)) for version in register.versions()]


def promote(
    domain: Domain, images: StageResult, features: StageResult, screened: StageResult, tuned: StageResult
) -> Decision:
    """Decide about the best of the tuned models, and make it the champion if it is better.

    Two that decide at once do no harm: who comes second decides again.
    """
    while True:
        now = read_champion(domain)
        decision = decide(domain, images, features, screened, tuned, now)
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
    domain: Domain,
    images: StageResult,
    features: StageResult,
    screened: StageResult,
    tuned: StageResult,
    now: Champion | None,
) -> Decision:
    """The best of the models that :func:`tasks.tune.select.select` accepts, against the champion.

    The two meet on the images that the champion was tuned on, as far as they are still there: new images do not vote
    about the model that was tuned on them. The decision is an artifact, so that nobody meets twice.

    Files: ``decision.json``.
    """
    store = open_store(domain)
    selected = select(domain, images, features, screened, tuned)
    selection = read_selection(store.open(selected.ref))
    if selection.best is None:
        first = max(selection.models, key=lambda each: each.score)
        return Decision(False, f"{first.method}: {first.reason}", first.method, first.seed, first.score)
    best = selection.best
    said = Decision(True, best.reason, best.method, best.seed, best.score)
    name = _name(tuned.ref, best.method, best.seed)
    if now is None:
        return said
    if now.name == name:
        return replace(said, promote=False, reason="it is the champion already")
    if name in now.rejected:
        return replace(said, promote=False, reason="it was rolled back from")
    if now.about != _about(domain):
        return replace(said, reason=f"{best.reason}; the champion has other classes or another CLIP")
    inputs = {"select": selected.ref.digest, "champion": now.name, "images": now.images.digest}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = _met(domain, store, (images, features, tuned), now, said)
        writer.put("decision", inputs, {"decision.json": json.dumps(asdict(found), indent=2).encode()})
        return {"promote": int(found.promote)}

    result = run_stage(store, domain, "promote", VERSION, inputs, body)
    return Decision(**json.loads(store.open(result.ref).read("decision.json")))


def _met(
    domain: Domain, store: ArtifactStore, stages: Sequence[StageResult], now: Champion, said: Decision
) -> Decision:
    """What comes of it when a challenger meets the champion."""
    import torch

    from latteflow.models.judge.selection import LEAST_AGREEMENT, duel, kappa

    images, features, tuned = (store.open(each.ref) for each in stages)
    rival, own = _opened(store, now.tuned), _opened(store, now.images)
    if rival is None:
        return replace(said, reason=f"{said.reason}; the champion is gone")
    views = Views(domain, images, features, set(read_index(own)["key"]) if own else None)
    challenger, champion = (
        torch.from_numpy(views.logits(*each).argmax(1))
        for each in ((tuned, said.method, said.seed), (rival, now.method, now.seed))
    )
    score = duel(torch.from_numpy(views.features), challenger, champion).score
    agreement = kappa(challenger, champion, len(domain.classes))
    if score < 0 or agreement < LEAST_AGREEMENT:
        why = (
            f"duel with the champion {score:+.3f}, agreement {agreement:.2f} (at least 0 and {LEAST_AGREEMENT} are "
            "asked for)"
        )
        return replace(said, promote=False, champion=score, reason=why)
    return replace(said, champion=score, reason=f"{said.reason}, duel with the champion {score:+.3f}")


def _register(domain: Domain) -> Register:
    return Register(open_store(domain).objects, f"{domain.name}/champion")


def _name(tuned: ArtifactRef, method: str, seed: int | None) -> str:
    return f"{tuned.digest} {method} {seed}"


def _about(domain: Domain) -> str:
    classes = domain.prompt_names
    return sha256(canonical_json({"classes": classes, "clip": clip.identity(domain.clip)}))


def _opened(store: ArtifactStore, ref: ArtifactRef) -> Artifact | None:
    try:
        return store.open(ref)
    except NotFound as error:
        log.warning("the champion's %s cannot be read (%s); it is judged without", ref.stage, error)
        return None
