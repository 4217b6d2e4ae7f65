"""Texts of stores' errors."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import traceback

import pytest

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import model, other_stores
from rayserve_hooks.download.store_errors import NativeError, border, failure, native
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError

SECRET = "hunter22-very"


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
    with pytest.raises(DownloadError, match=text), border():
        raise PanicException("x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_other_interruptions_stay_what_they_are(error: type[BaseException]) -> None:
    with pytest.raises(error), border():
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


def fetched() -> None:
    """Fail as a store's client does, whose error the download's own is raised from."""
    try:
        raise OSError(f"401 for {SECRET}")
    except OSError as error:
        raise DownloadError("cannot list s3://b: 401; check the credentials") from error


def test_what_crosses_the_border_has_no_secret_in_its_causes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_PASSWORD", SECRET)
    with pytest.raises(DownloadError, match=r"^cannot list s3://b: 401") as caught, border():
        fetched()
    assert type(caught.value.__cause__) is OSError
    shown = "".join(traceback.format_exception(caught.value))
    assert "OSError: 401 for ***" in shown
    assert "in fetched" in shown
    assert SECRET not in shown


def test_what_has_no_secret_crosses_the_border_as_it_is() -> None:
    error = DownloadError("x")
    with pytest.raises(DownloadError) as caught, border():
        raise error
    assert caught.value is error


def test_a_download_called_directly_shows_no_secret_of_a_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object) -> None:
        fetched()

    monkeypatch.setattr(model, "open_source", refuses)  # a store that echoes what it was sent
    monkeypatch.setenv("STORE_PASSWORD", SECRET)
    mirror = model.Mirror("s3://bucket/model")
    with pytest.raises(DownloadError) as caught:
        model.download_node("tiny", mirror, NodeModelDownloadable.MODEL_AND_TOKENIZER)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
