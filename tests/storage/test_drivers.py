"""What each driver raises is sorted, and told in one line: by its own exceptions, and by a server that refuses it."""

import errno
import importlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from latteflow.storage.drivers import Kind, open_fs, said, sort, told
from latteflow.storage.errors import DataError, NotFound, StorageError
from latteflow.storage.objects import ObjectStore
from latteflow.storage.roots import Root
from latteflow.tasks.core.tables import digest_of_table, read_by_path

KEY = "a2V5"  # base64, as Azure wants it


def made(name: str, *args: Any, **more: Any) -> Exception:
    """An exception of a driver; the test is skipped where the driver is not installed."""
    module, _, kind = name.rpartition(".")
    return getattr(pytest.importorskip(module.partition(".")[0]) and importlib.import_module(module), kind)(
        *args, **more
    )


def azure(status: int, code: str) -> Exception:
    error = made("azure.core.exceptions.HttpResponseError", f"said so\nRequestId:1\nErrorCode:{code}\nContent: <xml>")
    error.status_code, error.error_code = status, code  # type: ignore[attr-defined]
    return error


def gcs(status: int, message: str) -> Exception:
    with pytest.raises(Exception) as caught:
        pytest.importorskip("gcsfs.retry").validate_response(
            status, b'{"error": {"message": "%s"}}' % message.encode(), "bucket/key"
        )
    return caught.value


CASES: list[tuple[Kind, Callable[[], Exception]]] = [
    (Kind.CREDENTIALS, lambda: made("botocore.exceptions.NoCredentialsError")),
    (Kind.CREDENTIALS, lambda: made("botocore.exceptions.SSOTokenLoadError", error_msg="expired")),
    (Kind.CREDENTIALS, lambda: made("botocore.exceptions.ProfileNotFound", profile="x")),
    (Kind.CREDENTIALS, lambda: azure(403, "AuthenticationFailed")),
    (Kind.CREDENTIALS, lambda: made("azure.core.exceptions.ClientAuthenticationError", "no")),
    (Kind.CREDENTIALS, lambda: made("azure.identity.CredentialUnavailableError", message="no")),
    (Kind.CREDENTIALS, lambda: made("google.auth.exceptions.DefaultCredentialsError", "no")),
    (Kind.CREDENTIALS, lambda: made("google.auth.exceptions.RefreshError", "invalid_grant")),
    (Kind.CREDENTIALS, lambda: gcs(401, "Anonymous caller")),
    (Kind.CREDENTIALS, lambda: gcs(403, "no access")),
    (Kind.MISSING, lambda: azure(404, "ContainerNotFound")),
    (Kind.MISSING, lambda: gcs(404, "Not found")),
    (Kind.MISSING, lambda: FileNotFoundError("x")),
    (Kind.BUSY, lambda: azure(503, "ServerBusy")),
    (Kind.BUSY, lambda: azure(500, "OperationTimedOut")),
    (Kind.BUSY, lambda: gcs(429, "Rate limit")),
    (Kind.BUSY, lambda: gcs(503, "Backend error")),
    (Kind.NETWORK, lambda: gcs(502, "")),
    (Kind.NETWORK, lambda: made("azure.core.exceptions.ServiceRequestError", "cannot connect")),
    (Kind.NETWORK, lambda: made("azure.core.exceptions.ServiceResponseTimeoutError", "no answer")),
    (Kind.NETWORK, lambda: made("google.auth.exceptions.TransportError", "no answer")),
    (Kind.NETWORK, lambda: made("aiohttp.ServerDisconnectedError")),
    (Kind.NETWORK, lambda: made("requests.exceptions.ConnectionError", "reset")),
    (Kind.NETWORK, lambda: ConnectionResetError("reset")),
    (Kind.OTHER, lambda: azure(400, "InvalidUri")),
    (Kind.OTHER, lambda: gcs(400, "invalid name")),  # a plain ValueError
    (Kind.OTHER, lambda: OSError(errno.ENOSPC, "full")),
]


@pytest.mark.parametrize(("kind", "error"), CASES)
def test_errors_of_drivers_are_sorted_and_told_in_one_line(kind: Kind, error: Callable[[], Exception]) -> None:
    found = error()
    assert sort(found) is kind
    assert "\n" not in told(found) and "<xml>" not in told(found)
    wrapped = RuntimeError("Failed to remove %s for %s", "x", found)
    wrapped.__cause__ = found
    assert sort(wrapped) is kind and "Failed to" not in said(wrapped)


def test_mistakes_of_ours_are_not_dressed_up() -> None:
    assert sort(ValueError("ours")) is None and sort(KeyError("ours")) is None
    with pytest.raises(TypeError) as caught:
        pytest.importorskip("gcsfs.retry").validate_response("404", b"", "x")  # called wrongly
    assert sort(caught.value) is None


class Refusal(BaseHTTPRequestHandler):
    """A server that answers everything with one status."""

    protocol_version = "HTTP/1.1"
    status: ClassVar[int] = 403

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"no")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        pass  # a driver that hangs up


@pytest.fixture
def refusing() -> Iterator[int]:
    server = Server(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def store_at(driver: str, port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a store that the driver looks for at a port of this machine, as its environment says."""
    address = f"http://127.0.0.1:{port}"
    if driver == "s3":
        pytest.importorskip("s3fs")
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "ENDPOINT_URL": address}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
    elif driver == "gs":
        pytest.importorskip("gcsfs")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    else:
        pytest.importorskip("adlfs")
        account = f"AccountName=a;AccountKey={KEY};BlobEndpoint={address}/a;"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
    fsspec.get_filesystem_class(driver).clear_instance_cache()
    return f"{driver}://bucket/store"


@pytest.mark.parametrize("driver", ["s3", "gs", "abfs"])
@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_server_that_refuses_is_one_line(
    driver: str,
    status: int,
    refusing: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Refusal, "status", status)
    url = store_at(driver, refusing, monkeypatch)
    store = ObjectStore(url, patience=0)
    said_so = {401: "access denied", 403: "access denied", 404: "create it first", 400: "400|Bad Request"}[status]
    with pytest.raises(StorageError, match=said_so) as caught:
        store.put_if_absent("key", b"1")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for call in (lambda: store.read("key"), lambda: store.fetch("key", tmp_path)):
        with pytest.raises(NotFound if status == 404 else StorageError):
            call()
    for call in (
        lambda: store.listing(""),
        lambda: store.names(""),
        lambda: store.delete("key"),
        lambda: store.size("key"),
    ):
        if status == 404:
            call()
        else:
            with pytest.raises(StorageError):
                call()
    with pytest.raises((StorageError, DataError)):
        list(Root(f"{url}/images").find())
    for read in (lambda: digest_of_table(f"{url}/a.csv"), lambda: read_by_path(f"{url}/a.csv", "label", [], ["a.png"])):
        with pytest.raises(DataError):
            read()
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_what_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adlfs")
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    fsspec.get_filesystem_class("abfs").clear_instance_cache()
    with pytest.raises(StorageError, match=r"store 'abfs://c/store' cannot be opened: .*account_name"):
        ObjectStore("abfs://c/store")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_fs("bogus://x", "source")


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and nobody listens
        url = store_at("s3", held.getsockname()[1], monkeypatch)
        with pytest.raises(StorageError, match=r"tried for 0 s: check the server and the network"):
            ObjectStore(url, patience=0).read("key")


def test_a_store_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder should be"):
        ObjectStore(str(tmp_path / "file/store")).put_if_absent("key", b"1")


def test_drivers_do_not_log_what_they_raise() -> None:
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)
