"""Learning rates and step counts."""

import math


def warmup_cosine(step: int, base: float, warmup: int, total: int) -> float:
    """Learning rate at a step: linear warm-up, then a cosine down to 0 (LatteCLIP 3.2).

    `base (step + 1) / warmup` while `step < warmup`, then `base/2 (1 + cos(pi (step - warmup) / (total - warmup)))`.

    Args:
        step: global step, `0 <= step < total`.
        base: highest rate, reached at `step = warmup - 1`.
        warmup: steps of warm-up, at least 0. When `warmup >= total` the run ends inside the warm-up.
        total: steps of the whole run.

    Raises:
        ValueError: the step lies outside the run, or the warm-up is negative.
    """
    if not 0 <= step < total or warmup < 0:
        raise ValueError(f"need 0 <= step < total and warmup >= 0, got step={step}, total={total}, warmup={warmup}")
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def steps_per_epoch(n_images: int, batch_size: int, workers: int = 1) -> int:
    """Full batches that cover a domain once, rounded up to the same number for every loader worker (LatteCLIP 3.3).

    `workers * ceil(ceil(n_images / batch_size) / workers)`: 3948 images, batches of 512 and 3 workers give 9.

    Raises:
        ValueError: an argument is below 1.
    """
    if min(n_images, batch_size, workers) < 1:
        raise ValueError(f"need at least 1 of each, got {n_images} images, batch {batch_size}, {workers} workers")
    return workers * math.ceil(math.ceil(n_images / batch_size) / workers)
