"""Google's store, Azure's and local folders; no account of theirs is to be had here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3

from rayserve_hooks.download import other_stores
from rayserve_hooks.download.stores import RemoteFile, Source, open_source
from rayserve_hooks.errors import DownloadError

pytestmark = pytest.mark.usefixtures("clean")

GOOGLE = "gs://anonymous@bucket"
AZURE = "azure://bucket@account.blob.core.windows.net"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with s3.serving(tmp_path / "buckets") as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", running.url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
        monkeypatch.setattr(other_stores, "RETRIES", {"max_retries": 0})
        yield running


def write(server: s3.Server, *paths: str) -> None:
    for path in paths:
        file = server.root / "bucket" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path)


def read_all(uri: str) -> dict[str, bytes]:
    with contextlib.closing(open_source(uri)) as source:
        files = source.list_files()
        return {path: read(source, file) for path, file in files.items()}


def read(source: Source, file: RemoteFile) -> bytes:
    with contextlib.closing(source.parts(file, (0, file.size))) as parts:
        return b"".join(bytes(part) for part in parts)


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
    source: Any = open_source(uri)
    assert source.store.prefix == "tiny/v1"
    assert source.store.config["container_name"] == "models"
    assert source.store.config["account_name"] == "account"


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


def test_a_wrong_google_uri() -> None:
    with pytest.raises(DownloadError, match=r"^gs:///tiny names no bucket; write gs://bucket/path"):
        open_source("gs:///tiny")


@pytest.mark.parametrize("uri", ["gs://anonymous@bucket/tiny", "pyarrow-gs://bucket/tiny"])
def test_gcs(uri: str) -> None:
    source: Any = open_source(uri)
    assert (source.store.config["bucket"], source.store.prefix) == ("bucket", "tiny")
    assert source.store.config.get("skip_signature", "false") == str("anonymous" in uri).lower()


def test_the_default_credentials_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def identity() -> dict[str, Any]:
        calls.append("asked")
        return {}

    monkeypatch.setattr(other_stores, "_azure_identity", identity)
    uri = "azure://models@account.blob.core.windows.net/tiny"
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "")  # as unset
    open_source(uri)
    asked = len(calls)
    assert asked
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    open_source(uri)
    assert len(calls) == asked


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
@pytest.mark.parametrize(
    "prefix", ["tiny#2", "a b", "a%20b", "tiny?x", "tiny?x=1", "tïny/模型", "it's (1)~+&,@:="]
)
def test_a_uri_is_taken_as_it_is(base: str, prefix: str, server: s3.Server) -> None:
    write(server, "tiny/x", "a/x", f"{prefix}/x#y %41?z.txt")
    key = f"{prefix}/x#y %41?z.txt"
    assert read_all(f"{base}/{prefix}") == {"x#y %41?z.txt": key.encode()}
    with contextlib.closing(open_source(f"{base}/{prefix}/")) as source:
        (file,) = source.list_files().values()
        assert source.head(file)["content-length"] == str(len(key.encode()))


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
@pytest.mark.parametrize("prefix", ["models//tiny", "/tiny", "tiny/../x", "./tiny", "tiny//"])
def test_a_prefix_that_the_client_cannot_read(base: str, prefix: str, server: s3.Server) -> None:
    text = (
        f"{base}/{prefix} has a folder with an empty name, '.' or '..', which this store's client "
        "cannot read; copy the model to another folder"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source(f"{base}/{prefix}")


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
@pytest.mark.parametrize("key", ["tiny//x", "tiny/./x", "tiny/../x"])
def test_a_key_that_the_client_cannot_read(base: str, key: str, server: s3.Server) -> None:
    write(server, "tiny/config.json")
    server.keys = [key]
    with pytest.raises(DownloadError) as caught:
        open_source(f"{base}/tiny").list_files()
    text = str(caught.value)
    assert text.startswith(f"cannot list {base}/tiny: ")
    assert key in text
    assert text.endswith(
        "rename the object: this store's client reads no names with an empty part, '.' or '..'"
    )


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
def test_markers_of_folders(base: str, server: s3.Server) -> None:
    write(server, "tiny/config.json", "tiny/original/params.json")
    (server.root / "bucket/tiny/empty.txt").touch()
    server.keys = ["tiny/", "tiny/original/", "tiny/onnx/"]
    assert sorted(read_all(f"{base}/tiny")) == ["config.json", "empty.txt", "original/params.json"]


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
def test_an_empty_object_with_others_below_it_is_a_marker(base: str, server: s3.Server) -> None:
    write(server, "tiny/a/b.json")
    server.keys = ["tiny/a"]
    assert sorted(read_all(f"{base}/tiny")) == ["a/b.json"]


EMPTY = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BASE_URL",
    "AZURE_ENDPOINT",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_CLIENT_ID",
    "AZURE_TENANT_ID",
    "AZURE_FEDERATED_TOKEN_FILE",
    "all_proxy",
)


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
def test_empty_variables_are_unset(
    base: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server, "tiny/config.json")
    for name in EMPTY:
        monkeypatch.setenv(name, "")
    assert sorted(read_all(f"{base}/tiny")) == ["config.json"]
    assert all(os.environ[name] == "" for name in EMPTY)


def test_empty_endpoints_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "")
    google: Any = open_source(f"{GOOGLE}/tiny")
    assert google.readable_url_of("x") == "https://storage.googleapis.com/bucket/tiny/x"
    azure: Any = open_source(f"{AZURE}/tiny")
    assert azure._endpoint == "https://account.blob.core.windows.net"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        (GOOGLE, "STORAGE_EMULATOR_HOST"),
        (GOOGLE, "GOOGLE_APPLICATION_CREDENTIALS"),
        (AZURE, "AZURE_STORAGE_ACCOUNT_KEY"),
        (AZURE, "AZURE_STORAGE_SAS_TOKEN"),
        (AZURE, "AZURE_CLIENT_SECRET"),
    ],
)
def test_a_control_character(uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "S3CRET\n")
    text = (
        f"{name} holds a line break or another control character; write it without, also at its end"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source(f"{uri}/tiny")


def test_an_emulator_without_scheme_is_asked_without_tls(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server, "tiny/config.json")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removeprefix("http://"))
    assert sorted(read_all(f"{GOOGLE}/tiny")) == ["config.json"]


def test_an_azure_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "host:10000")
    text = "AZURE_STORAGE_ENDPOINT is 'host:10000', which is no URL; write it with its scheme"
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}"):
        open_source(f"{AZURE}/tiny")


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
def test_another_version_than_listed(base: str, server: s3.Server) -> None:
    write(server, "tiny/config.json")
    with contextlib.closing(open_source(f"{base}/tiny")) as source:
        (file,) = source.list_files().values()
        server.faults = [s3.Fault("other")]
        pattern = (
            "^cannot fetch 'config.json' of .*: the store sends the version '\"other\"' of 16 "
            "bytes, but has listed .* of 16; the object has changed under the download"
        )
        with pytest.raises(DownloadError, match=pattern):
            read(source, file)


@pytest.mark.parametrize("base", [GOOGLE, AZURE])
def test_no_checksum_of_another_host_is_believed(base: str, server: s3.Server) -> None:
    write(server, "tiny/config.json")
    with (
        s3.serving(server.root) as evil,
        contextlib.closing(open_source(f"{base}/tiny")) as source,
    ):
        (file,) = source.list_files().values()
        server.faults = [s3.Fault("redirect", method="HEAD", to=evil.url)]
        with pytest.raises(OSError, match="307"):
            source.head(file)
        assert evil.requests == []


def test_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a#b %20"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "config.json").write_text("{}")
    (folder / "empty").touch()
    assert read_all(f"file://{folder}") == {"sub/config.json": b"{}", "empty": b""}
