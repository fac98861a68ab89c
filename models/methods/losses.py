"""Contrastive losses: features in, scalars out; no model and no state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from latteflow.models.vectors import at_least_float32


def clip_loss(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric contrastive loss of CLIP over the n pairs of a batch (LatteCLIP 4.7).

    `L = 1/2 [mean_i CE(s v_i . t_j over j, i) + mean_j CE(s t_j . v_i over i, j)]`

    Only the diagonal is positive, so equal texts in a batch are each other's negatives: with n_k copies of text k the
    loss cannot fall below `sum_k (n_k / n) ln n_k`.

    Args:
        image_features: `v`, unit rows, `(n, dim)`.
        text_features: `t`, `(n, dim)`, row i belongs to image i. Need not be unit: LatteCLIP's targets are not.
        scale: `s = exp(logit_scale)`, positive.

    Returns:
        Scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: the two shapes differ or the batch is empty.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            f"clip_loss needs two (n, dim) tensors of one shape with n >= 1, "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    logits = scale * at_least_float32(image_features) @ at_least_float32(text_features).T
    diagonal = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
