"""What can be done with texts about differences at inference: PC-CLIP 5.3, 5.4 and 6.1. Features in, answers out.

Nothing here is trained, and nothing looks at a label: it works for a tuned CLIP and for an untouched one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
ALPHA = 0.9
"""Share of a class's own text in comparative prompting. Fixed: without labels there is nothing to choose it by."""


def unit(x: Floats) -> Floats:
    """Rows scaled to length 1 (last dimension); a zero row stays zero."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12))


def difference_scores(first: Floats, second: Floats, texts: Floats) -> Floats:
    """How well each text says how the first image differs from the second; above 0 it is taken to be true (6.1).

    Args:
        first, second: image embeds, ``(n, dim)``.
        texts: text embeds, ``(n, dim)``.

    Returns:
        Cosines of the texts and the differences of the unit image features, ``(n,)``; 0 for two images that are alike.
    """
    delta = unit(unit(first) - unit(second))
    return np.asarray((delta * unit(texts)).sum(-1))


def difference_accuracy(scores: Floats) -> float:
    """Share of true statements that are taken to be true; chance is 0.5, and a tie is wrong."""
    return float((scores > 0).mean())


def projections(images: Floats, text: Floats) -> Floats:
    """Where each image lies along the direction of a text about a difference, ``(n,)`` (6.1).

    The sign of a pair's score is the sign of the difference of its two projections, so sorting by them answers for all
    pairs at once.

    Args:
        images: image embeds, ``(n, dim)``.
        text: text embed, ``(dim,)``.
    """
    return np.asarray(unit(images) @ unit(text))


def ranking(images: Floats, text: Floats) -> NDArray[np.int64]:
    """Image numbers, those first of which the text is truest, ``(n,)``; of equals the earlier first."""
    return np.argsort(-projections(images, text), kind="stable")


def soft_confusion(probabilities: Floats) -> Floats:
    """How much the model confuses two classes, without labels: ``C[a, b] = sum_x p_a(x) p_b(x)``, 0 for a = b (5.4).

    Args:
        probabilities: ``(n, classes)``.

    Returns:
        Symmetric, ``(classes, classes)``.
    """
    found = probabilities.T @ probabilities
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def confused_pairs(confusion: Floats, count: int) -> list[tuple[int, int]]:
    """The pairs of classes with the largest entries above the diagonal, each in both orders (5.4).

    Of equals the first in order of rows; pairs that are never confused are left out.
    """
    i, j = np.triu_indices(len(confusion), 1)
    values = confusion[i, j]
    best = [k for k in np.argsort(-values, kind="stable")[:count].tolist() if values[k] > 0]
    return [pair for k in best for pair in ((int(i[k]), int(j[k])), (int(j[k]), int(i[k])))]


def oracle_pairs(confusion: NDArray[Any], count: int) -> list[tuple[int, int]]:
    """The official choice: the largest cells of a confusion matrix *with labels*, truth first. For benchmarks only."""
    counts = np.array(confusion, np.float64)
    np.fill_diagonal(counts, -1)
    best = np.argsort(-counts, axis=None, kind="stable")[:count]
    return [(int(k) // len(counts), int(k) % len(counts)) for k in best]


def compare_prompts(
    prototypes: Floats, pairs: Sequence[tuple[int, int]], differences: Floats, alpha: float = ALPHA
) -> Floats:
    """Comparative prompting: class texts corrected by texts about how classes differ (5.3).

    As ``c`` points from class b to class a, ``t_a - c`` is a second estimate of class b, whose first is ``t_b``. Only
    the second class of a pair changes: ``t'_b = unit(alpha t_b + (1 - alpha) mean_a(t_a - c))``.

    Args:
        prototypes: ``t``, unit rows, ``(classes, dim)``.
        pairs: ``(a, b)`` of each text.
        differences: ``c``, features of the texts about how a differs from b, ``(pairs, dim)``.
        alpha: share of the class's own text.

    Returns:
        Unit rows, ``(classes, dim)``; those of classes that are second in no pair are as they were.
    """
    found = np.array(prototypes)
    c = unit(differences)
    for b in {b for _, b in pairs}:
        estimates = [prototypes[a] - c[k] for k, (a, second) in enumerate(pairs) if second == b]
        found[b] = unit(alpha * prototypes[b] + (1 - alpha) * np.mean(estimates, axis=0))
    return found
