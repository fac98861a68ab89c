"""A map: many dimensions on a plane, neighbours beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERPLEXITY = 30
DIMENSIONS = 50
"""Kept before t-SNE, as its authors do."""
FEW = 100
"""Of so few rows the groups are a speck each; they are moved apart until every one can be seen."""


def flat(kinds: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) of several kinds of rows together, the same for the same rows.

    Each kind is laid around its own mean, as image and text features of a CLIP otherwise lie apart.

    Args:
        kinds: unit rows ``(n_i, dim)``, of images and of texts say.

    Returns:
        places ``(sum of n_i, 2)``; none where there are fewer than four rows, or all are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = np.concatenate([kind - kind.mean(axis=0) for kind in kinds]).astype(np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    if len(rows) < 4 or np.allclose(rows, rows[0]):
        return np.zeros((0, 2))
    # Sums over threads come out in any order, and t-SNE makes much of little.
    with threadpool_limits(1):
        few = PCA(min(DIMENSIONS, *rows.shape), random_state=seed).fit_transform(rows)
        perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
        found = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(few)
    return apart(found) if len(found) <= FEW else found


def apart(places: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Places moved, no further than it takes, until none lies on another: neighbours stay neighbours.

    Args:
        places: ``(n, 2)``.

    Returns:
        ``(n, 2)``, with about ``0.4 / sqrt(n)`` of the larger side between any two.
    """
    n = len(places)
    least = 0.4 / np.sqrt(n) * np.ptp(places, axis=0).max()
    angle = np.arange(n) * 2.4  # so that no two that coincide go the same way
    found = places + 1e-3 * least * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for _ in range(rounds):
        between = found[:, None] - found[None]
        distance = np.linalg.norm(between, axis=2)
        np.fill_diagonal(distance, np.inf)
        lacking = np.maximum(least - distance, 0)
        if lacking.max() < 0.02 * least:
            break
        found = found + (between * (lacking / distance / 2)[:, :, None]).sum(axis=1)
    return found
