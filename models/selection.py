"""Which of several models to trust, without a label.

Accuracy cannot be seen without labels. What can be seen is whether other images vouch for a model: those that lie
nearest to an image, in features that no model has shaped, were given classes by zero-shot, and a model that has learnt
the domain's classes agrees with them, and more than zero-shot's own answers do (`vouched`). Consistency among
neighbours alone would prefer any clean clustering, also one with the wrong names; agreement with zero-shot about the
same image would prefer zero-shot.

Whether neighbours are to be believed depends on whether zero-shot knows the domain at all. The evidence for that is the
share of the domain's centre that `models.shift` found to be no class: it is large where classes that the texts name
divide the images. A method is accepted where both together, over all its seeds, reach a bar that was set on generated
domains (`benchmarks/synthetic.py`), so that at most one in twenty of the worse models passes. docs/methods.md has the
tables, those of real domains among them.

Two models of which neither is zero-shot, a champion and its challenger, are compared by a duel: where they say
different things about an image, its nearest images about which both agree are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.losses import at_least_float32, unit
from models.transduction import nearest, whitening

NEIGHBOURS = 10
LEAST_AGREEMENT = 0.2
"""Of a challenger with the champion, as Cohen's kappa: without it, a model has learnt other names."""
SHRINKAGE = 0.03
"""Of the whitening, as `models.settings.TransductionSettings` has it."""
SHARE, BAR = 0.2, 0.43
"""How much the share counts in units of `vouched`, and what both must reach: `python -m benchmarks.synthetic --fit`."""
_ROWS = 2048


@dataclass(frozen=True)
class Verdict:
    """Whether a method is to be preferred to zero-shot.

    Attributes:
        accepted: it is.
        reason: why, or why not, for people.
        score: of the evidence; accepted above BAR.
    """

    accepted: bool
    reason: str
    score: float


def duel(features: Tensor, one: Tensor, other: Tensor) -> float:
    """Whom the neighbours of disputed images vouch for.

    Disputed images are those that two models give different classes; their neighbours are the NEIGHBOURS nearest ones
    that both models give the same class.

    Args:
        features: unit image features that neither model has shaped, `(n, dim)`.
        one, other: classes, `(n,)` int64.

    Returns:
        How much larger a share of the neighbours has the class that `one` gave than that `other` gave, mean over the
        disputed images, -1 to 1; 0 where nothing is disputed, or fewer than NEIGHBOURS images are not.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(features) == len(one) == len(other):
        raise ValueError(f"need one class of each model for each image, got {len(features)}, {len(one)}, {len(other)}")
    agreed, disputed = (one == other).nonzero()[:, 0], (one != other).nonzero()[:, 0]
    if not len(disputed) or len(agreed) < NEIGHBOURS:
        return 0.0
    features = at_least_float32(features)
    vouched, known, votes = one[agreed], features[agreed].T, []
    for rows in disputed.split(_ROWS):
        near = vouched[(features[rows] @ known).topk(NEIGHBOURS, dim=1).indices]
        votes.append((near == one[rows, None]).double().mean(1) - (near == other[rows, None]).double().mean(1))
    return float(torch.cat(votes).mean())


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


def judge(vouched: Sequence[float], before: float, share: float) -> Verdict:
    """Whether a method is to be preferred to zero-shot.

    Args:
        vouched: of each of its models, see :func:`estimates`; at least one.
        before: the same of zero-shot itself.
        share: of the domain's centre that zero-shot subtracts by the images' word, see :mod:`models.shift`; 0 to 1.
    """
    mean = sum(vouched) / len(vouched)
    score = mean + SHARE * share
    said = f"agreement with what zero-shot says of neighbours {mean:.3f}"
    if mean <= before:
        return Verdict(False, f"neighbours do not vouch for it ({said}; zero-shot itself has {before:.3f})", score)
    said += f", to {before:.3f} of zero-shot itself; with {share:.2f} of the centre no class that makes {score:.3f}"
    reason = "neighbours vouch for it" if score > BAR else "neighbours vouch for it too weakly"
    return Verdict(score > BAR, f"{reason} ({said}, and more than {BAR} is asked for)", score)
