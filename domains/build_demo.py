"""How `fashion.npz` was made: `python -m domains.build_demo`. Nobody needs to run it; the same bytes come out."""

import tempfile
from pathlib import Path

import numpy as np

from latteflow.domains.fashion import DEMO, PACKAGE, read_split
from latteflow.domains.sources import deb_folder

SEED = 2024
N_TRAIN, N_TEST = 2000, 1000


def build(folder: Path, target: Path) -> None:
    """Choose images at random from each split of the unpacked package and write them to one npz."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for split, prefix, count in (("train", "train", N_TRAIN), ("test", "t10k", N_TEST)):
        images, labels = read_split(folder, prefix)
        chosen = rng.choice(len(images), size=count, replace=False)  # in random order
        arrays |= {f"{split}_images": images[chosen], f"{split}_labels": labels[chosen]}
    np.savez_compressed(target, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        build(deb_folder(PACKAGE, Path(work)), DEMO)
