"""The training engine: one loop for every method that trains.

A method says what it draws, how it encodes and what it loses (`Trainable`); everything else is here, once. Each step
goes through the features: towers encode rows, the loss is taken of the features of the whole batch, and its gradient
with respect to them is what goes back through the towers. A contrastive loss couples all rows of a batch, so this one
seam gives, exactly and not as an approximation,

- micro-batches: towers hold the activations of a few rows at a time (gradient caching, arXiv 2101.06983);
- several processes: each encodes its share of the rows, all take the loss of all features, and gradients add up.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from latteflow.models.errors import ModelError
from latteflow.models.methods.remade import Remade
from latteflow.models.products import fast_products
from latteflow.models.settings import TrainingSettings

Stats = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """One step's work.

    Attributes:
        inputs: rows that towers turn into features, by kind: image numbers, token rows. Each kind is cut into
            micro-batches, and dealt to the processes, along its first dimension.
        about: what else the loss needs; small, and the same in every process.
    """

    inputs: Mapping[str, Tensor]
    about: Any = None


class Trainable(nn.Module):
    """A method in training. Parameters that require a gradient are trained; its own buffers are its state.

    Attributes:
        n_steps: steps of the whole run.
        steps_per_epoch: steps that a record of the history is the mean of.
        clip_norm: longest gradient, over all parameters; longer ones are scaled down to it.
    """

    n_steps: int
    steps_per_epoch: int
    clip_norm: float = math.inf

    def batches(self) -> Iterator[Batch]:
        """Every batch of the run in order. Draws only: a run that is gone on with draws again what is done."""
        raise NotImplementedError

    def load(self, kind: str, rows: Tensor) -> Tensor:
        """What a tower reads of these rows, for example pixels. Called in a thread, one batch ahead."""
        return rows

    def encode(self, kind: str, loaded: Tensor) -> Tensor:
        """Unit features, ``(n, dim)``. Each row by itself: rows come in parts."""
        raise NotImplementedError

    def losses(self, features: Mapping[str, Tensor], about: Any) -> dict[str, Tensor]:
        """Scalars by name, whose sum is minimized, of the features of the whole batch. Once for each step."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer | None:
        """Over the parameters; None where nothing is trained. A group may have a factor of the rate, ``lr_scale``."""
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """Of a step, ``0 <= step < n_steps``."""
        raise NotImplementedError

    def after_step(self) -> Mapping[str, float]:
        """Called when the parameters have moved; numbers for the history."""
        return {}

    def after_epoch(self) -> Mapping[str, float]:
        """Called at the end of an epoch; numbers for the history that are not means over steps."""
        return {}


class Checkpoint(Protocol):
    """Where a run that is under way is kept: a file of tensors, no code."""

    def read(self) -> bytes | None:
        """The newest, or None."""

    def write(self, data: bytes) -> None:
        """Replaces the one before."""


class NonFiniteLossError(ModelError):
    """A loss or a gradient became NaN or infinite at ``step``; the parameters are those of the step before."""

    def __init__(self, step: int, batch: Batch, losses: Mapping[str, Tensor], norm: float) -> None:
        values = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
        self.step = step
        self.rows = {kind: rows.reshape(len(rows), -1)[:, 0].tolist() for kind, rows in batch.inputs.items()}
        first = ", ".join(f"{kind} {rows[:8]}" for kind, rows in self.rows.items())
        super().__init__(
            f"step {step}: {values}, gradient {norm:g}; first rows of the batch: {first}; lower the learning rate, and "
            "look for NaN in the embeds"
        )


def train(
    method: Trainable,
    settings: TrainingSettings | None = None,
    *,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, Stats], None] | None = None,
    on_step: Callable[[int, int, Stats], None] | None = None,
) -> list[Stats]:
    """Train to the end, or on from a checkpoint to the end.

    The same arguments give the same bits on the same machine, whether or not the run was cut; global random state is
    neither used nor changed. In a process group (`torch.distributed`), every process calls it with the same
    arguments; parameters and buffers are those of the first.

    Args:
        method: changed in place.
        settings: precision, micro-batches, moving average, how often to keep a checkpoint.
        seed: of dropout.
        checkpoint: where the state goes, and where it is taken from if there is one.
        on_epoch: called with the epoch, from 0, and its record of the history, by the first process.
        on_step: called with the steps done, those of the run, and the step's numbers, by the first process.

    Returns:
        One record for each epoch: epoch, step (done so far), lr (of the last step), and the means of the losses and of
        the method's numbers.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite. The checkpoint has the step before.
        AssertionError: a frozen tensor changed.
    """
    return _Run(method, settings or TrainingSettings(), seed, checkpoint).to_the_end(on_epoch, on_step)


class _Run:
    def __init__(self, method: Trainable, settings: TrainingSettings, seed: int, checkpoint: Checkpoint | None) -> None:
        self.method, self.settings, self.seed, self.checkpoint = method, settings, seed, checkpoint
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = next(chain(method.parameters(), method.buffers()), torch.empty(0)).device
        self.trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        self.optimizer = method.optimizer()
        self.remade = Remade(method, self.autocast)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if settings.ema else {}
        self.step = 0
        self.sums: Stats = {}
        self.history: list[Stats] = []
        if checkpoint is not None and (found := checkpoint.read()):
            self.restore(found)
        self.agree(chain(self.trained.values(), self.state.values()))

    @property
    def state(self) -> dict[str, Tensor]:
        """The method's own buffers, without those of the towers inside."""
        return dict(self.method.named_buffers(recurse=False))

    def to_the_end(
        self,
        on_epoch: Callable[[int, Stats], None] | None,
        on_step: Callable[[int, int, Stats], None] | None,
    ) -> list[Stats]:
        frozen = _digest(self.frozen())
        kept = time.monotonic()
        for batch, loaded in self.ahead():
            with fast_products():
                stats = self.one(batch, loaded)
            if on_step is not None and self.rank == 0:
                on_step(self.step, self.method.n_steps, stats)
            if self.step % self.method.steps_per_epoch == 0 or self.step == self.method.n_steps:
                self.end_epoch()
                if on_epoch is not None and self.rank == 0:
                    on_epoch(len(self.history) - 1, self.history[-1])
            if time.monotonic() - kept > self.settings.checkpoint_s:
                self.keep()
                kept = time.monotonic()
        if _digest(self.frozen()) != frozen:
            raise AssertionError("a frozen tensor of the model changed: one of its towers modifies its own state")
        for name, mean in self.average.items():
            self.trained[name].data.copy_(mean)
        return self.history

    def one(self, batch: Batch, loaded: Mapping[str, Tensor]) -> Stats:
        """A step."""
        parts = {kind: self.encode(kind, rows) for kind, rows in loaded.items()}
        # The loss of all features, as leaves: what comes back to them goes on through the towers.
        features = {kind: self.gather(part.features, batch.inputs[kind]) for kind, part in parts.items()}
        with torch.set_grad_enabled(self.optimizer is not None):
            losses = self.method.losses(features, batch.about)
            loss = torch.stack(list(losses.values())).sum()
        lr, norm = self.method.learning_rate(self.step), 0.0
        if self.optimizer is not None:
            loss.backward()  # of whatever it is: to look first would stop a GPU half-way, and the norm tells as well
            for p in self.trained.values():  # Parameters of the loss itself: every process has their whole gradient.
                if p.grad is not None and self.world > 1:
                    p.grad /= self.world
            for kind, part in parts.items():
                if (gradient := features[kind].grad) is not None:
                    part.backward(self.share(gradient))
            self.add_up()
            norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.method.clip_norm))
        if not loss.isfinite() or not math.isfinite(norm):
            self.method.zero_grad()
            self.keep()
            raise NonFiniteLossError(self.step, batch, {name: value.detach() for name, value in losses.items()}, norm)
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()  # now, not before the next: towers run without the gradients in memory
        stats = {name: float(value.detach()) for name, value in losses.items()} | dict(self.method.after_step())
        stats["loss"] = float(loss.detach())
        self.agree(self.state.values())
        self.step += 1
        for name, mean in self.average.items():
            # A short memory at first: the average must forget where the parameters began.
            decay = min(self.settings.ema or 0.0, (1 + self.step) / (10 + self.step))
            mean.lerp_(self.trained[name].detach(), 1 - decay)
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        return stats | {"lr": lr}

    def end_epoch(self) -> None:
        epoch = len(self.history)
        n = self.step - epoch * self.method.steps_per_epoch
        record = {name: total / n for name, total in self.sums.items()}
        record |= {"epoch": epoch, "step": self.step, "lr": self.method.learning_rate(self.step - 1)}
        self.history.append(record | dict(self.method.after_epoch()))
        self.sums = {}

    def frozen(self) -> list[Tensor]:
        own = {id(t) for t in (*self.trained.values(), *self.state.values())}
        return [t for t in chain(self.method.parameters(), self.method.buffers()) if id(t) not in own]

    # --- batches and features -----------------------------------------------------------------------------------------

    def ahead(self) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """The batches that are left, with this process's share loaded while the batch before is in work."""

        def loaded(batch: Batch) -> dict[str, Tensor]:
            return {kind: self.method.load(kind, self.share(rows)) for kind, rows in batch.inputs.items()}

        todo = islice(self.method.batches(), self.step, None)
        with ThreadPoolExecutor(1) as pool:
            following = [(batch, pool.submit(loaded, batch)) for batch in islice(todo, 1)]
            while following:
                batch, future = following.pop()
                now = future.result()
                following = [(after, pool.submit(loaded, after)) for after in islice(todo, 1)]
                yield batch, now

    def encode(self, kind: str, loaded: Tensor) -> _Encoded:

        def one(chunk: Tensor, number: int) -> Tensor:
            # Dropout must be the same when a chunk is encoded again, and when the run is gone on with.
            random = _random(self.device, f"{self.seed} {self.step} {self.rank} {kind} {number}")
            with random, self.autocast(), self.remade():
                return self.method.encode(kind, chunk)

        chunks = loaded.split(self.settings.micro_batch or max(len(loaded), 1))
        return _Encoded(one, chunks, self.optimizer is not None)

    def autocast(self) -> torch.autocast:
        """The arithmetic inside towers."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def share(self, rows: Tensor) -> Tensor:
        """The rows that fall to this process."""
        return rows.tensor_split(self.world)[self.rank]

    def gather(self, own: Tensor, rows: Tensor) -> Tensor:
        """Features of all rows, from all processes, as a leaf."""
        features = own
        if self.world > 1:
            sizes = [len(part) for part in rows.tensor_split(self.world)]
            padded = features.new_zeros((max(sizes), *features.shape[1:]))
            padded[: len(features)] = features
            found = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(found, padded)
            features = torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])
        return features.requires_grad_(self.optimizer is not None)

    def add_up(self) -> None:
        """Gradients of all processes, in one message."""
        if self.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trained.values()]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for p, part in zip(self.trained.values(), flat.split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p)

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """What the first process has: sums of a GPU have no fixed order, and copies would drift apart."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        if self.checkpoint is None or self.rank > 0:
            return
        tensors = {f"parameter.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"state.{name}": t for name, t in self.state.items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        if self.optimizer is not None:
            for i, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in values.items()}
        progress = {"step": self.step, "sums": self.sums, "history": self.history}
        copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        self.checkpoint.write(save(copies, {"progress": json.dumps(progress)}))

    def restore(self, data: bytes) -> None:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        progress, found = json.loads(header["__metadata__"]["progress"]), load(data)
        self.step, self.sums, self.history = progress["step"], progress["sums"], progress["history"]
        for prefix, tensors in (("parameter", self.trained), ("state", self.state), ("average", self.average)):
            for name, tensor in tensors.items():
                tensor.data.copy_(found[f"{prefix}.{name}"])
        if self.optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in found.items():
                if name.startswith("optimizer."):
                    _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = tensor
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


class _Encoded:
    """Features of this process's rows. The last part keeps its graph; those before are encoded again for theirs."""

    def __init__(self, encode: Callable[[Tensor, int], Tensor], chunks: tuple[Tensor, ...], grad: bool) -> None:
        self.encode, self.chunks = encode, chunks
        *first, last = enumerate(chunks)
        with torch.no_grad():
            parts = [encode(chunk, i) for i, chunk in first]
        with torch.set_grad_enabled(grad):
            self.last = encode(last[1], last[0])
        self.features = torch.cat([*parts, self.last.detach()])

    def backward(self, gradient: Tensor) -> None:
        *first, last = gradient.split([len(chunk) for chunk in self.chunks])
        if not self.last.requires_grad:
            return  # the tower is frozen
        self.last.backward(last)
        del self.last
        for i, (chunk, part) in enumerate(zip(self.chunks, first, strict=False)):
            self.encode(chunk, i).backward(part)


@contextmanager
def _random(device: torch.device, name: str) -> Iterator[None]:
    """Global random numbers that the name decides, put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def _digest(tensors: list[Tensor]) -> int:
    digest = 0
    for t in tensors:
        digest = zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, digest)
    return digest
