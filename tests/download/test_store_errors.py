"""Texts of stores' errors."""

from __future__ import annotations

import contextlib
import re
import socket
import threading

import pytest

from rayserve_hooks.download import other_stores
from rayserve_hooks.download.store_errors import NativeError, failure, native, no_panics
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError


def test_a_message_keeps_no_secrets() -> None:
    error = RuntimeError(
        "GET https://user:pass@host/x?sig=SECRET&se=1 failed: <Error><Code>Bad</Code><Message>no"
        "</Message><StringToSign>SECRET</StringToSign></Error>\n\nDebug source:\nSECRET"
    )
    text = "cannot open s3://b: RuntimeError: GET https://host/x failed: Bad: no; check this"
    assert str(failure("cannot open s3://b", error, "this")) == text


def test_a_query_in_the_path_of_an_address_is_no_less_secret() -> None:
    error = RuntimeError("GET http://host/b/x%3Fsig%3DSECRET in 1 ms")
    text = "cannot open s3://b: RuntimeError: GET http://host/b/x in 1 ms; check this"
    assert str(failure("cannot open s3://b", error, "this")) == text


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Error 403 Forbidden: BlobArchived: x", "the object is archived: restore it"),
        ("Error 403 Forbidden: AuthorizationFailure: x", "check the credentials"),
        ("Error 403 Forbidden: AccessDenied: not authorized: kms:Decrypt", "check that the object"),
        ("Error 404 Not Found: ContainerNotFound: x", "check the container's and the account's"),
        ("Error 401 Unauthorized", "check the credentials"),
        ("Error 404 Not Found", "check bucket, path and endpoint"),
        ("Error 502 Bad Gateway", "try again later"),
        ("Tunnel connection failed: 407 Proxy Authentication Required", "the proxy wants a user"),
        ("error sending request: dns error", "check the endpoint's host and the DNS"),
        ("took 403 ms, 404 bytes", "check endpoint, region, credentials and the network"),
    ],
)
def test_every_error_has_the_advice_that_helps(said: str, advice: str) -> None:
    assert f"; {advice}" in str(failure("cannot list gs://b", RuntimeError(said)))


class PanicException(BaseException):
    pass


def test_a_panic_is_an_ordinary_error() -> None:
    with pytest.raises(NativeError, match=r"^a native library panicked: request valid$"), native():
        raise PanicException("request valid")
    text = r"^the download ended: a native library panicked: x; "
    with pytest.raises(DownloadError, match=text), no_panics():
        raise PanicException("x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_other_interruptions_stay_what_they_are(error: type[BaseException]) -> None:
    with pytest.raises(error), no_panics():
        raise error


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("scheme", "answer", "reason"),
    [
        ("http", b"", "IncompleteMessage"),
        ("http", b"garbage\r\n\r\n", "Parse: Version"),
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", "InvalidMessage: InvalidContentType"),
    ],
)
def test_why_there_is_no_answer(
    scheme: str, answer: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed below
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listening.getsockname()[1]
    monkeypatch.setattr(other_stores, "RETRIES", {"max_retries": 0})
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"{scheme}://127.0.0.1:{port}")
    pattern = (
        rf"^cannot list gs://anonymous@bucket/tiny: .* error sending request: {re.escape(reason)}; "
        "check endpoint, region, credentials and the network$"
    )
    try:
        with pytest.raises(DownloadError, match=pattern):
            open_source("gs://anonymous@bucket/tiny").list_files()
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
