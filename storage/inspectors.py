"""Inspection in processes of its own: a decoder that crashes, hangs or eats memory costs one image, never the run.

A process has no open files but two pipes, may write no file, and is bounded in memory and in processor time. A batch
goes in as lengths and bytes; for each image a line of JSON comes back, and behind it what else there is to tell of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

from latteflow.storage.errors import StorageError
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, RejectReason, inspect

SECONDS = 20
"""Processor time for a batch, or for one image where a batch took longer. The largest sound ones need a fifth of it."""

BYTES_PER_PIXEL = 16
"""Memory of a process for each pixel that an image may have."""

Taken = TypeVar("Taken")
_READY = b"ready\n"
_PIPE = 1 << 20
"""Bytes on their way before a process has to wait for the other; as many as Linux gives to anybody."""
_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP}


class Inspectors:
    """A few processes that inspect batches of images; safe to call from many threads.

    Args:
        limits: see :class:`~storage.images.ImageLimits`.
        processes: at most so many, started when they are needed.
        seconds: processor time for a batch; one that takes longer is looked at again image by image.
        arguments: further ones for the program.
    """

    program: ClassVar = ["-m", "latteflow.storage.inspectors"]

    def __init__(self, limits: ImageLimits, processes: int, seconds: float = SECONDS, *arguments: str) -> None:
        self._limits, self._processes, self._seconds, self._arguments = limits, processes, seconds, arguments
        self._command = [sys.executable, "-P", *self.program]
        self._ready: set[int] = set()
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def start(self, processes: int) -> None:
        """Start some processes already, without waiting for them: that takes them a moment."""
        held = [self._idle.get() for _ in range(self._processes)]
        for number, process in enumerate(held):
            self._idle.put(process or (self._start() if number < processes else None))

    def __call__(self, batch: Sequence[bytes], most: int | None = None) -> list[ImageInfo | ImageRejected]:
        """What each image is, or why it is refused, in order.

        Args:
            most: pixels of an image, where these have a lower limit than others.

        Raises:
            StorageError: the process cannot be started at all.
        """
        return self.each(batch, lambda info, _: info, most)

    def each(
        self, batch: Sequence[bytes], take: Callable[[ImageInfo, bytes], Taken], most: int | None = None
    ) -> list[Taken | ImageRejected]:
        """What ``take`` makes of each image, or why it is refused, in order.

        Args:
            take: called with what an image is, and what the program says beyond that, one image after the other, while
                the process goes on with the next. It may be called again for images that were answered.
            most: as for a call.

        Raises:
            StorageError: the process cannot be started at all.
        """
        if not batch:
            return []
        most = self._limits.max_pixels if most is None else min(most, self._limits.max_pixels)
        answers = self._ask(batch, most, take)
        if isinstance(answers, list):
            return answers
        if len(batch) > 1 or answers in _FROM_OUTSIDE:
            # Something in the batch broke the decoder, or somebody ended the process: once more, one by one.
            alone = [self._ask([data], most, take) for data in batch]
            return [found[0] if isinstance(found, list) else self._refused(found) for found in alone]
        return [self._refused(answers)]

    def __enter__(self) -> Inspectors:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def _ask(
        self, batch: Sequence[bytes], most: int, take: Callable[[ImageInfo, bytes], Taken]
    ) -> list[Taken | ImageRejected] | int:
        """The answers, or the code with which the process ended."""
        process, sound = self._idle.get(), False
        try:
            process = process or self._start()
            assert process.stdin is not None and process.stdout is not None
            if process.pid not in self._ready:
                if process.stdout.readline() != _READY:
                    raise StorageError(f"images cannot be inspected: `{' '.join(self._command)}` does not start")
                self._ready.add(process.pid)
            answers: list[Taken | ImageRejected] = []
            try:
                header = struct.pack(f"<IQ{len(batch)}Q", len(batch), most, *map(len, batch))
                process.stdin.write(b"".join([header, *batch]))
                process.stdin.flush()
            except OSError:
                return _code(process)
            for _ in batch:
                found = _answer(process.stdout)
                if found is None:
                    return _code(process)
                answers.append(found if isinstance(found, ImageRejected) else take(*found))
            sound = True
            return answers
        finally:
            if not sound and process is not None:
                self._ready.discard(process.pid)
                _end(process)
            self._idle.put(process if sound else None)

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        return subprocess.Popen(
            [*self._command, json.dumps(asdict(self._limits)), str(self._seconds), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=_PIPE,
            # Memory is counted as it is asked for, and numpy's library asks for some for each processor.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )

    def _refused(self, code: int) -> ImageRejected:
        if code == -signal.SIGPROF:
            how = f"did not finish in {self._seconds:g} s of processor time"
        else:
            how = f"ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
        return ImageRejected(RejectReason.DECODER_FAILED, f"the decoder {how}")


def _code(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:  # it is alive and does not speak
        return 1


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()


def _answer(out: IO[bytes]) -> tuple[ImageInfo, bytes] | ImageRejected | None:
    """Of one image; None where the process ended before."""
    line = out.readline()
    if not line.endswith(b"\n"):
        return None
    found = json.loads(line)
    if len(found) == 2:
        return ImageRejected(RejectReason(found[0]), found[1])
    *info, size = found
    beyond = out.read(size)
    return (ImageInfo(*info), beyond) if len(beyond) == size else None


def serve(
    show: Callable[[bytes, ImageLimits], tuple[ImageInfo, bytes]], bytes_per_pixel: int = BYTES_PER_PIXEL
) -> None:
    """What a process does: answer batches until its input ends.

    Args:
        show: what an image is, and what else there is to tell of it; raises ImageRejected.
        bytes_per_pixel: memory that the largest image may take.
    """
    limits, seconds = ImageLimits(**json.loads(sys.argv[1])), float(sys.argv[2])
    source, out = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    _confine(limits, bytes_per_pixel)
    out.write(_READY)
    out.flush()
    while header := source.read(12):
        count, most = struct.unpack("<IQ", header)
        sizes = struct.unpack(f"<{count}Q", source.read(8 * count))
        batch = [source.read(size) for size in sizes]
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        for data in batch:
            beyond = b""
            try:
                info, beyond = show(data, replace(limits, max_pixels=most))
                answer: list[Any] = [*astuple(info), len(beyond)]
            except ImageRejected as rejected:
                answer = [rejected.reason.value, rejected.detail]
            out.write(json.dumps(answer).encode() + b"\n")
            out.write(beyond)
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.flush()


def _confine(limits: ImageLimits, bytes_per_pixel: int) -> None:
    import resource

    memory = (1 << 30) + 2 * limits.max_bytes + bytes_per_pixel * limits.max_pixels
    for what, most in [(resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]:
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is in force already
            resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    serve(lambda data, limits: (inspect(data, limits), b""))
