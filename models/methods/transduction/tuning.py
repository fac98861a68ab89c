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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.products import fast_products
from latteflow.models.rows import Filled, Matrix, Rows, Spread, block_rows, blocks, kept, room
from latteflow.models.vectors import at_least_float32

ROUNDS = 30
"""Of 2.; what is then left to travel is `spread ** ROUNDS`, nothing by default."""
COLUMN_NUMBERS = 1 << 25
"""Beliefs that travel at once: 128 MB, of which there are four at a time."""
FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class Transduction:
    """What a domain of n images taught.

    Args:
        assignments: soft classes of the images, `(n, classes)`, rows sum to 1; on disk where the images are.
        classifier: `(classes, dim)`; `x @ classifier.T` is `s x t + kappa u mu`, the logits of any image, seen or not,
            without its neighbours.
        steps: how often 3. was done.
        change: mean total variation between the last two assignments, 0 to 1.
    """

    assignments: Matrix
    classifier: Tensor
    steps: int
    change: float

    @property
    def labels(self) -> Tensor:
        """Best class of each image, `(n,)` int64."""
        return torch.cat([block.argmax(1) for _, block in blocks(self.assignments)])

    @property
    def prototypes(self) -> Tensor:
        """`classifier` with unit rows: for where a classifier must be unit rows, as in an export. `(classes, dim)`."""
        return F.normalize(self.classifier, dim=1)


class Neighbours(NamedTuple):
    """The nearest others of each image.

    Attributes:
        rows: their numbers, best first, `(n, k)` int64.
        weights: cosines, at least 0, that sum to 1 in a row, or to 0 where all are 0, `(n, k)`.
    """

    rows: Tensor
    weights: Tensor


def transduce(
    cfg: TransductionSettings,
    image_features: Matrix,
    class_texts: Tensor,
    scale: float,
    beliefs: Matrix | None = None,
    near: Neighbours | None = None,
) -> Transduction:
    """Classify all images of a domain together.

    Deterministic, uses no random numbers, and does not depend on the images' order but for the last bits of sums.
    Images are read block by block, once for each step, and need no memory where they are on disk.

    Args:
        cfg: the settings.
        image_features: unit rows, `(n, dim)`, n >= 1; a zero row (an image equal to the centre) is allowed.
        class_texts: unit rows, `(classes, dim)`.
        scale: `exp(logit_scale)` of the CLIP.
        beliefs: logits of what else is known of each image, `(n, classes)`, added to those of its class texts in 2.
        near: of the images, where they are known already, or are near by another tower.

    Raises:
        ValueError: shapes that do not belong together, fewer than 2 classes, no image, or a value that is not finite.
    """
    x, texts = image_features, at_least_float32(class_texts)
    if x.ndim != 2 or texts.ndim != 2 or x.shape[1] != texts.shape[1] or not len(x) or len(texts) < 2:
        raise ValueError(
            "transduce needs (n, dim) image features and (classes, dim) class texts with n >= 1 and 2 classes or more, "
            f"got {tuple(x.shape)} and {tuple(texts.shape)}"
        )
    x = kept(x) if isinstance(x, Rows) else at_least_float32(x)
    if not (texts.isfinite().all() and all(block.isfinite().all() for _, block in blocks(x))):
        raise ValueError("transduce needs finite features: embed the images again, or drop the rows with NaN")
    size = block_rows(max(x.shape[1], len(texts)), x.device)
    z, spread = room(len(x), len(texts), x), Spread()
    for at, block in blocks(x, size):
        logits = scale * block @ texts.T
        spread.add(logits)
        z[at] = (logits if beliefs is None else logits + beliefs[at]).softmax(1)
    if cfg.spread:
        z = propagate(z, *(near or nearest(x, cfg.neighbours)), cfg.spread)
    logs, sums, best = room(len(x), len(texts), x), _Sums(x, len(texts)), _Sums(x, len(texts))
    for (at, block), (_, believed) in zip(blocks(x, size), blocks(z, size), strict=True):
        z[at] = believed = believed.clamp(min=FLOOR)
        logs[at] = believed.log()
        sums.add(block, believed)
        best.add(block, F.one_hot(believed.argmax(1), len(texts)).to(block))
    # Everything stays in the space of x: with W the whitening, u_i mu_k is x_i (W W) mu_k.
    inverse, anchors = whitening(x, cfg.shrinkage).double(), texts.double()
    inverse = inverse @ inverse
    # The texts lie far from the images; at this length they reach as far as an image of their class does on average.
    reached, own = (best.sums @ inverse * anchors).sum(), (best.counts * (anchors @ inverse * anchors).sum(1)).sum()
    anchors = anchors * (reached / own.clamp(min=FLOOR)).clamp(min=0)
    kappa, change, steps = 0.0, 1.0, 0
    means = anchors @ inverse
    while steps < cfg.max_steps and change > cfg.tolerance:
        means = (sums.sums + cfg.anchor * anchors) / (sums.counts[:, None] + cfg.anchor) @ inverse
        if not steps:
            kappa = spread.deviation / max(_evidence(x, means).deviation, FLOOR)
        towards, sums = (kappa * means).to(x.dtype), _Sums(x, len(texts))
        moved = torch.zeros((), dtype=torch.float64, device=x.device)
        for (at, block), (_, log), (_, before) in zip(
            blocks(x, size), blocks(logs, size), blocks(z, size), strict=True
        ):
            after = (block @ towards.T).add_(log).softmax(1)
            moved += (after - before).abs_().sum()
            sums.add(block, after)
            z[at] = after
        change, steps = float(moved) / 2 / len(x), steps + 1
    classifier = scale * texts + (kappa * means).to(texts)
    return Transduction(assignments=z, classifier=classifier, steps=steps, change=change)


class _Sums:
    """Soft counts of the classes, and the sums of their images' features; float64."""

    def __init__(self, x: Matrix, n_classes: int) -> None:
        self.counts = torch.zeros(n_classes, dtype=torch.float64, device=x.device)
        self.sums = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, device=x.device)

    def add(self, block: Tensor, classes: Tensor) -> None:
        self.counts += classes.sum(0)
        self.sums += classes.T @ block


def _evidence(x: Matrix, means: Tensor) -> Spread:
    found = Spread()
    for _, block in blocks(x, block_rows(max(x.shape[1], len(means)), x.device)):
        found.add(block @ means.to(block).T)
    return found


def nearest(features: Matrix, k: int) -> Neighbours:
    """The k nearest others of each image by cosine, block by block, so that memory does not grow with n squared.

    Args:
        features: unit rows, `(n, dim)`.
        k: how many; fewer where there are not so many.
    """
    k = min(k, len(features) - 1)
    rows = torch.empty((len(features), k), dtype=torch.int64, device=features.device)
    weights = torch.empty((len(features), k), dtype=features.dtype, device=features.device)
    for at, block in blocks(features):
        best, who = block.new_empty(len(block), 0), rows.new_empty(len(block), 0)
        for among, others in blocks(features, block_rows(len(block), features.device)):
            with fast_products():
                cosines = block @ others.T
            first, last = max(at.start, among.start), min(at.stop, among.stop)
            if first < last:
                cosines[first - at.start : last - at.start, first - among.start : last - among.start].fill_diagonal_(-2)
            found = cosines.topk(min(k, len(others)), dim=1)
            best, who = torch.cat([best, found.values], 1), torch.cat([who, found.indices + among.start], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            who = who.gather(1, order)
        rows[at], weights[at] = who, best
    weights.clamp_(min=0)
    return Neighbours(rows, weights / weights.sum(1, keepdim=True).clamp(min=FLOOR))


def propagate(beliefs: Filled, rows: Tensor, weights: Tensor, spread: float) -> Filled:
    """Beliefs after ROUNDS rounds of `(1 - spread) own + spread neighbours'`, `(n, classes)`; rows keep their sums.

    Args:
        beliefs: `(n, classes)`; they are each image's own in every round.
        rows, weights: from `nearest`, `(n, k)`. An image without any weight keeps its own beliefs.
        spread: 0 to 1.
    """
    n, classes = beliefs.shape
    found = room(n, classes, beliefs)
    width = max(1, COLUMN_NUMBERS // n)  # classes know nothing of each other
    for first in range(0, classes, width):
        some = slice(first, first + width)
        if isinstance(beliefs, Tensor) and isinstance(found, Tensor):
            found[:, some] = _travelled(beliefs[:, some], rows, weights, spread)
            continue
        travelled = _travelled(torch.cat([block[:, some] for _, block in blocks(beliefs)]), rows, weights, spread)
        for at, block in blocks(found):
            block[:, some] = travelled[at]
            found[at] = block
    return found


def _travelled(beliefs: Tensor, rows: Tensor, weights: Tensor, spread: float) -> Tensor:
    share = spread * weights.sum(1, keepdim=True)
    own, found = (1 - share) * beliefs, beliefs
    for _ in range(ROUNDS if spread else 0):
        after = own.clone()
        for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):  # never (n, k, classes) at once
            after.addcmul_(found[row], weight[:, None], value=spread)
        found = after
    return found


def whitening(features: Matrix, shrinkage: float) -> Tensor:
    """`(C + shrinkage |C|)^(-1/2)`, symmetric `(dim, dim)`, with C the second moment and |C| its largest eigenvalue.

    Directions in which all images of the domain vary (pose, colour, drawing style) count less. Relative to |C| it does
    not matter how long the features are; with a large shrinkage it tends to a multiple of the identity.
    """
    moment = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for _, block in blocks(features):
        wide = block.double()
        moment += wide.T @ wide / len(features)
    values, vectors = torch.linalg.eigh(moment)
    largest = values[-1].clamp(min=FLOOR)
    return ((vectors * (values.clamp(min=0) + shrinkage * largest).rsqrt()) @ vectors.T).to(features.dtype)
