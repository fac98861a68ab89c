"""select: which of the adapted models to trust, without a label. Nothing that zero-shot does better is shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from latteflow.storage.artifacts import Artifact, ArtifactWriter
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, centred, read_features
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.tune.models import read_tuned, tuned_features

VERSION = 4
MOST_IMAGES = 20_000
"""Models are compared on at most so many images; which ones depends on their keys alone, which are digests."""


@dataclass(frozen=True)
class Judged:
    """What is thought of one adapted model; see :class:`models.judge.selection.Verdict`."""

    method: str
    seed: int | None
    accepted: bool
    reason: str
    score: float
    """Of the evidence for its method, see :class:`models.judge.selection.Verdict`."""
    estimates: Mapping[str, float]
    """See :func:`models.judge.selection.estimates`; zero-shot is the domain's own."""


@dataclass(frozen=True)
class Selection:
    """What a `select` artifact says.

    Attributes:
        models: all that were judged, in the order of the domain's methods and seeds.
        chosen: place of the one to trust among them; None where zero-shot is.
    """

    models: tuple[Judged, ...]
    chosen: int | None

    @property
    def best(self) -> Judged | None:
        """The model to trust; None: zero-shot."""
        return None if self.chosen is None else self.models[self.chosen]

    @property
    def told(self) -> str:
        """For people, in a sentence."""
        if self.best is None:
            return "without labels, no model is preferred to it, and it is kept"
        seed = "" if self.best.seed is None else f" of seed {self.best.seed}"
        return f"without labels, {self.best.method}{seed} is preferred: {self.best.reason}"


def select(domain: Domain, images: StageResult, features: StageResult, tuned: StageResult) -> StageResult:
    """Judge every method, by all its models, on the images it was adapted to and features that none has shaped.

    Kept is the method that stands first in the domain file and has an accepted model; of its seeds, the one that the
    neighbours of images vouch for most.

    Files: ``selection.json``.
    """
    store = open_store(domain)
    inputs = {"shards": images.ref.digest, "embed": features.ref.digest, "tune": tuned.ref.digest}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = _selected(domain, store.open(images.ref), store.open(features.ref), store.open(tuned.ref))
        record = {"of": tuned.ref.digest, "chosen": found.chosen, "models": [asdict(each) for each in found.models]}
        writer.put("selection", inputs, {"selection.json": json.dumps(record, indent=2).encode()})
        return {"models": len(found.models), "accepted": sum(each.accepted for each in found.models)}

    return run_stage(store, domain, "select", VERSION, inputs, body)


def read_selection(artifact: Artifact) -> Selection:
    """What a `select` artifact says."""
    record = json.loads(artifact.read("selection.json"))
    return Selection(tuple(Judged(**each) for each in record["models"]), record["chosen"])


class Views:
    """What models say of the same images.

    Args:
        images, embedded: the artifacts of the images.
        only: image keys; others are left out as long as some of these are there.
    """

    def __init__(self, domain: Domain, images: Artifact, embedded: Artifact, only: set[str] | None = None) -> None:
        self._domain, self._images = domain, images
        found = read_features(embedded)
        rows = [
            row for _, row in sorted((key, row) for row, key in enumerate(found.keys) if only is None or key in only)
        ]
        self._found: Features = found.at(np.array((rows or list(range(len(found.keys))))[:MOST_IMAGES]))
        self.keys, self.features = self._found.keys, self._found.features

    @property
    def space(self) -> np.ndarray:
        """Unit features less the shift of the domain, ``(n, dim)``."""
        return centred(self._found.embeds, self._found.shift)

    def centre_share(self, scale: float) -> float:
        """See :func:`models.judge.shift.centre_share`; of these images, whatever `clip.centre` says."""
        import torch

        from latteflow.models.judge.shift import centre_share

        found = self._found
        return centre_share(torch.from_numpy(found.embeds), torch.from_numpy(found.class_features), scale)

    def zero_shot(self) -> np.ndarray:
        """Classes by the domain's own zero-shot, ``(n,)``."""
        labels: np.ndarray = (self.space @ self._found.class_features.T).argmax(1)
        return labels

    def logits(self, models: Artifact, method: str, seed: int | None) -> np.ndarray:
        """By a model of a `tune` artifact, ``(n, classes)``."""
        tuned = read_tuned(models, method, seed)
        features = tuned_features(self._domain, tuned, self._images, self._found)
        return tuned.scale * features @ tuned.prototypes.T


def _selected(domain: Domain, images: Artifact, embedded: Artifact, models: Artifact) -> Selection:
    import torch

    from latteflow.models.judge.selection import Evidence, duel, estimates, judge, neighbours

    views = Views(domain, images, embedded)
    space, own = torch.from_numpy(views.space), torch.from_numpy(views.zero_shot())
    near = neighbours(space)
    share = views.centre_share(read_tuned(models, domain.method[0], domain.seeds[0]).scale)
    judged: list[Judged] = []
    chosen: int | None = None
    for method in domain.method:
        seeds = domain.seeds_of(method)
        said = [torch.from_numpy(views.logits(models, method, seed)).softmax(1) for seed in seeds]
        guesses = [estimates(each, own, near) for each in said]
        found = [
            Evidence(guess["vouched"], duel(space, each.argmax(1), own))
            for guess, each in zip(guesses, said, strict=True)
        ]
        verdict = judge(found, share)
        if chosen is None and verdict.accepted:
            chosen = len(judged) + int(np.argmax([each.vouched for each in found]))
        judged += [
            Judged(method, seed, verdict.accepted, verdict.reason, verdict.score, each)
            for seed, each in zip(seeds, guesses, strict=True)
        ]
    return Selection(tuple(judged), chosen)
