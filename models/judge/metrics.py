"""Figures of merit on plain arrays, with intervals that say how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DRAWS = 2000
"""Bootstrap draws; the interval's ends move by about a tenth of a point between seeds."""
PERMUTATIONS = 9999
BINS = 15
"""Of confidences, as in Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017."""
TEMPERATURES = (0.02, 50.0)
"""The least and the greatest that is looked at."""
_ROWS = 8192


def seen_note(n_seen: int, n_test: int) -> str:
    """What must be said before any figure where ``n_seen`` of ``n_test`` images are those of adapting; empty for 0."""
    if not n_seen:
        return ""
    if n_seen == n_test:
        return f"the {n_test:,} labelled images are those that the models were adapted to; of new ones nothing is known"
    return (
        f"{n_seen:,} of the {n_test:,} labelled images are among those that the models were adapted to, so are not new"
    )


@dataclass(frozen=True)
class Predictions:
    """What one classifier says of n images.

    Attributes:
        ranked: classes from best to worst, ``(n, k)`` int64.
        probabilities: of those classes, ``(n, k)``.
        margin: best minus second probability, ``(n,)``.
        entropy: of the whole distribution, in nats, ``(n,)``.
    """

    ranked: np.ndarray
    probabilities: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Best class, ``(n,)``."""
        return self.ranked[:, 0]


def predict(features: np.ndarray, weights: np.ndarray, scale: float, keep: int = 5) -> Predictions:
    """What :func:`ranked` makes of the logits ``scale * <feature, weight>``.

    Args:
        features: unit rows ``(n, dim)``.
        weights: unit rows ``(classes, dim)``: prototypes or class text features.
        scale: inverse temperature, exp(logit_scale).
        keep: candidates kept for each image.
    """
    blocks = [
        ranked(scale * (features[start : start + _ROWS] @ weights.T).astype(np.float64), keep)
        for start in range(0, max(len(features), 1), _ROWS)
    ]
    each = zip(*((b.ranked, b.probabilities, b.margin, b.entropy) for b in blocks), strict=True)
    return Predictions(*map(np.concatenate, each))


def ranked(logits: np.ndarray, keep: int = 5) -> Predictions:
    """Softmax of ``(n, classes)`` float64 logits; ties go to the class that was named first."""
    logits = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")[:, : max(keep, 2)]
    best = np.take_along_axis(probabilities, order, axis=1)
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(axis=1)
    return Predictions(order[:, :keep], best[:, :keep], best[:, 0] - best[:, 1], entropy)


def hits(ranked: np.ndarray, truth: np.ndarray, k: int) -> np.ndarray:
    """Whether the true class is among the first k, ``(n,)`` bool."""
    return (ranked[:, :k] == truth[:, None]).any(axis=1)


def mean_per_class(correct: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes that have images of the share of correct answers."""
    return float(np.mean([correct[truth == label].mean() for label in np.unique(truth)]))


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Counts ``(classes, classes)``, rows = truth, columns = prediction."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the classes that are true of an image or answered for one (scikit-learn's default)."""
    found = np.union1d(predicted, truth)
    right = np.array([((predicted == label) & (truth == label)).sum() for label in found])
    named = np.array([(predicted == label).sum() + (truth == label).sum() for label in found])
    return float((2 * right / named).mean())


class Bin(NamedTuple):
    """Answers of about the same confidence: how many, their mean confidence, and the share that is right."""

    n: int
    confidence: float
    accuracy: float


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[Bin]:
    """Answers by confidence, in BINS bins of the same width that hold their upper end; empty ones are left out."""
    place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return [
        Bin(int(own.sum()), float(confidence[own].mean()), float(correct[own].mean()))
        for own in (place == number for number in range(BINS))
        if own.any()
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over the answers (Guo et al., eq. 3)."""
    return sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / sum(each.n for each in bins)


def temperature_for(features: np.ndarray, weights: np.ndarray, scale: float, confidence: float) -> float:
    """What to divide the logits by, so that the mean confidence is ``confidence``; the nearest of TEMPERATURES.

    Args:
        features, weights, scale: as :func:`predict` takes them; of many images, some evenly spread ones are looked at.
    """
    some = features[:: max(1, math.ceil(len(features) / _ROWS))]
    low, high = map(math.log, TEMPERATURES)
    for _ in range(30):  # confidence falls as the temperature rises
        middle = (low + high) / 2
        mean = predict(some, weights, scale / math.exp(middle)).probabilities[:, 0].mean()
        low, high = (middle, high) if mean > confidence else (low, middle)
    return math.exp((low + high) / 2)


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """p of McNemar's exact two-sided test.

    Args:
        one, other: whether each of two classifiers is right about each image, ``(n,)`` bool.
    """
    only = int((one & ~other).sum()), int((other & ~one).sum())
    n = sum(only)
    tail = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(only) + 1)]
    return min(1.0, 2 * sum(math.exp(each - n * math.log(2)) for each in tail))


def permutation_test(differences: np.ndarray, seed: int = 0) -> float:
    """p of the paired, two-sided permutation test: how often chance, turning signs, gives as large a mean.

    Args:
        differences: of two classifiers, one number for each image.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    # Turned signs of equal numbers: what counts is how many stay, which is binomial.
    stay = np.random.default_rng(seed).binomial(counts, 0.5, (PERMUTATIONS, len(counts)))
    sums = np.abs((2 * stay - counts) @ sizes)
    return float((1 + (sums >= abs(differences.sum()) - 1e-9).sum()) / (1 + PERMUTATIONS))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of the images.

    Args:
        values: one number for each image: correct or not, its mean over seeds, or a paired difference of two methods.
    """
    found, counts = np.unique(values, return_counts=True)
    # How often each value is drawn; the same as drawing images, in far less time.
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), DRAWS)
    low, high = np.quantile(drawn @ found / len(values), [0.025, 0.975])
    return float(low), float(high)
