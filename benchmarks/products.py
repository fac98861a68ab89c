"""Matrix products of a transformer's sizes, by PyTorch's own way and by `models.products`: what each reaches.

    python -m benchmarks.products

One thread, by processor time, best of five: forward, and the two products of the way back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from latteflow.models.products import fast_products

SIZES = ((1600, 384, 1536), (1600, 1536, 384), (800, 256, 1024), (2048, 2048, 2048))
"""Rows, width, width of what comes out."""


def main() -> None:
    """Print a line for each size."""
    torch.set_num_threads(1)
    for rows, width, out in SIZES:
        x, weight, gradient = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
        ways: dict[str, Callable[[], Tensor]] = {
            "forward": lambda x=x, weight=weight: x @ weight.T,
            "to inputs": lambda gradient=gradient, weight=weight: gradient @ weight,
            "to weights": lambda gradient=gradient, x=x: gradient.T @ x,
        }  # type: ignore[dict-item]
        shown = []
        for name, way in ways.items():
            plain = speed(way, 2e-9 * rows * width * out)
            with fast_products():
                fast = speed(way, 2e-9 * rows * width * out)
            shown.append(f"{name} {plain:.0f} and {fast:.0f} ({fast / plain:.2f})")
        sys.stdout.write(f"{rows} x {width} x {out}, GFLOP/s, plain and fast: {', '.join(shown)}\n")


def speed(way: Callable[[], Tensor], work: float) -> float:
    """Work by second of processor time."""
    found = []
    for _ in range(6):
        begin = time.thread_time()
        way()
        found.append(time.thread_time() - begin)
    return work / min(found[1:])


if __name__ == "__main__":
    main()
