"""File systems of fsspec: opened, and what their drivers raise, which each has words of its own for, sorted."""

from __future__ import annotations

import errno
import logging
import textwrap
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

import fsspec

from latteflow.storage.errors import StorageError


class Kind(StrEnum):
    """What is the matter with a file system."""

    CREDENTIALS = "credentials"
    MISSING = "missing"
    BUSY = "busy"
    NETWORK = "network"
    OTHER = "other"


_DRIVERS = {
    "adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "grpc", "msal", "requests", "s3fs",
    "urllib3",
}  # fmt: skip
"""Packages of the drivers for s3, gs and abfs, and of what they speak through."""
_OURS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
"""A driver that raises these was called wrongly."""
_NAMED = {
    "aiohttp.client_exceptions.ClientError": Kind.NETWORK,
    "azure.core.exceptions.ClientAuthenticationError": Kind.CREDENTIALS,
    "azure.core.exceptions.IncompleteReadError": Kind.NETWORK,
    "azure.core.exceptions.ServiceRequestError": Kind.NETWORK,
    "azure.core.exceptions.ServiceResponseError": Kind.NETWORK,
    "botocore.exceptions.ConnectionError": Kind.NETWORK,
    "botocore.exceptions.CredentialRetrievalError": Kind.CREDENTIALS,
    "botocore.exceptions.FlexibleChecksumError": Kind.NETWORK,
    "botocore.exceptions.HTTPClientError": Kind.NETWORK,
    "botocore.exceptions.IncompleteReadError": Kind.NETWORK,
    "botocore.exceptions.LoginError": Kind.CREDENTIALS,
    "botocore.exceptions.NoAuthTokenError": Kind.CREDENTIALS,
    "botocore.exceptions.NoCredentialsError": Kind.CREDENTIALS,
    "botocore.exceptions.PartialCredentialsError": Kind.CREDENTIALS,
    "botocore.exceptions.ProfileNotFound": Kind.CREDENTIALS,
    "botocore.exceptions.SSOError": Kind.CREDENTIALS,
    "botocore.exceptions.TokenRetrievalError": Kind.CREDENTIALS,
    "botocore.exceptions.UnknownCredentialError": Kind.CREDENTIALS,
    "botocore.parsers.ResponseParserError": Kind.NETWORK,
    "gcsfs.retry.ChecksumError": Kind.NETWORK,
    "google.auth.exceptions.GoogleAuthError": Kind.CREDENTIALS,
    "google.auth.exceptions.TransportError": Kind.NETWORK,
    "requests.exceptions.RequestException": Kind.NETWORK,
}
"""Exceptions without a server's answer, each with those derived from it. By name: no driver need be there."""
_BUSY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
# Answers of S3 servers with status 400 that speak of the connection or of who asks, not of the request.
_BUSY_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
_CREDENTIAL_CODES = {"AuthorizationHeaderMalformed", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_LASTING_ERRNO = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOSYS,
    errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip
_LONGEST = 300

# They log with a traceback what they raise as well.
for _name in ("gcsfs", "azure", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def open_fs(url: str, what: str, **options: Any) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Args:
        what: is opened, for the error.

    Raises:
        StorageError: there is no such file system, its driver is not installed, or does not know who asks.
    """
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
        return fs, str(path)
    except Exception as error:
        if sort(error) is None and not isinstance(error, ValueError | ImportError):
            raise
        raise StorageError(f"{what} {url!r} cannot be opened: {told(error)}") from error


def sort(error: BaseException) -> Kind | None:
    """What is the matter; None if the error is not a file system's, but a mistake of ours."""
    for each in _chain(error):
        if isinstance(each, FileNotFoundError):
            return Kind.MISSING
        if isinstance(each, PermissionError):
            return Kind.CREDENTIALS
        if isinstance(each, FileExistsError):
            return Kind.OTHER
    status, code = answer(error)
    if status:
        return _answered(status, code)
    for each in _chain(error):
        named = (_NAMED.get(f"{kind.__module__}.{kind.__qualname__}") for kind in type(each).__mro__)
        if found := next(filter(None, named), None):
            return found
    for each in _chain(error):
        if isinstance(each, OSError):
            # gcsfs has no better word for status 403.
            denied = each.errno is None and str(each).startswith("Forbidden: ")
            lasting = Kind.OTHER if each.errno in _LASTING_ERRNO else Kind.NETWORK
            return Kind.CREDENTIALS if denied else lasting
    return Kind.OTHER if any(_is_of_driver(each) or _came_from_driver(each) for each in _chain(error)) else None


def passing(error: BaseException) -> bool:
    """Whether trying again may help: trouble of the connection or the server, not of the request."""
    return sort(error) in (Kind.BUSY, Kind.NETWORK)


def answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of the server's answer behind an error; ``(0, "")`` if it did not answer."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, Mapping):  # S3
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        if not _is_of_driver(each):
            continue
        for name in ("status_code", "code", "status"):  # azure, gcsfs and google, aiohttp
            status = str(getattr(getattr(each, name, None), "value", getattr(each, name, None)))
            if status.isdecimal() and int(status) >= 100:
                code = getattr(each, "error_code", None)
                return int(status), str(getattr(code, "value", code) or "")
    return 0, ""


def said(error: BaseException) -> str:
    """An error in one line, with the server's own code where it answered."""
    status, code = answer(error)
    wraps = isinstance(error, ValueError | RuntimeError) and error.__cause__ is not None
    text = str(error.__cause__ if wraps else error).partition("RequestId:")[0]  # Azure goes on with XML
    name = f"{status} {code}".strip() if status else type(error).__name__
    return f"{name}: {textwrap.shorten(text, _LONGEST, placeholder=' ...')}".rstrip(": ")


def told(error: BaseException) -> str:
    """An error of a remote file system in one line, with what to do about it."""
    match sort(error):
        case Kind.CREDENTIALS:
            return f"access denied ({said(error)}): check the credentials, their rights on the bucket, and the clock"
        case Kind.MISSING:
            return f"it does not exist ({said(error)})"
        case Kind.BUSY:
            return f"the server is busy ({said(error)})"
        case _:
            return said(error)


def _answered(status: int, code: str) -> Kind:
    if status in _BUSY_STATUS or code in _BUSY_CODES:
        return Kind.BUSY
    if status in (401, 403) or code in _CREDENTIAL_CODES:
        return Kind.CREDENTIALS
    return Kind.MISSING if status == 404 else Kind.OTHER


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _is_of_driver(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _DRIVERS


def _came_from_driver(error: BaseException) -> bool:
    """Whether it passed through a driver: some raise a plain ValueError for what a server answers."""
    frame = error.__traceback__
    while frame is not None and not isinstance(error, _OURS):
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _DRIVERS:
            return True
        frame = frame.tb_next
    return False
