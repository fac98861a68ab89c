"""CLAMP's two losses: features in, scalars out.

`v` are image features and `t` text features, unit rows, row i of one belongs to row i of the other.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latteflow.models.vectors import at_least_float32

Reduction = Literal["mean", "sum"]
"""mean: of the batch and of the two directions, so that the loss does not grow with the batch. sum: as in the paper."""


def contrastive(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float,
    *,
    text_ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Symmetric contrastive loss in which equal texts are not each other's negatives (section 4).

    Args:
        images: `v`, unit rows, `(n, dim)`.
        texts: `t`, `(n, dim)`.
        scale: `exp(logit_scale)`.
        text_ids: `(n,)`; off the diagonal, pairs of equal ids leave both softmaxes. None: all texts are distinct.

    Returns:
        Scalar.

    Raises:
        ValueError: the shapes differ, or there are fewer than two pairs to tell apart.
    """
    _check(images, texts)
    logits = scale * at_least_float32(images) @ at_least_float32(texts).T
    diagonal = torch.arange(len(logits), device=logits.device)
    if text_ids is not None:
        same = (text_ids[:, None] == text_ids[None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    return _both([F.cross_entropy(x, diagonal, reduction=reduction) for x in (logits, logits.T)], reduction)


def distillation(
    images: Tensor,
    texts: Tensor,
    teacher: Tensor,
    *,
    teacher_scale: float,
    student_scale: Tensor | float,
    reduction: Reduction = "mean",
) -> Tensor:
    """`KL(softmax of the teacher's similarities || softmax of the student's)`, of rows and of columns (section 4).

    Args:
        images, texts: the student's, unit rows, `(n, dim)`.
        teacher: cosines of the teacher for the same pairs, `(n, n)`, rows are images.
        teacher_scale, student_scale: on the cosines of each; the paper has one constant for both.

    Returns:
        Scalar, at least 0.
    """
    _check(images, texts)
    student = student_scale * at_least_float32(images) @ at_least_float32(texts).T
    wanted = teacher_scale * at_least_float32(teacher.detach())
    kind = "batchmean" if reduction == "mean" else "sum"
    terms = [
        F.kl_div(s.log_softmax(1), w.log_softmax(1), reduction=kind, log_target=True)
        for s, w in ((student, wanted), (student.T, wanted.T))
    ]
    return _both(terms, reduction)


def _both(directions: list[Tensor], reduction: Reduction) -> Tensor:
    together = torch.stack(directions)
    return together.mean() if reduction == "mean" else together.sum()


def _check(images: Tensor, texts: Tensor) -> None:
    if images.shape != texts.shape or images.ndim != 2 or len(images) < 2:
        raise ValueError(
            f"need two (n, dim) tensors of one shape with n >= 2, got {tuple(images.shape)} and {tuple(texts.shape)}: "
            "a pair is learned from the others of its batch"
        )
