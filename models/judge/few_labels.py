"""What labels would bring: classifiers learnt from k labelled images of each class, on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LABELS = (1, 2, 4, 8, 16)
"""Labelled images of each class that are learnt from."""
DRAWS = 5


def few_labels(features: np.ndarray, truth: np.ndarray, seed: int = 0) -> dict[str, list[list[float]]]:
    """Top-1 of the nearest class mean and of a linear probe, on the half of the images they do not learn from.

    Args:
        features: unit rows ``(n, dim)``.
        truth: class of each, ``(n,)`` int64. A class that has less than k images to learn from gives all.

    Returns:
        For each learner, in the order of LABELS, the accuracies of DRAWS random halves.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list[list[float]]] = {name: [[] for _ in LABELS] for name in ("nearest_mean", "linear_probe")}
    for _ in range(DRAWS):
        order = generator.permutation(len(truth))
        learn, test = order[: len(order) // 2], order[len(order) // 2 :]
        for place, k in enumerate(LABELS):
            some = np.concatenate([learn[truth[learn] == label][:k] for label in np.unique(truth[learn])])
            for name, learner in (("nearest_mean", _nearest_mean), ("linear_probe", _linear_probe)):
                answers = learner(features[some], truth[some], features[test])
                found[name][place].append(float((answers == truth[test]).mean()))
    return found


def worth(curves: Mapping[str, Sequence[Sequence[float]]], top1: float) -> int | None:
    """The least k of LABELS with which the better learner, on average, reaches an accuracy; None if none does."""
    best = [max(float(np.mean(each[place])) for each in curves.values()) for place in range(len(LABELS))]
    return next((k for k, mean in zip(LABELS, best, strict=True) if mean >= top1), None)


def _nearest_mean(features: np.ndarray, truth: np.ndarray, others: np.ndarray) -> np.ndarray:
    labels = np.unique(truth)
    means = np.stack([features[truth == label].mean(axis=0) for label in labels])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return labels[(others @ means.T).argmax(axis=1)]


def _linear_probe(features: np.ndarray, truth: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Logistic regression with the strength that CLIP's own example has, on features of unit variance."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(truth)) == 1:
        return np.full(len(others), truth[0])
    factor = np.sqrt(features.shape[1])
    probe = LogisticRegression(C=0.316, max_iter=300).fit(factor * features, truth)
    return np.asarray(probe.predict(factor * others))
