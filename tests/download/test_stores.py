from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.download import stores
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.mark.parametrize(
    "uri",
    [
        "azure://models@account.blob.core.windows.net/tiny/v1",
        "azure://models@account.dfs.core.windows.net/tiny/v1/",
        "abfss://models@account.dfs.core.windows.net/tiny/v1",
        "pyarrow-abfss://models@account.dfs.core.windows.net/tiny/v1",
    ],
)
def test_azure(uri: str) -> None:
    store: Any = open_source(uri).store
    assert store.prefix == "tiny/v1"
    assert store.config["container_name"] == "models"
    assert store.config["account_name"] == "account"


@pytest.mark.parametrize(
    ("uri", "form"),
    [
        ("azure://models/tiny", "azure://container@account.blob.core.windows.net/path"),
        ("azure://@account.blob.core.windows.net/x", "azure://container@account.blob."),
        ("abfss://models@account.blob.core.windows.net/x", "abfss://container@account.dfs."),
        ("abfss://models@.dfs.core.windows.net/x", "abfss://container@account.dfs."),
    ],
)
def test_a_wrong_azure_uri(uri: str, form: str) -> None:
    text = f"{uri} names no Azure container; write {form}"
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}"):
        open_source(uri)


@pytest.mark.parametrize("uri", ["gs://anonymous@bucket/tiny", "pyarrow-gs://bucket/tiny"])
def test_gcs(uri: str) -> None:
    store: Any = open_source(uri).store
    assert (store.config["bucket"], store.prefix) == ("bucket", "tiny")
    assert store.config.get("skip_signature", "false") == str("anonymous" in uri).lower()


def test_s3_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-one")
    assert config()["region"] == "eu-one"
    monkeypatch.setenv("AWS_REGION", "eu-two")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    assert (config()["region"], config()["endpoint"]) == ("eu-two", "http://one")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two")
    assert config()["endpoint"] == "http://two"


def config(uri: str = "s3://bucket/tiny") -> dict[str, Any]:
    store: Any = open_source(uri).store
    return dict(store.config)


def test_a_profile_of_boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, credentials = tmp_path / "config", tmp_path / "credentials"
    settings.write_text("[profile other]\nregion = eu-three\n")
    credentials.write_text("[other]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(settings))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "other")
    source: Any = open_source("s3://bucket/tiny")
    assert source.store.config["region"] == "eu-three"
    assert source.store.credential_provider()["access_key_id"] == "k"
    monkeypatch.setenv("AWS_REGION", "eu-two")
    assert config()["region"] == "eu-two"


def test_no_credentials_at_all() -> None:
    text = (
        "boto3 finds no AWS credentials; set AWS_ACCESS_KEY_ID or AWS_PROFILE, or write "
        "s3://anonymous@bucket for a public bucket"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source("s3://bucket/tiny")
    assert config("s3://anonymous@bucket/tiny")["skip_signature"] == "true"


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    pattern = r"^cannot open s3://bucket/tiny: .*absent.*; check the URI and the credentials$"
    with pytest.raises(DownloadError, match=pattern):
        open_source("s3://bucket/tiny")


def test_without_boto3_the_chain_is_that_of_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert config()["bucket"] == "bucket"


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    text = (
        "downloading s3://bucket/tiny needs the package 'obstore'; install "
        "'rayserve_hooks[download]' on every node"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source("s3://bucket/tiny")


def test_the_default_credentials_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def identity() -> dict[str, Any]:
        calls.append("asked")
        return {}

    monkeypatch.setattr(stores, "_azure_identity", identity)
    open_source("azure://models@account.blob.core.windows.net/tiny")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    open_source("azure://models@account.blob.core.windows.net/tiny")
    assert calls == ["asked"]


@pytest.mark.parametrize(
    ("scheme", "answer", "reason"),
    [
        ("http", b"", "IncompleteMessage"),
        ("http", b"garbage\r\n\r\n", "Parse: Version"),
        ("http", None, "TimedOut"),
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", "InvalidMessage: InvalidContentType"),
    ],
)
def test_why_there_is_no_answer(
    scheme: str, answer: bytes | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed below
            while answer is not None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listening.getsockname()[1]
    monkeypatch.setattr(stores, "_CLIENT", {"timeout": "200ms"})
    try:
        with pytest.raises(DownloadError, match=unanswered(reason)):
            source(f"{scheme}://127.0.0.1:{port}", monkeypatch).list_files()
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_an_endpoint_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=unanswered("Connection refused")):
        source("http://127.0.0.1:1", monkeypatch).list_files()


def source(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> stores.Source:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(stores, "_RETRIES", {"max_retries": 0})
    return open_source("s3://anonymous@bucket/tiny")


def unanswered(reason: str) -> str:
    return (
        rf"^cannot list s3://anonymous@bucket/tiny: .* error sending request: {reason}; check "
        "endpoint, region, credentials and the network$"
    )


def test_an_object_whose_path_leaves_the_folder() -> None:
    class Store:
        def list(self, chunk_size: int) -> list[list[dict[str, Any]]]:
            return [[{"path": path, "size": 1, "e_tag": "x"}]]

    for path in ("../evil", "a/../../evil", "/etc/evil"):
        text = (
            f"s3://bucket/tiny holds an object {path!r}, which would leave the folder it goes to; "
            "rename it"
        )
        held: Any = Store()
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            stores.Source("s3://bucket/tiny", held).list_files()


def test_a_message_keeps_no_secrets() -> None:
    error = RuntimeError(
        "GET https://user:pass@host/x?sig=SECRET&se=1 failed: <Error><Code>Bad</Code><Message>no"
        "</Message><StringToSign>SECRET</StringToSign></Error>\n\nDebug source:\nSECRET"
    )
    text = "cannot open s3://b: RuntimeError: GET https://host/x failed: Bad: no; check this"
    assert str(stores.failure("cannot open s3://b?sig=SECRET", error, "this")) == text
