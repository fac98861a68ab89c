"""Trying again: for how long to wait for failures of a remote store that pass by themselves."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from latteflow.storage.drivers import passing, said

T = TypeVar("T")
log = logging.getLogger("latteflow.storage")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0


def retried(call: Callable[[], T], patience: float, what: str) -> T:
    """Call until it works, as long as the failure is a passing one and patience lasts; waits grow to 5 s.

    Args:
        patience: seconds to go on trying for after the first failure; a call that is under way is not cut off.
        what: the operation, for the log.
    """
    end = None
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            end = end or time.monotonic() + patience
            left = end - time.monotonic()
            if not passing(error) or left <= 0:
                raise
            # Random, so that workers that failed together do not come back together.
            wait = min(_FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0), _LONGEST_WAIT, left)
            level = logging.WARNING if attempt >= 4 else logging.DEBUG
            log.log(level, "%s: %s; trying again in %.1f s", what, said(error), wait)
        time.sleep(wait)
    raise AssertionError("the loop ends by return or raise")
