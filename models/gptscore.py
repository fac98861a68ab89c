"""GPTScore: a multimodal model classifies an image by how likely it finds "A photo of CLASS" (6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Normalise = Literal["mean", "sum", "class_tokens_mean"]
"""mean: over the phrase's tokens, so that short names have no advantage. sum: the likelihood itself.
class_tokens_mean: over the class name's tokens alone."""


def score(logprobs: Sequence[float], normalise: Normalise = "mean", *, prefix: int = 0) -> float:
    """Length-normalised log-likelihood of a phrase.

    Args:
        logprobs: of each token of the phrase after those before it and the image.
        prefix: tokens of the phrase before the class name, for class_tokens_mean.

    Raises:
        ValueError: there is no token to score.
    """
    counted = logprobs[prefix:] if normalise == "class_tokens_mean" else logprobs
    if not counted:
        raise ValueError(f"a phrase of {len(logprobs)} tokens has none to score after the first {prefix}")
    return sum(counted) if normalise == "sum" else sum(counted) / len(counted)
