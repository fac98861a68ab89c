"""Who sees whom: text tokens are read causally, and learned prompts after them read the text without being read.

Numbers in brackets are sections of the method's description in docs/methods.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PromptMask = Literal["bidirectional", "causal", "isolated"]
"""What a prompt sees besides the text: all prompts (CLAMP), those up to itself, or none, not even itself (RPO)."""


def read_only_mask(valid: Tensor, n_prompts: int, kind: PromptMask = "bidirectional") -> Tensor:
    """Which key each query may attend to, of texts with `n_prompts` prompts after them.

    A text token sees the text up to itself and never a prompt, so its states do not depend on the prompts. Padding is
    seen by nobody. A query that would see nothing, which is padding on the left, sees itself: an empty softmax is NaN.

    Args:
        valid: False where a text is padded, on either side, `(n, length)` bool.

    Returns:
        `(n, length + n_prompts, length + n_prompts)` bool, rows are queries.
    """
    n, length = valid.shape
    size = length + n_prompts
    place = torch.arange(size, device=valid.device)
    is_prompt = place >= length
    among_prompts = {
        "bidirectional": torch.ones(size, size, dtype=torch.bool, device=valid.device),
        "causal": place[None, :] <= place[:, None],
        "isolated": torch.zeros(size, size, dtype=torch.bool, device=valid.device),
    }[kind]
    causal = place[None, :] <= place[:, None]
    allowed = torch.where(is_prompt[None, :], is_prompt[:, None] & among_prompts, causal)
    keys = torch.cat([valid, valid.new_ones(n, n_prompts)], dim=1)
    mask = allowed & keys[:, None, :]
    is_blind = ~mask.any(-1, keepdim=True)
    return mask | (is_blind & torch.eye(size, dtype=torch.bool, device=valid.device))


def positions(valid: Tensor, n_prompts: int) -> Tensor:
    """Position of each token in its own text, and of the prompts right after it, wherever the padding is.

    Args:
        valid: `(n, length)` bool.

    Returns:
        `(n, length + n_prompts)` int64; padding has the position of the token before it, or 0.
    """
    count = valid.long().cumsum(1)
    prompts = count[:, -1:] + torch.arange(n_prompts, device=valid.device)
    return torch.cat([(count - 1).clamp(min=0), prompts], dim=1)
