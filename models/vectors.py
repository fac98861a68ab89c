"""Rows of features: their precision and their length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, everything else as it is: cosines in half precision resolve only 5e-4."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1 (last dimension); a zero row stays zero."""
    return F.normalize(x, dim=-1)
