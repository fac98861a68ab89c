"""How much of a domain's centre to take out of its image features, without a label.

Two things are in the mean of a domain's images: what all of them share (grey photos, emoji on white), which pulls
every image towards some classes and should go; and which classes there are, which should stay. Where a few classes are
present, or one outnumbers the others, the mean is mostly class, and a zero-shot that subtracts it loses what it knows.

The two zero-shots, on features as they are (plain) and with the mean taken out (centred), are hypotheses about which
images belong together. Each is given to a Gaussian mixture, which is asked how probable it makes the images:

1. `u`: the features' first principal components, `(n, r)`; `a_k`: the class texts in the same directions.
2. Beliefs `z` begin as the zero-shot's. ROUNDS times: shares `pi_k`, means
   `mu_k = (sum_i z_ik u_i + ANCHOR (c + s a_k)) / (sum_i z_ik + ANCHOR)` that texts hold in place (as in StatA, arXiv
   2501.03729), with `c` and `s` by least squares, one covariance, and `z_i = softmax_k(ln pi_k + ln N(u_i; mu_k, S))`.
3. The mixtures learn from four fifths of the images. What each of the others says for the centred hypothesis is the
   difference of `ln sum_k pi_k N(u_i; mu_k, S)`, so that every image is asked once and has had no part in the answer.

The sum over the images in units of its standard error is Vuong's statistic for models that are not nested
(Econometrica 57, 1989). With DOUBT added to it, its normal probability is the share of the mean to subtract: all or
nothing where the images say, part of it where they do not. A false hypothesis divides what is one cloud of images, or
joins what are several, and the mixture sees it in the density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latteflow.models.vectors import unit

COMPONENTS = 64
"""Principal components at most; and no more than a quarter of the images."""
ROUNDS = 10
FOLDS = 5
ANCHOR = 3.0
"""Images at its text's place that each class's mean begins with."""
DOUBT = 1.0
"""Standard errors by which images must speak for the mean: what all of them share is in it, classes may be."""
MOST_IMAGES = 20_000
"""The mixture sees so many images at most, evenly spaced; the mean is that of all."""
_TINY = 1e-9


def centre_share(image_embeds: Tensor, class_texts: Tensor, scale: float) -> float:
    """The share of the domain's mean embedding that zero-shot, and what starts from it, should subtract.

    Deterministic; needs no random numbers.

    Args:
        image_embeds: `(n, dim)`, n >= 1, not normalised.
        class_texts: unit rows, `(classes, dim)`.
        scale: `exp(logit_scale)` of the CLIP.

    Returns:
        0 (plain zero-shot) to 1 (centred). 0 for fewer than 8 images, and for images that are all the same.

    Raises:
        ValueError: a value is not finite.
    """
    if not all(bool(some.isfinite().all()) for some in (class_texts, *image_embeds.split(1 << 14))):
        raise ValueError("a domain's shift needs finite features: embed the images again, or drop the rows with NaN")
    mean = image_embeds.mean(0, dtype=torch.float64)  # not of a copy: there may be millions
    step = math.ceil(len(image_embeds) / MOST_IMAGES)
    embeds, texts = image_embeds[::step].double(), class_texts.double()
    if len(embeds) < 8 or float((embeds - mean).norm(dim=1).max()) < 1e-6 * float(mean.norm()):
        return 0.0
    features = unit(embeds - mean)
    components = _components(features)
    u, anchors = features @ components, (texts - texts.mean(0)) @ components
    u = u - u.mean(0)
    beliefs = [(scale * space @ texts.T).softmax(1) for space in (features, unit(embeds))]
    gains, fold = u.new_empty(len(u)), torch.arange(len(u), device=u.device) % FOLDS
    for asked in range(FOLDS):
        out, kept = fold == asked, fold != asked
        centred, plain = (_log_density(u[kept], anchors, z[kept], u[out]) for z in beliefs)
        gains[out] = centred - plain
    evidence = float(gains.sum()) / max(float(gains.std()) * math.sqrt(len(gains)), _TINY)
    return 0.5 * (1 + math.erf((evidence + DOUBT) / math.sqrt(2)))


def _components(features: Tensor) -> Tensor:
    """Directions in which the rows vary most, `(dim, r)`."""
    middle = features - features.mean(0)
    values, vectors = torch.linalg.eigh(middle.T @ middle)
    wanted = min(COMPONENTS, max(4, len(features) // 4), int((values > 1e-8 * values[-1]).sum()))
    return vectors[:, -wanted:]


def _log_density(u: Tensor, anchors: Tensor, beliefs: Tensor, others: Tensor) -> Tensor:
    """Of other images, up to a constant, by the mixture after ROUNDS rounds of 2. above, `(m,)`.

    Args:
        u: what is learnt from, `(n, r)`.
        anchors: `(classes, r)`.
        beliefs: `(n, classes)`, rows sum to 1.
        others: `(m, r)`.
    """
    n, r = u.shape
    moment, eye = u.T @ u, torch.eye(r, dtype=u.dtype, device=u.device)
    shrinkage = _oas(moment / n, n)
    covariance = (1 - shrinkage) * moment / n + shrinkage * moment.trace() / n / r * eye
    z = beliefs
    for _ in range(ROUNDS):
        counts = z.sum(0)[:, None]
        inverse = torch.linalg.inv(covariance)
        sums = z.T @ u
        observed = sums / counts.clamp(min=_TINY)
        # Least squares of class means on texts: a mean is as sure as its images make it, and no surer than its anchor.
        weights = counts * ANCHOR / (counts + ANCHOR)
        weights = weights / weights.sum()
        texts, means = anchors - (weights * anchors).sum(0), observed - (weights * observed).sum(0)
        along = weights * (texts @ inverse)
        slope = ((along * means).sum() / (along * texts).sum().clamp(min=_TINY)).clamp(min=0)
        held = (weights * observed).sum(0) + slope * texts
        mu = (sums + ANCHOR * held) / (counts + ANCHOR)
        cross = mu.T @ sums
        within = (moment - cross - cross.T + (mu * counts).T @ mu) / n
        covariance = (1 - shrinkage) * within + (shrinkage + 1e-4) * within.trace() / r * eye
        inverse = torch.linalg.inv(covariance)
        shares = (counts[:, 0] + 1 / len(anchors)) / (n + 1)
        bias = shares.log() - ((mu @ inverse) * mu).sum(1) / 2
        z = (u @ inverse @ mu.T + bias).softmax(1)
    quadratic = ((others @ inverse) * others).sum(1)
    return (others @ inverse @ mu.T + bias).logsumexp(1) - quadratic / 2 - torch.logdet(covariance) / 2


def _oas(covariance: Tensor, n: int) -> float:
    """Shrinkage of a covariance of n rows towards its mean variance (Chen et al., *Shrinkage Algorithms for MMSE
    Covariance Estimation*, 2010, eq. 23), 0 to 1."""
    r = len(covariance)
    squared, trace = float((covariance * covariance).sum()), float(covariance.trace())
    excess = squared - trace**2 / r
    if excess <= _TINY * squared:
        return 1.0
    return min(1.0, ((1 - 2 / r) * squared + trace**2) / ((n + 1 - 2 / r) * excess))
