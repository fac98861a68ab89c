"""Matrix products in the whole width of the processor.

PyTorch multiplies float32 matrices on x86 by Intel's MKL, which takes half of the width of other makers' processors:
AVX2 where they have AVX-512. oneDNN, which PyTorch has for convolutions and bfloat16, takes all of it
(`python -m benchmarks.products`). Sums are added in another order, as on another processor; nothing is rounded more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_LEAST = 1 << 20
"""Multiplications of a product that gains more than the way to it costs."""


def fast_products() -> contextlib.AbstractContextManager[Any]:
    """Within it, in this thread and backward too, large products of float32 matrices go to oneDNN where MKL is slow."""
    return _Products() if _is_slow() else contextlib.nullcontext()


@functools.cache
def _is_slow() -> bool:
    """Whether MKL leaves half of this processor idle.

    Asked of the processor, not of a stopwatch: the last bits of results depend on which way products go.
    """
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0]
        slow = "GenuineIntel" not in told and " avx512f " in told
        if slow:  # attention's own path for inference multiplies where nobody can step in
            torch.backends.mha.set_fastpath_enabled(False)
        return slow
    return False


class _Products(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        how = _WAYS.get(func)
        if how is not None and not kwargs and (found := how(*args)) is not None:
            return found
        return func(*args, **(kwargs or {}))


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    return _product(a, b.t(), None)


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return _product(a, b.t(), bias) if bias.ndim == 1 and len(bias) == b.shape[1] else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``x @ weight.T + bias`` of ``(..., k)`` and ``(n, k)``; None where it is not for oneDNN."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or x.ndim < 2:
        return None
    if x.numel() * len(weight) < _LEAST:
        return None
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # as torch.compile calls it
    return found


_WAYS: dict[Any, Callable[..., Tensor | None]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.linear.default: _product,
}
