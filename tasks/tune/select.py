"""select: which of the adapted models to trust, without a label. Nothing that zero-shot does better is shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from latteflow.models.methods.method import Method
from latteflow.models.methods.registry import label
from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.settings import own_zero_shot
from latteflow.storage.artifacts import Artifact, ArtifactWriter
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.features import Features, centred, read_features
from latteflow.tasks.core.progress import tell
from latteflow.tasks.core.stage import StageResult, open_store, run_stage
from latteflow.tasks.describe.screen import read_screened, read_text_features, usable
from latteflow.tasks.tune.heldout import halves_of, why_not
from latteflow.tasks.tune.inputs import independent_texts
from latteflow.tasks.tune.models import read_tuned, tuned_features

if TYPE_CHECKING:
    from torch import Tensor

    from latteflow.models.judge.selection import Duel
    from latteflow.models.methods.transduction.tuning import Neighbours

VERSION = 5
MOST_IMAGES = 20_000
"""Models are compared on at most so many images; which ones depends on their keys alone, which are digests."""


MOST_COMPARED = 20_000
"""Training images that say how sure the model should be."""


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


def select(
    domain: Domain, images: StageResult, features: StageResult, screened: StageResult, tuned: StageResult
) -> StageResult:
    """Judge every method, by all its models, on the images it was adapted to and what none has shaped.

    That is features, or texts where these are worth something: a method that reads texts is then adapted to half of the
    images, which takes as long as a seed or two, and asked about the others. Where that would train towers again,
    features decide.

    Kept is the method that stands first in the domain file and has an accepted model; of its seeds, the one that the
    neighbours of images vouch for most.

    Files: ``selection.json``.
    """
    store = open_store(domain)
    made = {"shards": images, "embed": features, "screen": screened, "tune": tuned}
    inputs = {name: each.ref.digest for name, each in made.items()}

    def body(writer: ArtifactWriter) -> Mapping[str, int]:
        found = _selected(domain, *(store.open(each.ref) for each in made.values()))
        record = {"of": tuned.ref.digest, "chosen": found.chosen, "models": [asdict(each) for each in found.models]}
        writer.put("selection", inputs, {"selection.json": json.dumps(record, indent=2).encode()})
        return {"models": len(found.models), "accepted": sum(each.accepted for each in found.models)}

    return run_stage(store, domain, "select", VERSION, inputs, body)


def read_selection(artifact: Artifact) -> Selection:
    """What a `select` artifact says."""
    record = json.loads(artifact.read("selection.json"))
    return Selection(tuple(Judged(**each) for each in record["models"]), record["chosen"])


class Trusted(NamedTuple):
    """The model that a run trusts.

    Attributes:
        name: for people.
        method: who adapted it; None: it is zero-shot.
        features: unit image features, ``(n, dim)``.
        prototypes: unit rows, ``(classes, dim)``.
        scale: of the logits.
    """

    name: str
    method: str | None
    features: np.ndarray
    prototypes: np.ndarray
    scale: float


def trusted(domain: Domain, selected: Artifact, tuned: Artifact, shards: Artifact, found: Features) -> Trusted:
    """The model that `select` kept, zero-shot or an adapted one, and what it sees in the images."""
    best = read_selection(selected).best
    first = read_tuned(tuned, domain.method[0], domain.seeds_of(domain.method[0])[0])
    if best is None:
        space = centred(found.embeds, found.shift)
        return Trusted(label(own_zero_shot(domain.clip.centre)), None, space, found.class_features, first.scale)
    model = read_tuned(tuned, best.method, best.seed)
    return Trusted(
        label(best.method), best.method, tuned_features(domain, model, shards, found), model.prototypes, model.scale
    )


def label_free_temperature(
    found: Features, features: np.ndarray, prototypes: np.ndarray, scale: float, method: str | None
) -> float:
    """What to divide a model's logits by, as neighbours tell; of zero-shot, as the form that it is less like does.

    Args:
        found: the images as no model has shaped them.
        features, prototypes, scale: the model's, of the same images.
        method: who adapted it; None: it is zero-shot.
    """
    from latteflow.models.judge.calibration import expected_accuracy, neighbours_say, temperature

    rows = np.unique(np.linspace(0, len(found.keys) - 1, MOST_COMPARED).astype(np.int64))
    some, features = found.at(rows), features[rows]
    middle = centred(some.embeds, some.centre)
    if method is None:
        other = some.features if some.share > 0.5 else middle
        said = (other @ some.class_features.T).argmax(1)
    else:
        own = centred(some.embeds, some.shift) @ some.class_features.T
        said = neighbours_say(middle, own.argmax(1), len(prototypes))
    labels = (features @ prototypes.T).argmax(1)
    return temperature(features, prototypes, scale, expected_accuracy(labels, said))


class Views:
    """What models say of the same images.

    Args:
        images, embedded: the artifacts of the images.
        only: image keys; others are left out as long as some of these are there.

    Attributes:
        rows: of the images among the ``total`` that are embedded, ``(n,)``.
        keys, features: theirs, see :class:`Features`.
    """

    def __init__(self, domain: Domain, images: Artifact, embedded: Artifact, only: set[str] | None = None) -> None:
        self._domain, self._images = domain, images
        found = read_features(embedded)
        rows = [
            row for _, row in sorted((key, row) for row, key in enumerate(found.keys) if only is None or key in only)
        ]
        self.total = len(found.keys)
        self.rows = np.sort((rows or list(range(len(found.keys))))[:MOST_IMAGES])
        self._found: Features = found.at(self.rows)
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

    def texts(self, screened: Artifact, scale: float) -> Tensor | None:
        """Logits of what the images' own texts say, ``(n, classes)``; zeros where an image has none.

        None where texts are worth nothing, or the describer saw no more of the images than their features.
        """
        import torch

        from latteflow.models.methods.latteclip_plus.beliefs import beliefs
        from latteflow.models.rows import in_memory

        if not independent_texts(self._domain):
            return None
        captions = usable(read_screened(screened, "images"))
        own = dict(zip(captions["member_keys"].list.first(), captions["text"], strict=True))
        texts = [own.get(key, "") for key in self.keys]
        said = beliefs(
            torch.from_numpy(self.space),
            torch.from_numpy(self._found.class_features),
            in_memory(read_text_features(screened, "images", texts)),
            torch.tensor([text != "" for text in texts]),
            scale,
            self._near(self._domain.of(TransductionSettings).neighbours),
        ).logits
        return None if said is None else in_memory(said)

    @property
    def spaces(self) -> list[Tensor]:
        """Unit features that say which images are alike, by each tower that was asked, ``(n, dim)``."""
        import torch

        found = (self.space, self._found.near_features)
        return [torch.from_numpy(each) for each in found if each is not None]

    def _near(self, k: int) -> Neighbours:
        from latteflow.models.methods.transduction.tuning import nearest

        return nearest(self.spaces[-1], k)

    def logits(self, models: Artifact, method: str, seed: int | None) -> np.ndarray:
        """By a model of a `tune` artifact, ``(n, classes)``."""
        tuned = read_tuned(models, method, seed)
        features = tuned_features(self._domain, tuned, self._images, self._found)
        return tuned.scale * features @ tuned.prototypes.T


def _selected(domain: Domain, images: Artifact, embedded: Artifact, screened: Artifact, models: Artifact) -> Selection:
    import torch

    from latteflow.models.judge.selection import Duel, Evidence, estimates, hardest_duel, hearing, judge, neighbours

    views = Views(domain, images, embedded)
    spaces, own = views.spaces, torch.from_numpy(views.zero_shot())
    near = neighbours(spaces[0])
    scale = read_tuned(models, domain.method[0], domain.seeds[0]).scale
    share, texts = views.centre_share(scale), views.texts(screened, scale)

    def told(method: Method, labels: Sequence[Tensor]) -> Duel | None:
        """What texts say of a method, by the labels of its models or, if these have read the texts, of others."""
        if texts is None:
            return None
        if not method.reads_image_texts:
            found = [hearing(texts, each, own) for each in labels]
            return Duel(*(sum(values) / len(found) for values in zip(*found, strict=True)))
        if why_not(domain, method):
            return None
        answers = torch.full((views.total,), -1)
        for half in halves_of(domain, method, domain.seeds_of(method.name)[0], images, embedded, screened):
            answers[half.rows] = (half.features @ half.prototypes.T).argmax(1)
        asked = answers[torch.from_numpy(views.rows)]
        return hearing(texts, torch.where(asked < 0, own, asked), own)

    judged: list[Judged] = []
    chosen: int | None = None
    for place, method in enumerate(domain.methods):
        tell(place, len(domain.methods), "methods")
        seeds = domain.seeds_of(method.name)
        said = [torch.from_numpy(views.logits(models, method.name, seed)).softmax(1) for seed in seeds]
        labels = [each.argmax(1) for each in said]
        guesses = [estimates(each, own, near) for each in said]
        found = [
            Evidence(guess["vouched"], hardest_duel(spaces, each, own))
            for guess, each in zip(guesses, labels, strict=True)
        ]
        verdict = judge(found, share, told(method, labels))
        if chosen is None and verdict.accepted:
            chosen = len(judged) + int(np.argmax([each.vouched for each in found]))
        judged += [
            Judged(method.name, seed, verdict.accepted, verdict.reason, verdict.score, each)
            for seed, each in zip(seeds, guesses, strict=True)
        ]
    return Selection(tuple(judged), chosen)
