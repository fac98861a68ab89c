"""Anchored transduction: all images of a domain classified together, on frozen features, without labels.

A Gaussian mixture with one covariance and a graph of nearest neighbours, held by the class texts in two ways: a KL term
ties each image's classes to what its text similarities say (TransCLIP, arXiv 2406.01837), and pseudo-images at the
texts' place tie each class's mean, so that a class without images keeps its text (StatA, arXiv 2501.03729). What is our
own, and why, is in docs/methods.md.

With unit image features `x`, class texts `t`, the CLIP's scale `s` and shapes `(n, d)` and `(c, d)`:

1. `u = (C + shrinkage |C|)^(-1/2) x`, with C the features' second moment and |C| its largest eigenvalue.
2. `y = (1 - spread) softmax(s x t) + spread (mean of the neighbours' y)`, by ROUNDS rounds and fixed from here on: what
   the texts say travels along the graph of nearest images by `x` (label propagation, as ZLaP, arXiv 2404.04072).
3. Until nothing moves: `mu_k = (sum_i z_ik u_i + anchor a_k) / (sum_i z_ik + anchor)`,
   `z_i = softmax(ln y_i + kappa u_i mu_k)`.

In 3 a Gaussian's `-|mu|^2 / 2` is left out: an image at the centre of the domain, u = 0, shall say nothing about the
class, and classes with faint means are not favoured. `kappa` makes both terms equally large at the start, in standard
deviation, so that no temperature is left to be chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.vectors import at_least_float32

ROUNDS = 30
"""Of 2.; what is then left to travel is `spread ** ROUNDS`, nothing by default."""
BLOCK_NUMBERS = 1 << 23
"""Numbers in a block of similarities: 32 MB, whatever the number of images."""
FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class Transduction:
    """What a domain of n images taught.

    Args:
        assignments: soft classes of the images, `(n, classes)`, rows sum to 1; float32.
        classifier: `(classes, dim)`; `x @ classifier.T` is `s x t + kappa u mu`, the logits of any image, seen or not,
            without its neighbours.
        steps: how often 3. was done.
        change: mean total variation between the last two assignments, 0 to 1.
    """

    assignments: Tensor
    classifier: Tensor
    steps: int
    change: float

    @property
    def labels(self) -> Tensor:
        """Best class of each image, `(n,)` int64."""
        return self.assignments.argmax(1)

    @property
    def prototypes(self) -> Tensor:
        """`classifier` with unit rows: for where a classifier must be unit rows, as in an export. `(classes, dim)`."""
        return F.normalize(self.classifier, dim=1)


def transduce(
    cfg: TransductionSettings,
    image_features: Tensor,
    class_texts: Tensor,
    scale: float,
    beliefs: Tensor | None = None,
) -> Transduction:
    """Classify all images of a domain together.

    Deterministic, uses no random numbers, and does not depend on the images' order but for the last bits of sums.

    Args:
        cfg: the settings.
        image_features: unit rows, `(n, dim)`, n >= 1; a zero row (an image equal to the centre) is allowed.
        class_texts: unit rows, `(classes, dim)`.
        scale: `exp(logit_scale)` of the CLIP.
        beliefs: logits of what else is known of each image, `(n, classes)`, added to those of its class texts in 2.

    Raises:
        ValueError: shapes that do not belong together, fewer than 2 classes, no image, or a value that is not finite.
    """
    x, texts = at_least_float32(image_features), at_least_float32(class_texts)
    if x.ndim != 2 or texts.ndim != 2 or x.shape[1] != texts.shape[1] or not len(x) or len(texts) < 2:
        raise ValueError(
            "transduce needs (n, dim) image features and (classes, dim) class texts with n >= 1 and 2 classes or more, "
            f"got {tuple(x.shape)} and {tuple(texts.shape)}"
        )
    if not (x.isfinite().all() and texts.isfinite().all()):
        raise ValueError("transduce needs finite features: embed the images again, or drop the rows with NaN")
    whiten = whitening(x, cfg.shrinkage)
    u, anchors = x @ whiten, texts @ whiten
    logits = scale * x @ texts.T
    deviation = float(logits.std(correction=0))
    if beliefs is not None:
        logits += beliefs
    z = propagate(logits.softmax(1), *nearest(x, cfg.neighbours), cfg.spread).clamp_(min=FLOOR)
    log_beliefs = z.log()
    del logits
    # The texts lie far from the images; at this length they reach as far as an image of their class does on average.
    best = anchors[z.argmax(1)]
    anchors = anchors * ((u * best).sum() / best.square().sum().clamp(min=FLOOR)).clamp(min=0)
    kappa, change, steps = 0.0, 1.0, 0
    means = anchors
    while steps < cfg.max_steps and change > cfg.tolerance:
        means = (z.T @ u + cfg.anchor * anchors) / (z.sum(0)[:, None] + cfg.anchor)
        evidence = u @ means.T
        if not steps:
            kappa = deviation / max(float(evidence.std(correction=0)), FLOOR)
        after = evidence.mul_(kappa).add_(log_beliefs).softmax(1)
        change = float((after - z).abs_().sum() / 2 / len(z))
        z, steps = after, steps + 1
    classifier = scale * texts + kappa * means @ whiten
    return Transduction(assignments=z, classifier=classifier, steps=steps, change=change)


def nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest others of each image by cosine, block by block, so that memory does not grow with n squared.

    Args:
        features: unit rows, `(n, dim)`.
        k: how many; fewer where there are not so many.

    Returns:
        Rows of `features` `(n, k)`, best first, and their weights `(n, k)`: cosines, at least 0, that sum to 1 in a
        row, or to 0 where all are 0.
    """
    k = min(k, len(features) - 1)
    rows = torch.empty((len(features), k), dtype=torch.int64, device=features.device)
    weights = features.new_empty((len(features), k))
    size = max(1, BLOCK_NUMBERS // len(features))
    for start in range(0, len(features), size):
        block = slice(start, start + size)
        cosines = features[block] @ features.T
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + start] = -2
        best = cosines.topk(k, dim=1)
        rows[block], weights[block] = best.indices, best.values
    weights.clamp_(min=0)
    return rows, weights / weights.sum(1, keepdim=True).clamp(min=FLOOR)


def propagate(beliefs: Tensor, rows: Tensor, weights: Tensor, spread: float) -> Tensor:
    """Beliefs after ROUNDS rounds of `(1 - spread) own + spread neighbours'`, `(n, classes)`; rows keep their sums.

    Args:
        beliefs: `(n, classes)`; they are each image's own in every round.
        rows, weights: from `nearest`, `(n, k)`. An image without any weight keeps its own beliefs.
        spread: 0 to 1.
    """
    share = spread * weights.sum(1, keepdim=True)
    own, found = (1 - share) * beliefs, beliefs
    for _ in range(ROUNDS if spread else 0):
        after = own.clone()
        for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):  # never (n, k, classes) at once
            after.addcmul_(found[row], weight[:, None], value=spread)
        found = after
    return found


def whitening(features: Tensor, shrinkage: float) -> Tensor:
    """`(C + shrinkage |C|)^(-1/2)`, symmetric `(dim, dim)`, with C the second moment and |C| its largest eigenvalue.

    Directions in which all images of the domain vary (pose, colour, drawing style) count less. Relative to |C| it does
    not matter how long the features are; with a large shrinkage it tends to a multiple of the identity.
    """
    moment = features.T.double() @ features.double() / len(features)
    values, vectors = torch.linalg.eigh(moment)
    largest = values[-1].clamp(min=FLOOR)
    return ((vectors * (values.clamp(min=0) + shrinkage * largest).rsqrt()) @ vectors.T).to(features.dtype)
