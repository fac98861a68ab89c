"""How far a stage is, and how long it will take: told at times to whoever watches, such as a log or a bar."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol

log = logging.getLogger("latteflow.tasks")


class Step(NamedTuple):
    """Where a stage is.

    Attributes:
        label: the stage, and of which of several things it tells.
        left_s: seconds, by the speed so far; None until something was done.
        note: for people.
    """

    label: str
    done: int
    total: int
    unit: str
    left_s: float | None
    note: str

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", about {duration(self.left_s)} left"
        return f"{self.label} {self.done} of {self.total} {self.unit}{left}{self.note and f', {self.note}'}"


class Watcher(Protocol):
    """Who is told."""

    every_s: float
    """Time between two words about a stage, and before the first."""

    def show(self, step: Step) -> None:
        """The stage is there now."""

    def end(self) -> None:
        """The stage is over, well or not."""


class Log:
    """A line a minute."""

    every_s = 60.0

    def show(self, step: Step) -> None:
        log.info("%s", step)

    def end(self) -> None:
        pass


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=(Log(),))
_stage: ContextVar[_Stage | None] = ContextVar("stage", default=None)


def watch(*watchers: Watcher) -> None:
    """From now on, in this context, these are told, and no others."""
    _watchers.set(watchers)


@contextlib.contextmanager
def told_as(label: str) -> Iterator[None]:
    """What is told inside is of the stage with this label."""
    stage = _Stage(label, _watchers.get())
    token = _stage.set(stage)
    try:
        yield
    finally:
        _stage.reset(token)
        stage.end()


def tell(done: int, total: int, unit: str, of: str = "", note: str = "") -> None:
    """How far the stage is that is under way here; outside of one, nobody hears.

    The first word says how much was done before, which tells nothing of the speed.

    Args:
        of: one of several things that the stage makes, each with a total of its own.
    """
    if stage := _stage.get():
        stage.tell(done, total, unit, of, note)


class _Stage:
    """Who was told when."""

    def __init__(self, label: str, watchers: tuple[Watcher, ...]) -> None:
        self._label = label
        self._heard = dict.fromkeys(watchers, time.monotonic())
        self._first: tuple[tuple[str, str, int], int, float] | None = None

    def tell(self, done: int, total: int, unit: str, of: str, note: str) -> None:
        now, phase = time.monotonic(), (unit, of, total)
        if self._first is None or self._first[0] != phase:
            self._first = phase, done, now
        _, before, since = self._first
        left = (total - done) * (now - since) / (done - before) if done > before else None
        step = Step(f"{self._label} {of}".strip(), done, total, unit, left, note)
        for watcher, heard in self._heard.items():
            if now - heard >= watcher.every_s:
                self._heard[watcher] = now
                watcher.show(step)

    def end(self) -> None:
        for watcher in self._heard:
            watcher.end()


def duration(seconds: float | None) -> str:
    """Seconds for people: 4 min."""
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
