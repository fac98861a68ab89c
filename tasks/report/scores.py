"""What `evaluate` finds out: made there, kept as ``metrics.json``, and read by whatever tells somebody of it.

docs/evaluation.md says what the figures are. Rates are shares in [0, 1]; what nobody knows without labels is None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from latteflow.models.judge import metrics
from latteflow.storage.artifacts import Artifact

FORMAT = 3
"""Of ``metrics.json``: docs/formats.md says what is in it."""
Interval = tuple[float, float]


class _Figures(BaseModel):
    """What has a default here is not in every file of an earlier format; what a later one adds is not looked at."""

    model_config = ConfigDict(frozen=True)


class Bin(_Figures):
    """Answers of about the same confidence: how many, their mean confidence, and the share that is right."""

    n: int
    confidence: float
    accuracy: float


class Confidence(_Figures):
    """How sure answers are and how often right; ``ece`` is the expected calibration error."""

    ece: float
    confidence: float
    bins: Sequence[Bin]


class Calibration(_Figures):
    """``matched`` is after the temperatures, one for each seed, which were set without labels."""

    as_is: Confidence
    matched: Confidence
    temperatures: Sequence[float]


class OfClass(_Figures):
    """Accuracy on the ``n`` images of a class; ``gain`` is over the better zero-shot."""

    n: int
    top1: float
    gain: float | None = None


class McNemar(_Figures):
    p: float
    only_adapted: int
    only_zero_shot: int


class Gain(_Figures):
    """What one classifier is better than another by, on the same images."""

    gain: float
    gain_interval: Interval
    permutation_p: float
    mcnemar: McNemar

    @classmethod
    def of(cls, right: Sequence[np.ndarray], first: Sequence[np.ndarray]) -> Self:
        """Of the second over the first.

        Args:
            right: the share of the seeds of each that is right about each image, ``(n,)``.
            first: whether their first seeds are, ``(n,)`` bool.
        """
        gain = right[1] - right[0]
        return cls(
            gain=float(gain.mean()),
            gain_interval=metrics.bootstrap_interval(gain),
            permutation_p=metrics.permutation_test(gain),
            mcnemar=McNemar(
                p=metrics.mcnemar(*first),
                only_adapted=int((first[1] & ~first[0]).sum()),
                only_zero_shot=int((first[0] & ~first[1]).sum()),
            ),
        )


class LabelFree(_Figures):
    """What can be said without labels, before (better zero-shot) and after adaptation.

    ``agreement`` is the share of images whose class did not change, ``margin`` the mean of top-1 minus top-2
    probability, ``entropy`` the mean in nats, ``predicted`` the images per predicted class, in the classes' order.
    """

    agreement: float
    margin_before: float
    margin_after: float
    entropy_before: float
    entropy_after: float
    predicted_before: Sequence[int]
    predicted_after: Sequence[int]


class Score(_Figures):
    """Of one method or zero-shot. From ``gain`` on a method is compared with the better zero-shot, see :class:`Gain`.

    ``interval`` and ``gain_interval`` are 95 % bootstrap intervals. ``per_class`` goes by the number of the class.
    """

    top1: float | None = None
    interval: Interval | None = None
    top5: float | None = None
    mean_per_class: float | None = None
    macro_f1: float | None = None
    seeds: Sequence[float] = ()
    calibration: Calibration | None = None
    per_class: Mapping[int, OfClass] = {}
    gain: float | None = None
    gain_interval: Interval | None = None
    permutation_p: float | None = None
    mcnemar: McNemar | None = None
    label_free: LabelFree | None = None

    @property
    def gained(self) -> tuple[float, float, float] | None:
        """The gain and the ends of its interval."""
        return None if self.gain is None or self.gain_interval is None else (self.gain, *self.gain_interval)


class ZeroShot(_Figures):
    """Top-1 of each zero-shot; ``own`` is the one that methods start from, ``better`` the best, ``top1`` its."""

    plain: float | None
    centred: float | None
    estimated: float | None = None
    own: str = ""
    top1: float | None
    better: str
    methods: Mapping[str, Score]


class Mistake(_Figures):
    """Two classes, by number: ``n`` images of one are taken for the other, ``before`` by the better zero-shot."""

    truth: int
    answer: int
    n: int
    before: int
    keys: Sequence[str]
    """Of some of the images."""


class SliceScores(_Figures):
    """Accuracy of each method on ``n`` images that have something in common."""

    by: str
    name: str
    n: int
    top1: Mapping[str, float]


class FewLabels(_Figures):
    """What classifiers reach that learn from ``labels`` images of each class: for each learner the draws' accuracies.

    ``worth`` is the least number of labels that reach a method; None where none does.
    """

    labels: Sequence[int]
    top1: Mapping[str, Sequence[Sequence[float]]]
    worth: Mapping[str, int | None]


class Forgotten(_Figures):
    """Top-1 of an adapted model on images of another kind, and how it changed."""

    top1: float
    change: float
    change_interval: Interval


class General(_Figures):
    """``n`` labelled images of another kind: top-1 of the untouched model, and what adapting made of it."""

    n: int
    classes: int
    top1: float
    interval: Interval
    methods: Mapping[str, Forgotten]


class Scores(_Figures):
    """All figures of an evaluation.

    Attributes:
        n_test, n_seen: labelled images, and those of them that the models were adapted to.
        centre_share: how much of the images' mean embedding is subtracted, 0 to 1.
        methods: in the order of the domain file. A page or message that has room for one is about the first.
        label_free: of that one.
        confusion: of the first seed, ``(truth, answer, images)`` where there are any (in format 1 the dense matrix).
        confused: the most frequent mistakes of each method and zero-shot.
    """

    format: int = 1
    domain: str
    n_test: int
    n_seen: int = 0
    classes: Sequence[str]
    centre_share: float = 0.0
    zero_shot: ZeroShot
    methods: Mapping[str, Score]
    label_free: LabelFree
    confusion: Mapping[str, Sequence[Sequence[int]]] = {}
    confused: Mapping[str, Sequence[Mistake]] = {}
    slices: Sequence[SliceScores] = ()
    few_labels: FewLabels | None = None
    general: General | None = None

    @property
    def of(self) -> dict[str, Score]:
        """Zero-shots, if there are labels, and methods."""
        return {**self.zero_shot.methods, **self.methods}

    def written(self) -> bytes:
        """``metrics.json``."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=1, allow_nan=False).encode()


def verdict(interval: Interval | None) -> str:
    """better, worse or unclear, by the interval of a gain; unknown without one."""
    if interval is None:
        return "unknown"
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def read_scores(artifact: Artifact) -> Scores:
    """What an `evaluate` artifact says."""
    return Scores.model_validate_json(artifact.read("metrics.json"))
