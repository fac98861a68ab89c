"""Seconds and peak memory of anchored transduction on made-up features.

python -m benchmarks.transduction [--images 50000] [--classes 100] [--dim 384] [--threads 2]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
import torch.nn.functional as F

from latteflow.models.methods.transduction import TransductionSettings
from latteflow.models.methods.transduction.tuning import transduce

LIMIT = 60.0
"""Seconds, for 50,000 images and 100 classes in 384 dimensions on 2 cores."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=50_000)
    options.add_argument("--classes", type=int, default=100)
    options.add_argument("--dim", type=int, default=384)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(chosen.classes, chosen.dim, generator=generator), dim=1)
    truth = torch.randint(chosen.classes, (chosen.images,), generator=generator)
    images = F.normalize(classes[truth] + 0.1 * torch.randn(chosen.images, chosen.dim, generator=generator), dim=1)
    texts = F.normalize(classes + 0.1 * torch.randn(chosen.classes, chosen.dim, generator=generator), dim=1)
    # To the end, so that the time is that of a domain which does not settle.
    cfg = TransductionSettings(tolerance=0)
    before, begin, used = megabytes(), time.perf_counter(), time.process_time()
    found = transduce(cfg, images, texts, 40.0)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    sys.stdout.write(
        f"{chosen.images} images x {chosen.classes} classes x {chosen.dim} dimensions, {chosen.threads} threads, "
        f"{found.steps} steps: {seconds:.1f} s ({seconds / LIMIT:.0%} of the limit of {LIMIT:.0f} s), "
        f"{used:.1f} s of processor time, "
        f"peak {megabytes() - before:.0f} MB above the {before:.0f} MB before\n"
    )


def megabytes() -> float:
    """Most memory the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
