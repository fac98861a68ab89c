"""Of a text tower's token table, only the rows that a domain's texts use are trained.

The table is nearly half of a small CLIP, and a domain uses a few hundred of its rows. The others have no gradient:
AdamW only decays them, all by the same factor. So one number is trained in their place, and no memory is needed for
their copy, gradients and moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Vocabulary(nn.Module):
    """The rows in use, which take the table's place in the tower until :meth:`give_back`.

    Args:
        tower: with `token_embedding`.
        tokens: of every text that will be read, int64.
    """

    used: Tensor

    def __init__(self, tower: Any, tokens: Tensor) -> None:
        super().__init__()
        whole = tower.token_embedding.weight.detach()
        self._tower, self._whole = (tower,), whole  # a tuple, so that it is no module of ours
        # In order, so that the end of a text keeps the highest number, by which towers find it; padding stays 0.
        self.register_buffer("used", torch.cat([tokens.new_zeros(1), tokens.flatten()]).unique(), persistent=False)
        self.decay = nn.Parameter(whole.new_ones(1, 1))
        tower.token_embedding = nn.Embedding.from_pretrained(whole[self.used], freeze=False)

    def numbers(self, tokens: Tensor) -> Tensor:
        """Tokens as the tower knows them now."""
        return torch.searchsorted(self.used, tokens)

    def untouched(self) -> Tensor:
        """0, with a gradient of 0 for what stands for the other rows: an optimizer decays only what has one."""
        return 0 * self.decay.sum()

    def give_back(self) -> None:
        """The tower has its whole table again, as if all of it had been trained."""
        (tower,) = self._tower
        weight = self._whole * self.decay.detach()
        weight[self.used] = tower.token_embedding.weight.detach()
        tower.token_embedding = nn.Embedding.from_pretrained(weight)


def vocabulary(clip: Any, tokens: Tensor) -> Vocabulary | None:
    """Of the table of a CLIP that is to be trained; None where it is not, or its tower wants the tokens themselves."""
    tower = clip if hasattr(clip, "token_embedding") else getattr(clip, "text", None)
    pools = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    table = getattr(tower, "token_embedding", None)
    if not isinstance(table, nn.Embedding) or not table.weight.requires_grad or pools != "argmax":
        return None
    return Vocabulary(tower, tokens)
