"""Fashion-MNIST (Zalando SE, 2017; MIT): the domain `fashion`, and its subset `demo`, which ships with the code."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latteflow.domains.picture import Picture, Split, grey_png
from latteflow.domains.sources import SourceError, deb_folder

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover sweater",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "handbag",
    "ankle boot",
)
"""In the order of the data set's label numbers 0 to 9."""

PACKAGE = "dataset-fashion-mnist"
DEMO = Path(__file__).parent / "demo" / "fashion.npz"


def demo(work: Path) -> Iterator[Picture]:
    """The 2,000 training and 1,000 test images that ship with the repository; needs nothing from outside."""
    with np.load(DEMO, allow_pickle=False) as arrays:
        yield from _pictures("train", arrays["train_images"], arrays["train_labels"])
        yield from _pictures("test", arrays["test_images"], arrays["test_labels"])


def fashion(work: Path) -> Iterator[Picture]:
    """All 60,000 training and 10,000 test images."""
    folder = deb_folder(PACKAGE, work)
    yield from _pictures("train", *read_split(folder, "train"))
    yield from _pictures("test", *read_split(folder, "t10k"))


def read_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of the unpacked package.

    Args:
        folder: where the package was unpacked.
        prefix: `train` or `t10k`, as the files are called.

    Returns:
        Images `(n, 28, 28)` and labels `(n,)`, both uint8.
    """
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    images, labels = (_read_idx(folder / "usr/share/datasets/fashion-mnist" / name) for name in names)
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file: two zero bytes, type (8 = uint8), number of dimensions, big-endian sizes, then the values."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SourceError(f"{path.name} starts with {data[:4].hex()}, not as an IDX file of bytes; fetch it again")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape.tolist())


def _pictures(split: Split, images: np.ndarray, labels: np.ndarray) -> Iterator[Picture]:
    digits = len(str(len(images)))
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
        yield Picture(split=split, name=f"{number:0{digits}d}", png=grey_png(image), label=CLASSES[label])
