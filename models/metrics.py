"""Figures of merit on plain arrays, with intervals that say how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000
"""Bootstrap draws; the interval's ends move by about a tenth of a point between seeds."""


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
    return ranked(scale * (features @ weights.T).astype(np.float64), keep)


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


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean under resampling of the images.

    Args:
        values: one number for each image: correct or not, its mean over seeds, or a paired difference of two methods.
    """
    generator = np.random.default_rng(seed)
    n = len(values)
    means = [values[generator.integers(0, n, n)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
