"""Attention pooling: one learned query reads what a language model made of the prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latteflow.models.errors import ModelError


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Multi-head attention of one query: `softmax(q K^T / sqrt(width / heads)) V` in each slice of the width (2.3).

    Args:
        query: `(width,)`.
        keys, values: `(n, prompts, width)`.

    Returns:
        The heads' results side by side, `(n, width)`.
    """
    n, _, width = keys.shape
    split = (n, -1, heads, width // heads)
    q = query.expand(n, 1, width)
    q, k, v = (x.reshape(split).transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


class AttentionPool(nn.Module):
    """Pools the last hidden states at the prompts and maps them to the width of a CLIP (2.3).

    Layer norm on the query and on the states, projections with bias, no residual.

    Args:
        lm_width: of the language model's states.
        width: of the CLIP's features.

    Raises:
        ModelError: the width cannot be cut into so many heads.
    """

    def __init__(self, lm_width: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ModelError(f"clamp.pool_heads {heads} does not divide the CLIP's width {width}; use a divisor of it")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width) / width**0.5)
        self.query_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(lm_width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(lm_width, width), nn.Linear(lm_width, width)

    def forward(self, states: Tensor) -> Tensor:
        """`(n, prompts, lm_width)` -> `(n, width)`, not normalized."""
        states = self.norm(states)
        return self.out(attend(self.q(self.query_norm(self.query)), self.k(states), self.v(states), self.heads))
