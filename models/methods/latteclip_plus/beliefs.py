"""What texts about images say of their classes, and how much it is worth, without a label.

A text may know what the image features do not show, may belong to another image, or may repeat what zero-shot says
anyway. Which it is, an image's neighbours tell:

1. `z_i`, the logits of zero-shot, and `t_i`, those of the image's text: cosines with the class texts, less those of all
   texts on average, in the standard deviation of `z`.
2. `r_i`, what the neighbours believe, half from zero-shot and half from their texts: the mean of `softmax(z_j)` and
   that of `softmax(t_j)` over the nearest images j.
3. `r_i ~ softmax(a z_i + b t_i)`: a logistic regression of two weights (stacking; Wolpert, *Neural Networks* 5, 1992).

Texts of other images say nothing about neighbours, so that b is 0; what a text repeats of zero-shot is explained by a.
Texts count where b is more than ERRORS standard errors, and then weigh `FACTOR b / max(a, b)` beside zero-shot: its own
a is too large, as neighbours share its mistakes. Both were chosen on generated domains (`benchmarks/synthetic.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from latteflow.models.methods.transduction.tuning import Neighbours, nearest
from latteflow.models.rows import At, Matrix, Rows, Spread, blocks
from latteflow.models.vectors import at_least_float32, unit

ERRORS = 4.0
FACTOR = 2.0
LEAST_SPREAD = 1e-3
"""Standard deviation of cosines below which texts are taken to be all the same."""
ROUNDS = 30
"""Of Newton's method, at most."""
MOST_NUMBERS = 1 << 22
"""Images times classes that the regression sees at most; the images are evenly spaced."""
_TINY = 1e-9


class Beliefs(NamedTuple):
    """What the texts of a domain say.

    Attributes:
        weight: of the texts beside zero-shot, 0 to FACTOR; 0 where nothing shows that they know anything.
        logits: to add to those of zero-shot, `(n, classes)`, 0 where an image has no text; None where the weight is 0.
            Made as they are asked for where the texts are on disk.
    """

    weight: float
    logits: Matrix | None


def beliefs(
    image_features: Matrix,
    class_texts: Tensor,
    texts: Matrix,
    has_text: Tensor | None,
    scale: float,
    neighbours: int | Neighbours,
) -> Beliefs:
    """What texts about images say of their classes. Deterministic; needs no random numbers.

    Args:
        image_features: unit rows, `(n, dim)`.
        class_texts: unit rows, `(classes, dim)`.
        texts: embeds of texts about the images, `(n, dim)`.
        has_text: `(n,)` bool; None when all have.
        scale: `exp(logit_scale)` of the CLIP.
        neighbours: how many of an image are asked, or which.

    Raises:
        ValueError: texts are tokens, or a value is not finite.
    """
    if not texts.is_floating_point():
        raise ValueError("texts about images are needed as embeds, and are tokens")
    has = torch.ones(len(texts), dtype=torch.bool, device=texts.device) if has_text is None else has_text
    if not has.any():
        return Beliefs(0.0, None)
    classes, spread = at_least_float32(class_texts), Spread()

    def zero_shot(at: At) -> Tensor:
        return scale * at_least_float32(image_features[at]) @ classes.T

    for at, block in blocks(image_features):
        logits = zero_shot(at)
        spread.add(logits)
        if not (logits.isfinite().all() and block.isfinite().all()):
            raise ValueError("texts' beliefs need finite features: embed again, or drop the rows with NaN")
    told = text_logits(classes, texts, has)
    shape, deviation = (len(texts), len(classes)), spread.deviation
    said = told.through(lambda logits: logits * deviation)
    near = nearest(image_features, neighbours) if isinstance(neighbours, int) else neighbours
    weight = worth(Rows(shape, zero_shot, texts.device), said, has, near)
    if not weight:
        return Beliefs(0.0, None)
    weighed = said.through(lambda logits: weight * logits)
    return Beliefs(weight, weighed if isinstance(texts, Rows) else weighed[:])


def text_logits(class_texts: Tensor, texts: Matrix, has_text: Tensor) -> Rows:
    """Which class each text is about, `(n, classes)`; standard deviation 1 over the images that have one, else 0.

    Raises:
        ValueError: a text that an image has is not finite.
    """
    directions = unit(class_texts - class_texts.mean(0)).T

    def cosines(at: At) -> Tensor:
        return unit(at_least_float32(texts[at])) @ directions

    total = torch.zeros(len(class_texts), dtype=torch.float64, device=texts.device)
    spread = Spread()
    for at, block in blocks(texts):
        if not block[has_text[at]].isfinite().all():
            raise ValueError("texts' beliefs need finite features: embed again, or drop the rows with NaN")
        total += cosines(at)[has_text[at]].sum(0)
    mean = (total / has_text.sum()).to(class_texts)  # what all texts have in common is no news of an image
    for at, _ in blocks(texts):
        spread.add(cosines(at)[has_text[at]] - mean)
    length = max(spread.deviation, LEAST_SPREAD)
    return Rows(
        (len(texts), len(class_texts)),
        lambda at: torch.where(has_text[at][:, None], (cosines(at) - mean) / length, 0),
        texts.device,
    )


def worth(zero_shot: Rows, texts: Rows, has_text: Tensor, near: Neighbours) -> float:
    """How much the texts' logits weigh beside zero-shot's, 0 to FACTOR.

    Args:
        zero_shot, texts: logits, `(n, classes)`.
        has_text: `(n,)` bool.
        near: the images' neighbours.
    """
    rows, weights = near
    theirs = has_text[rows] * weights
    asked = (has_text & (theirs.sum(1) > 0)).nonzero()[:, 0]
    asked = asked[:: math.ceil(asked.numel() * texts.shape[1] / MOST_NUMBERS) or 1]
    if len(asked) < 2:
        return 0.0
    target = 0.5 * _of_neighbours(zero_shot, rows[asked], weights[asked])
    target += 0.5 * _of_neighbours(texts, rows[asked], theirs[asked])
    (own, told), error = _stacked(torch.stack([zero_shot[asked], texts[asked]]).double(), target.double())
    if told <= ERRORS * error[1]:
        return 0.0
    return FACTOR * float(told / torch.maximum(own, told))


def _of_neighbours(logits: Rows, rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the neighbours' probabilities, `(m, classes)`, rows sum to 1 but where all weights are 0."""
    weights = weights / weights.sum(1, keepdim=True).clamp(min=_TINY)
    found = torch.zeros(len(rows), logits.shape[1], dtype=weights.dtype, device=weights.device)
    for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):
        found += weight[:, None] * logits[row].softmax(1)
    return found


def _stacked(views: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `w` of the views for which `softmax(sum_v w_v views_v)` says the most of the target, and their errors.

    The errors hold whether the model is right or not (White, *Econometrica* 50, 1982).

    Args:
        views: logits, `(v, m, classes)`.
        target: probabilities, `(m, classes)`.
    """

    def loss(w: Tensor) -> float:
        return -float((target * torch.einsum("v,vnk->nk", w, views).log_softmax(1)).sum())

    w, now = views.new_zeros(len(views)), math.inf
    inverse = scores = torch.empty(0)
    for _ in range(ROUNDS):
        found = torch.einsum("v,vnk->nk", w, views).softmax(1)
        scores = ((found - target) * views).sum(2)
        means = (found * views).sum(2)
        hessian = torch.einsum("nk,vnk,wnk->vw", found, views, views) - means @ means.T
        inverse = torch.linalg.pinv(hessian, hermitian=True)
        step, before = inverse @ scores.sum(1), now
        while (now := loss(w - step)) > before and float(step.abs().max()) > _TINY:
            step = step / 2
        w = w - step
        if before - now <= _TINY * abs(now):
            break
    return w, (inverse @ (scores @ scores.T) @ inverse).diagonal().sqrt()
