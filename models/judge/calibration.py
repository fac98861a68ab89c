"""How sure a model should be, told without a label: one temperature, so that no answer changes.

How often two classifiers that err apart agree estimates how often they are right (Jiang et al., *Assessing
Generalization of SGD via Disagreement*, ICLR 2022). The second one here is what zero-shot says of an image's
*neighbours*: it never looks at the image, nothing was trained for it, and scattered errors of zero-shot are voted down
in it, which would make a good model look bad beside zero-shot itself. Errors that both share are not seen, so that the
estimate is rather too high; and so the temperature is never below 1: a model is made less sure, never surer.
"""

from __future__ import annotations

import numpy as np
import torch

from latteflow.models.judge import metrics
from latteflow.models.judge.selection import neighbours

_NEARER = 0.01
"""By how much of a vote a nearer neighbour breaks ties."""


def neighbours_say(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The class that most of an image's nearest others have, ``(n,)``; its own where there is no other image.

    Args:
        features: that no model has shaped, centred, unit rows ``(n, dim)``. They are whitened here: what all images of
            a domain have in common says nothing about their classes.
        labels: ``(n,)`` int64.
    """
    if len(features) < 2:
        return labels
    near = torch.from_numpy(labels)[neighbours(torch.from_numpy(np.ascontiguousarray(features, np.float32)))]
    weight = 1 + _NEARER * torch.linspace(1, 0, near.shape[1])
    votes = torch.zeros(len(near), classes).scatter_add_(1, near, weight.expand_as(near))
    return votes.argmax(1).numpy()


def expected_accuracy(labels: np.ndarray, other: np.ndarray) -> float:
    """The share of images about which two classifiers agree, in (0, 1): by Laplace's rule, as images may be few."""
    return (int((labels == other).sum()) + 1) / (len(labels) + 2)


def temperature(features: np.ndarray, prototypes: np.ndarray, scale: float, accuracy: float) -> float:
    """What to divide logits by so that the mean confidence is no larger than the accuracy; 1 where it is not.

    Args:
        features, prototypes, scale: as :func:`models.judge.metrics.predict` takes them.
    """
    return max(1.0, metrics.temperature_for(features, prototypes, scale, accuracy))
