"""Trying again: which failures of a remote store pass by themselves, and for how long to wait for that."""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("latteflow.storage")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
# Answers of S3 servers with status 400 that speak of the connection, not of the request.
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_LASTING_ERRNO = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOSYS,
}  # fmt: skip


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


def passing(error: BaseException) -> bool:
    """Whether trying again may help: trouble of the connection or the server, not of the request."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    status, code = answer(error)
    if status:
        return status in _PASSING_STATUS or code in _PASSING_CODES
    if isinstance(error, OSError):
        return error.errno not in _LASTING_ERRNO
    return isinstance(error, connection_errors())


def answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of the server's answer behind an error; ``(0, "")`` if it did not answer."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, Mapping):
        return 0, ""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def said(error: BaseException) -> str:
    """An error in one line, with the server's own code where it answered."""
    status, code = answer(error)
    name = f"{status} {code}" if status else type(error).__name__
    return f"{name}: {' '.join(str(error).split())}".rstrip(": ")


@functools.cache
def connection_errors() -> tuple[type[Exception], ...]:
    """What the S3 driver raises, beside OSError, when a connection fails or an answer is cut."""
    try:
        from aiohttp import ClientError
        from botocore import exceptions
        from botocore.parsers import ResponseParserError
    except ImportError:
        return ()
    cut = exceptions.IncompleteReadError, exceptions.FlexibleChecksumError, ResponseParserError
    return ClientError, exceptions.ConnectionError, exceptions.HTTPClientError, *cut


@functools.cache
def driver_errors() -> tuple[type[Exception], ...]:
    """All that the S3 driver raises beside OSError, for example for want of credentials."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return ()
    return *connection_errors(), BotoCoreError
