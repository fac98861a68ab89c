"""A lease: one worker at a time, until it says that it is done or is not heard of any more.

No two clocks are compared. The holder writes a new beat every few seconds; whoever wants the lease watches, and takes
it over if no beat came for a minute of its own time. The take-over is a compare-and-set, so of many who wait one gets
it. A holder that was only slow goes on without its lease: what it writes must stay harmless, as artifacts are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latteflow.storage.errors import StorageError
from latteflow.storage.objects import ObjectStore
from latteflow.storage.register import Register

BEAT_S = 10.0
DEAD_S = 60.0
"""Without a beat for so long, a holder counts as dead."""
_LOOK_S = 2.0
log = logging.getLogger("latteflow.storage")


class Busy(StorageError):
    """Somebody else holds the lease, and is alive."""


@contextlib.contextmanager
def lease(objects: ObjectStore, key: str, *, wait: bool, dead_s: float = DEAD_S) -> Iterator[None]:
    """Hold the lease under ``key`` inside the block.

    Args:
        wait: for a living holder to end.
        dead_s: how long a silent holder is waited for.

    Raises:
        Busy: without ``wait``, somebody holds it and gave a beat while we looked.
    """
    register = Register(objects, key)
    version, me = _acquire(register, wait, dead_s), holder()
    register.clear(version)
    done = threading.Event()
    beats = threading.Thread(target=_beat, args=(register, version, me, done), daemon=True, name=f"lease {key}")
    beats.start()
    try:
        yield
    finally:
        done.set()
        beats.join()
        with contextlib.suppress(StorageError):  # then it ends by itself
            register.amend(version, {**me, "released": True})


def _acquire(register: Register, wait: bool, dead_s: float) -> int:
    seen, since = None, time.monotonic()
    told = False
    while True:
        version, held = register.read()
        if not held or held.get("released") or is_gone(held):
            if register.replace(version, holder()):
                return version + 1
            continue
        if (version, held) != seen:
            if seen is not None and not wait:
                raise Busy(f"{_words(held)} is at work on this; run again when it is done")
            seen, since = (version, held), time.monotonic()
        elif time.monotonic() - since > dead_s:
            log.warning("%s has not been heard of for %.0f s and is taken over", _words(held), dead_s)
            if register.replace(version, holder()):
                return version + 1
            continue
        if not told:
            log.info("waiting for %s", _words(held))
            told = True
        time.sleep(min(_LOOK_S, dead_s / 4))


def _beat(register: Register, version: int, me: dict[str, Any], done: threading.Event) -> None:
    count = 0
    while not done.wait(BEAT_S):
        count += 1
        try:
            if register.versions()[-1:] != [version]:
                log.warning("another worker took over, as this one was not heard of; both results are good")
                return
            register.amend(version, {**me, "beat": count})
        except StorageError as error:
            log.warning("the lease could not be renewed: %s", error)


def holder() -> dict[str, Any]:
    """This process, as others may know it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "space": _space(), "id": uuid.uuid4().hex}


def is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine (and container) that is no more."""
    if (holder.get("host"), holder.get("space")) != (socket.gethostname(), _space()) or not _space():
        return False
    return not Path(f"/proc/{holder.get('pid')}").exists()


def _space() -> str:
    """Within which process ids mean something; empty where that cannot be told."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
