"""What this machine has: packages, GPUs, and models within reach."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_PATIENCE_S = 5.0
"""Until a model hub counts as out of reach."""
_DRIVER = Path("/proc/driver/nvidia/version")


class Gpu(NamedTuple):
    """One that torch computes on; memory in bytes."""

    name: str
    memory: int

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / 2**30:.0f} GiB"


def gpus() -> list[Gpu]:
    """Those that torch sees; none where it is not installed."""
    if not has("torch"):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(each.name, each.total_memory) for each in found]


def has_driver() -> bool:
    """Whether a driver for NVIDIA's GPUs is loaded, whatever torch makes of it."""
    return _DRIVER.exists()


def room(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be made."""
    return shutil.disk_usage(there(folder)).free


def there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def has(module: str) -> bool:
    """Whether a module is installed; it is not imported."""
    return importlib.util.find_spec(module) is not None


def version(package: str) -> str | None:
    """Of an installed package, by its name or that of its module; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        named = metadata.packages_distributions().get(package)  # builds for other machines have names of their own
        return metadata.version(named[0]) if named else None


def within_reach(repository: str, config: str, weights: Sequence[str]) -> bool:
    """Whether a model is here already, or the model hub answers within seconds and has it.

    Args:
        config: a file that says what the model is.
        weights: files of which a copy on this machine has one.
    """
    import huggingface_hub as hub

    if any(isinstance(hub.try_to_load_from_cache(repository, each), str) for each in weights):
        return True
    answered = threading.Event()

    def ask() -> None:
        # Whatever goes wrong, in the client, its HTTP library or a proxy, means that it cannot be had.
        with contextlib.suppress(Exception):
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, config), timeout=_PATIENCE_S)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)  # names are looked up without a limit of time
    return answered.is_set()
