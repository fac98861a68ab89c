"""Which of several models to trust, without a label.

Accuracy cannot be seen without labels. What can be seen is whether other images vouch for a model, by features that no
model has shaped, in two ways:

- *vouched*: the images that lie nearest to an image were given classes by zero-shot, and a model that has learnt the
  domain's classes agrees with them. Consistency among neighbours alone would prefer any clean clustering, also one with
  the wrong names; agreement with zero-shot about the same image would prefer zero-shot.
- a *duel* with zero-shot: where the two say different things about an image, its nearest images about which both agree
  are asked. A model that is much like zero-shot, and worse, loses it.

Whether neighbours are to be believed depends on whether zero-shot knows the domain at all. The evidence for that is the
share of the domain's centre that `models.judge.shift` found to be no class: it is large where classes that the texts
name divide the images. A method is accepted that wins the duel, and whose neighbours' agreement and share together
reach a bar, over all its seeds; the bar was set on generated domains (`benchmarks/synthetic.py`).

Neighbours share the mistakes of the tower that made them neighbours. Texts of a describer that sees the images do not,
and where they are worth something (`models.methods.latteclip_plus.beliefs`) they are the better witnesses, and decide
alone: in a *hearing* the image's own text is asked which of the two classes it is about. A model that has learnt from
texts is asked about images whose texts it has not read. docs/methods.md has tables of what passes, on real domains too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latteflow.models.methods.transduction.tuning import nearest, whitening
from latteflow.models.vectors import at_least_float32, unit

NEIGHBOURS = 10
LEAST_AGREEMENT = 0.2
"""Of a challenger with the champion, as Cohen's kappa: without it, a model has learnt other names."""
SHRINKAGE = 0.03
"""Of the whitening, as `models.settings.TransductionSettings` has it."""
ERRORS = 2.0
"""Standard errors by which a duel must be won to count."""
SHARE, BAR = 0.5, 0.729
"""How much the share counts in units of `vouched`, and what both must reach: `python -m benchmarks.synthetic --fit`."""
_ROWS = 2048


class Duel(NamedTuple):
    """How a duel of two models went.

    Attributes:
        score: -1 to 1, positive for the first.
        error: its standard error over the disputed images.
    """

    score: float
    error: float


class Evidence(NamedTuple):
    """For one model.

    Attributes:
        vouched: see :func:`estimates`.
        duel: with zero-shot.
    """

    vouched: float
    duel: Duel


@dataclass(frozen=True)
class Verdict:
    """Whether a method is to be preferred to zero-shot.

    Attributes:
        accepted: it is.
        reason: why, or why not, for people.
        score: of what neighbours say; where they decide, accepted above BAR.
    """

    accepted: bool
    reason: str
    score: float


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


def hardest_duel(spaces: Sequence[Tensor], one: Tensor, other: Tensor) -> Duel:
    """The :func:`duel` that is won least surely: of several towers that say which images are alike, each has a veto.

    Args:
        spaces: unit features by each tower, `(n, dim)`; at least one.
    """
    return min((duel(space, one, other) for space in spaces), key=lambda found: found.score - ERRORS * found.error)


def hearing(said: Tensor, one: Tensor, other: Tensor) -> Duel:
    """Whom the images' own texts vouch for.

    Args:
        said: logits of what each text says, `(n, classes)`; rows of zeros where there is no text.
        one, other: classes by two models that have not read these texts, `(n,)` int64.

    Returns:
        How much more probable the class that `one` gave is by the text than that `other` gave, mean over the images
        with a text that two models give different classes; 0 where there are none.
    """
    disputed = ((one != other) & said.ne(0).any(1)).nonzero()[:, 0]
    if not len(disputed):
        return Duel(0.0, 0.0)
    odds, one, other = said[disputed].double().softmax(1), one[disputed], other[disputed]
    votes = (odds.gather(1, one[:, None]) - odds.gather(1, other[:, None]))[:, 0]
    return Duel(float(votes.mean()), _error(votes, one * said.shape[1] + other))


def _error(votes: Tensor, change: Tensor) -> float:
    """Standard error of the mean of some votes: the larger of that of independent ones, and that of votes which depend
    on each other where they are about the same change of class. What is wrong about one such image is wrong about
    others (Liang and Zeger, *Biometrika* 73, 1986); with few changes alone this could come out too small."""
    away = votes - votes.mean()
    changes, groups = change.unique(return_inverse=True)
    sums = torch.zeros(len(changes), dtype=votes.dtype).index_add_(0, groups, away)
    apart, together = away.square().sum(), sums.square().sum() * len(changes) / max(1, len(changes) - 1)
    return math.sqrt(float(torch.maximum(apart, together))) / len(votes)


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


def neighbours(features: Tensor) -> Tensor:
    """Rows of each image's NEIGHBOURS nearest others, `(n, k)`, by whitened features.

    Args:
        features: unit image features that no model has shaped, less the shift of the domain, `(n, dim)`.
    """
    return nearest(unit(features @ whitening(features, SHRINKAGE)), NEIGHBOURS)[0]


def judge(found: Sequence[Evidence], share: float, told: Duel | None = None) -> Verdict:
    """Whether a method is to be preferred to zero-shot.

    Args:
        found: of each of its models; at least one.
        share: of the domain's centre that zero-shot subtracts, see :mod:`models.judge.shift`; 0 to 1.
        told: the hearing of the images' texts; None where there are none that are worth anything.
    """
    vouched, won, error = (
        sum(values) / len(found) for values in zip(*((each.vouched, *each.duel) for each in found), strict=True)
    )
    score = vouched + SHARE * share
    witnesses = "neighbours"
    if told is not None:
        witnesses, (won, error) = "the images' texts", told
    said = f"duel with zero-shot {won:+.3f} (±{error:.3f})"
    if won <= ERRORS * error:
        asked = f"{said}, and more than {ERRORS:g} standard errors, {ERRORS * error:.3f}, are asked for"
        return Verdict(False, f"{witnesses} do not vouch for it ({asked})", score)
    if told is not None:
        return Verdict(True, f"{witnesses} vouch for it ({said})", score)
    said = f"agreement with neighbours {vouched:.2f}, {share:.2f} of the centre is no class: together {score:.2f}"
    reason = "neighbours vouch for it" if score > BAR else "neighbours vouch for it, but not enough"
    return Verdict(score > BAR, f"{reason} ({said}, and more than {BAR:g} is asked for)", score)
