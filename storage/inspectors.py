"""Inspection in processes of its own: a decoder that crashes, hangs or eats memory costs one image, never the run.

A process has no open files but two pipes, may write no file, and is bounded in memory and in processor time. A batch
goes in as lengths and bytes, and one line of JSON comes back.
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
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, ClassVar

from latteflow.storage.errors import StorageError
from latteflow.storage.images import ImageInfo, ImageLimits, ImageRejected, RejectReason, inspect

SECONDS = 20
"""Processor time for a batch, or for one image where a batch took longer. The largest sound ones need a fifth of it."""

_READY = b"ready\n"
_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP}


class Inspectors:
    """A few processes that inspect batches of images; safe to call from many threads.

    Args:
        limits: see :class:`~storage.images.ImageLimits`.
        processes: at most so many, started when they are needed.
        seconds: processor time for a batch; one that takes longer is looked at again image by image.
    """

    program: ClassVar = ["-m", "latteflow.storage.inspectors"]

    def __init__(self, limits: ImageLimits, processes: int, seconds: float = SECONDS) -> None:
        self._limits, self._processes, self._seconds = limits, processes, seconds
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
        if not batch:
            return []
        most = self._limits.max_pixels if most is None else min(most, self._limits.max_pixels)
        answers = self._ask(batch, most)
        if isinstance(answers, list):
            return answers
        if len(batch) > 1 or answers in _FROM_OUTSIDE:
            # Something in the batch broke the decoder, or somebody ended the process: once more, one by one.
            alone = [self._ask([data], most) for data in batch]
            return [found[0] if isinstance(found, list) else self._refused(found) for found in alone]
        return [self._refused(answers)]

    def __enter__(self) -> Inspectors:
        return self

    def __exit__(self, *error: object) -> None:
        while not self._idle.empty():
            _end(self._idle.get())

    def _ask(self, batch: Sequence[bytes], most: int) -> list[ImageInfo | ImageRejected] | int:
        """The answers, or the code with which the process ended."""
        process, sound = self._idle.get(), False
        try:
            process = process or self._start()
            assert process.stdin is not None and process.stdout is not None
            if process.pid not in self._ready:
                if process.stdout.readline() != _READY:
                    raise StorageError(f"images cannot be inspected: `{' '.join(self._command)}` does not start")
                self._ready.add(process.pid)
            try:
                header = struct.pack(f"<IQ{len(batch)}Q", len(batch), most, *map(len, batch))
                process.stdin.write(b"".join([header, *batch]))
                process.stdin.flush()
                line = process.stdout.readline()
                sound = line.endswith(b"\n")
            except OSError:
                sound = False
            return [*map(_answer, json.loads(line))] if sound else _code(process)
        finally:
            if not sound and process is not None:
                self._ready.discard(process.pid)
                _end(process)
            self._idle.put(process if sound else None)

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        return subprocess.Popen(
            [*self._command, json.dumps(asdict(self._limits)), str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
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


def _answer(found: list[Any]) -> ImageInfo | ImageRejected:
    return ImageInfo(*found) if len(found) > 2 else ImageRejected(RejectReason(found[0]), found[1])


def _serve(limits: ImageLimits, seconds: float) -> None:
    """What a process does: answer batches until its input ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    _confine(limits)
    out.write(_READY)
    out.flush()
    while header := source.read(12):
        count, most = struct.unpack("<IQ", header)
        sizes = struct.unpack(f"<{count}Q", source.read(8 * count))
        batch = [source.read(size) for size in sizes]
        answers: list[list[Any]] = []
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        for data in batch:
            try:
                answers.append([*astuple(inspect(data, replace(limits, max_pixels=most)))])
            except ImageRejected as rejected:
                answers.append([rejected.reason.value, rejected.detail])
        signal.setitimer(signal.ITIMER_PROF, 0)
        out.write(json.dumps(answers).encode() + b"\n")
        out.flush()


def _confine(limits: ImageLimits) -> None:
    import resource

    memory = (1 << 30) + 2 * limits.max_bytes + 16 * limits.max_pixels
    for what, most in [(resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]:
        with contextlib.suppress(ValueError, OSError):  # a stricter limit is in force already
            resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    _serve(ImageLimits(**json.loads(sys.argv[1])), float(sys.argv[2]))
