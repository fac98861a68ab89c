"""A clock that a test sets: for a server, its database and its workers, not for the test itself.

Processes that are started with its environment ask libfaketime what time it is. Waiting takes as long as ever.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import libfaketime

HERE = Path(__file__).parent
_LOOK_S = 1
"""How often a process reads what the clock was set to."""


class Clock:
    """Runs as the real one does, so many seconds ahead of it; it can be set while processes look at it."""

    def __init__(self, folder: Path) -> None:
        self._now, self._history = folder / "clock.now", folder / "clock.history"
        self._ahead = 0.0
        self._set(0.0)

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that shall believe it; `moved/sitecustomize.py` is for those that speak to SeaweedFS."""
        library = next(Path(libfaketime.__file__).parent.rglob("libfaketime.so.1"))
        return {
            "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(self._now),
            "FAKETIME_CACHE_DURATION": str(_LOOK_S), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
            "CLOCK_HISTORY": str(self._history),
        }  # fmt: skip

    def time(self) -> float:
        """Seconds since 1970, by this clock."""
        return time.time() + self._ahead

    def set(self, moment: datetime) -> None:
        """It is that time now, for everybody."""
        self._set(moment.timestamp() - time.time())
        time.sleep(2 * _LOOK_S)

    def _set(self, ahead: float) -> None:
        self._ahead = ahead
        with self._history.open("a") as file:
            file.write(f"{time.time()} {ahead}\n")
        new = self._now.with_suffix(".new")
        new.write_text(f"{ahead:+.3f}\n")
        new.replace(self._now)
