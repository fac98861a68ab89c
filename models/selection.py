"""Which of several models to trust, without a label.

Accuracy cannot be seen without labels, but a disagreement can be judged: where two models say different things about an
image, look at its nearest images about which both agree, and see whose class they have (`duel`). A model that moves
images to a class that zero-shot never gave near them finds no neighbours to vouch for it; one that repairs scattered
errors of zero-shot finds many. Consistency among neighbours alone would prefer any clean clustering, also one with the
wrong names; agreement with zero-shot alone would prefer zero-shot.

What it cannot see: a class that is given up as a whole, to one that zero-shot also gave there now and then, has nobody
left to speak for it. Agreement with zero-shot has to catch models that give up most classes.

The rule is fixed, and its constants were chosen once for all domains; docs/methods.md has the table of what it lets
pass and what it refuses, broken models among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.losses import at_least_float32

NEIGHBOURS = 10
LEAST_AGREEMENT = 0.2
"""Of a model with one of the zero-shots, as Cohen's kappa: without it, a model has learnt other names."""
ERRORS = 2.0
"""Standard errors by which a duel must be won to count."""
_ROWS = 2048


class Duel(NamedTuple):
    """How a duel of two models went.

    Attributes:
        score: -1 to 1, positive for the first.
        error: its standard error over the disputed images.
    """

    score: float
    error: float

    @property
    def is_won(self) -> bool:
        """By more than chance would give."""
        return self.score > ERRORS * self.error


@dataclass(frozen=True)
class Verdict:
    """Whether a model is to be preferred to every zero-shot.

    Attributes:
        accepted: it is.
        reason: why, or why not, for people.
        duels: against each zero-shot, see :func:`duel`.
        agreement: with the zero-shot that it agrees with most, as Cohen's kappa.
    """

    accepted: bool
    reason: str
    duels: Mapping[str, Duel]
    agreement: float


def duel(features: Tensor, one: Tensor, other: Tensor) -> Duel:
    """Whom the neighbours of disputed images vouch for.

    Disputed images are those that two models give different classes; their neighbours are the NEIGHBOURS nearest ones
    that both models give the same class.

    Args:
        features: unit image features that neither model has shaped, `(n, dim)`.
        one, other: classes, `(n,)` int64.

    Returns:
        How much larger a share of the neighbours has the class that `one` gave than that `other` gave, mean over the
        disputed images; 0 where nothing is disputed, or fewer than NEIGHBOURS images are not.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(features) == len(one) == len(other):
        raise ValueError(f"need one class of each model for each image, got {len(features)}, {len(one)}, {len(other)}")
    agreed, disputed = (one == other).nonzero()[:, 0], (one != other).nonzero()[:, 0]
    if not len(disputed) or len(agreed) < NEIGHBOURS:
        return Duel(0.0, 0.0)
    features = at_least_float32(features)
    vouched, known, votes = one[agreed], features[agreed].T, []
    for rows in disputed.split(_ROWS):
        near = vouched[(features[rows] @ known).topk(NEIGHBOURS, dim=1).indices]
        votes.append((near == one[rows, None]).double().mean(1) - (near == other[rows, None]).double().mean(1))
    every = torch.cat(votes)
    return Duel(float(every.mean()), float(every.std(correction=0)) / math.sqrt(len(every)))


def kappa(one: Tensor, other: Tensor, n_classes: int) -> float:
    """Cohen's kappa of two models' classes: 1 for the same, 0 for what chance gives.

    Args:
        one: `(n,)` int64.
        other: `(n,)`, or `(n, k)` where each of `one` is compared with k.
    """
    shares = [
        torch.bincount(labels.flatten(), minlength=n_classes).double() / labels.numel() for labels in (one, other)
    ]
    chance = float(shares[0] @ shares[1])
    agreement = float((one.unflatten(0, (-1, *[1] * (other.ndim - 1))) == other).double().mean())
    return (agreement - chance) / (1 - chance) if chance < 1 else 0.0


def estimates(probabilities: Tensor, zero_shot: Tensor, near: Tensor) -> dict[str, float]:
    """Guesses at how good a model is, without labels; larger is better. How well each ranks models: docs/methods.md.

    Args:
        probabilities: the model's, `(n, classes)`, rows sum to 1.
        zero_shot: classes by zero-shot, `(n,)` int64.
        near: rows of each image's nearest others by features that the model has not shaped, `(n, k)`.

    Returns:
        vouched: kappa of the model's classes and those that zero-shot gives the image's neighbours (ours).
        agreement: kappa of the model's and zero-shot's classes (after arXiv 2106.13799).
        neighbourhood: kappa of the model's classes and those it gives the neighbours (after arXiv 2108.10860).
        information: of an image about its class by the model, in nats, 0 to log(classes) (Bridle et al., 1991).
        confidence: mean of the largest probability (after arXiv 2107.03315).
    """
    labels, n_classes = probabilities.argmax(1), probabilities.shape[1]
    entropies = (
        torch.special.entr(probabilities.double()).sum(1),
        torch.special.entr(probabilities.double().mean(0)).sum(),
    )
    return {
        "vouched": kappa(labels, zero_shot[near], n_classes),
        "agreement": kappa(labels, zero_shot, n_classes),
        "neighbourhood": kappa(labels, labels[near], n_classes),
        "information": float(entropies[1] - entropies[0].mean()),
        "confidence": float(probabilities.max(1).values.double().mean()),
    }


def judge(features: Tensor, labels: Tensor, zero_shots: Mapping[str, Tensor], n_classes: int) -> Verdict:
    """Whether a model is to be preferred to zero-shot, in every form that zero-shot has.

    Args:
        features: unit image features that the model has not shaped, `(n, dim)`.
        labels: the model's classes, `(n,)` int64.
        zero_shots: classes of each zero-shot, by name; at least one.
        n_classes: classes that there are names for.
    """
    duels = {name: duel(features, labels, given) for name, given in zero_shots.items()}
    agreement = max(kappa(labels, given, n_classes) for given in zero_shots.values())
    worst = min(duels, key=lambda name: duels[name].score - ERRORS * duels[name].error)
    said = f"duel with {worst} {duels[worst].score:+.3f} (±{duels[worst].error:.3f}), agreement {agreement:.2f}"
    if agreement < LEAST_AGREEMENT:
        reason = f"it has little to do with zero-shot ({said}; at least {LEAST_AGREEMENT} is asked for)"
    elif not duels[worst].is_won:
        reason = f"neighbours do not vouch for it ({said})"
    else:
        return Verdict(True, f"neighbours vouch for it ({said})", duels, agreement)
    return Verdict(False, reason, duels, agreement)
