"""What surrounds the training engine in a stage: checkpoints in the store, progress, several processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latteflow.models.errors import ModelError
from latteflow.storage.errors import DataError, NotFound
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.progress import tell

Files = Mapping[str, bytes | Path]
"""Bytes, or a local file with them, by file name."""
log = logging.getLogger("latteflow.tasks")


class StoredCheckpoint:
    """The state of a run that is under way: one object, its digest before its bytes, replaced as a whole."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key = objects, key

    def read(self) -> bytes | None:
        """The newest state; None, with a warning, for one that is damaged: training begins anew."""
        try:
            found = self._objects.read(self._key)
        except NotFound:
            return None
        if hashlib.sha256(found[32:]).digest() != found[:32]:
            log.warning("%s is damaged; training begins anew", self._objects.address(self._key))
            return None
        return found[32:]

    def write(self, data: bytes) -> None:
        """Replaces the state before."""
        self._objects.put(self._key, hashlib.sha256(data).digest() + data)

    def delete(self) -> None:
        """The run is over."""
        self._objects.delete(self._key)


class Progress:
    """Tells how far a model is, and, if asked, TensorBoard of every step.

    Args:
        name: of the model.
        tensorboard: folder of the model's scalars, or None.

    Raises:
        DataError: TensorBoard is asked for and not installed.
    """

    def __init__(self, name: str, tensorboard: Path | None) -> None:
        self._name, self._writer = name, _writer(tensorboard)

    def __call__(self, done: int, total: int, stats: Mapping[str, float]) -> None:
        """Steps done, those of the run, and the last step's numbers."""
        if self._writer is not None:
            for name, value in stats.items():
                self._writer.add_scalar(name, value, done)
        tell(done, total, "steps", self._name, f"loss {stats['loss']:.4f}")

    def close(self) -> None:
        """Scalars are on the disk."""
        if self._writer is not None:
            self._writer.close()


def _writer(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DataError(
            f"training.tensorboard: the package is missing ({error}); pip install 'latteflow[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))


def in_processes(n: int, work: Callable[..., Files], *args: Any) -> Files:
    """What ``work(*args)`` gives in the first of n processes of one group.

    Each has a GPU of its own where there are any, else its share of the processor's threads.

    Args:
        work: a function of a module, and its arguments; they are sent to the processes.

    Raises:
        ModelError: of the first process.
        torch.multiprocessing.ProcessException: a process died otherwise; the others are ended.
    """
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_one, args=(n, folder, work, args), nprocs=n)
        except mp.ProcessExitedException:
            with contextlib.suppress(FileNotFoundError):
                raise ModelError(Path(folder, "error").read_text()) from None
            raise
        return {path.name: path.read_bytes() for path in Path(folder, "answer").iterdir()}


def _one(rank: int, n: int, folder: str, work: Callable[..., Files], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // n))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    try:
        answer = work(*args)
    except ModelError as error:
        if rank == 0:
            Path(folder, "error").write_text(str(error))
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "answer").mkdir()
        for name, data in answer.items():
            Path(folder, "answer", name).write_bytes(data if isinstance(data, bytes) else data.read_bytes())


@contextlib.contextmanager
def checkpoint(objects: ObjectStore, key: str) -> Iterator[StoredCheckpoint]:
    """A checkpoint that is gone when the work inside ended well."""
    found = StoredCheckpoint(objects, key)
    yield found
    found.delete()
