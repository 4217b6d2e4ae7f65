"""What goes wrong between a store and the disk, against a server that does it."""

from __future__ import annotations

import asyncio
import base64
import errno
import functools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import s3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from waiting import until

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import (
    caller,
    checksums,
    other_stores,
    partials,
    reader,
    stores,
    transfer,
)
from rayserve_hooks.download import s3 as s3_source
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.errors import DownloadError

ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
URI = "s3://bucket/model"
WEIGHTS = "model.safetensors"
RANGE = 64 * 2**10
CHUNK = 16 * 2**10

# The processes of the tests below are forked from one that has imported what they need.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "botocore.session",
        "huggingface_hub.constants",
        "obstore.store",
        "rayserve_hooks.download.model",
    ]
)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    folder = tmp_path / "buckets" / "bucket" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(5 * RANGE + 1000))
    retries = {"max_retries": 2, "backoff": {"init_backoff": timedelta(milliseconds=5)}}
    monkeypatch.setattr(other_stores, "RETRIES", retries)
    monkeypatch.setattr(reader, "BACKOFF_S", 0.0001)
    monkeypatch.setattr(partials, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(other_stores, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(reader, "_BUFFER_BYTES", CHUNK)
    monkeypatch.setattr(s3_source, "_SMALL_BYTES", CHUNK)
    monkeypatch.setattr(transfer, "SMALL_BYTES", CHUNK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    with s3.serving(tmp_path / "buckets") as running:
        environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": running.url,
            "AWS_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "models--org--tiny"


@pytest.fixture
def weights(server: s3.Server) -> Path:
    return server.root / "bucket" / "model" / WEIGHTS


def small_units() -> None:
    partials.RANGE_BYTES = RANGE
    transfer.SMALL_BYTES = s3_source._SMALL_BYTES = CHUNK


def download() -> Path:
    path = download_node("org/tiny", Mirror(URI), ALL)
    assert path is not None
    return Path(path)


def manifest(model: Path) -> dict[str, Any]:
    revision = (model / "refs" / "main").read_text()
    file = model / ".rayserve_hooks" / "revisions" / f"{revision}.json"
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def of_weights(model: Path) -> tuple[str, str]:
    record = next(file for file in manifest(model)["files"] if file["path"] == WEIGHTS)
    return record["verified"], str(record["checksum"]).partition(":")[0]


def assert_complete(server: s3.Server, snapshot: Path) -> None:
    source = server.root / "bucket" / "model"
    for file in source.rglob("*"):
        if file.is_file():
            assert (snapshot / file.relative_to(source)).read_bytes() == file.read_bytes()
    state = snapshot.parent.parent / ".rayserve_hooks"
    assert {path.name for path in state.iterdir()} == {"revisions", "lock"}
    assert (snapshot.parent.parent / "refs" / "main").read_text() == snapshot.name


def assert_absent(model: Path) -> None:
    assert not (model / "refs" / "main").exists()
    assert not list(model.glob("snapshots/*"))
    assert not list(model.glob(".rayserve_hooks/revisions/*.json"))


def test_ranges_are_parallel_requests_of_their_own(server: s3.Server, weights: Path) -> None:
    snapshot = download()
    assert_complete(server, snapshot)
    assert server.count(f"GET bucket/model/{WEIGHTS}") == 6
    assert server.sent_of(f"bucket/model/{WEIGHTS}") == weights.stat().st_size


def test_an_empty_file(server: s3.Server, weights: Path) -> None:
    (weights.parent / "empty.txt").touch()
    snapshot = download()
    assert_complete(server, snapshot)


def test_a_listing_of_many_pages(server: s3.Server, weights: Path) -> None:
    for number in range(25):
        (weights.parent / f"{number}.json").write_text(str(number))
    server.page_size = 10
    snapshot = download()
    assert_complete(server, snapshot)
    assert server.count("LIST") == 3


@pytest.mark.parametrize(
    ("kind", "path", "pattern"),
    [
        (
            "denied",
            WEIGHTS,
            (
                rf"cannot fetch '{WEIGHTS}' of {URI}: .*403 Forbidden: AccessDenied: Access Denied"
                "; check the credentials and whether they may list and read there"
            ),
        ),
        (
            "missing",
            WEIGHTS,
            (
                rf"cannot fetch '{WEIGHTS}' of {URI}: .*NoSuchKey: The specified key does not exist"
                "; check bucket, path and endpoint"
            ),
        ),
        (
            "denied",
            "bucket",
            (
                rf"cannot list {URI}: .*AccessDenied: Access Denied; "
                "check the credentials and whether they may list and read there"
            ),
        ),
        (
            "busy",
            WEIGHTS,
            (
                rf"cannot fetch '{WEIGHTS}' of {URI}, asked 10 times: 503 Service Unavailable: "
                "SlowDown: Please reduce your request rate; the store asks for fewer requests: "
                "start fewer nodes at once, or try again later"
            ),
        ),
        (
            "throttled",
            WEIGHTS,
            (
                rf"cannot fetch '{WEIGHTS}' of {URI}, asked 10 times: 429 Too Many Requests: "
                "TooManyRequests: Please reduce your request rate; the store asks for fewer .*"
            ),
        ),
        (
            "short",
            WEIGHTS,
            (
                rf"cannot fetch '{WEIGHTS}' of {URI}: the body ended early; [\d,]+ of [\d,]+ bytes "
                r"in \d+\.\d s, 6 times; the store or a proxy cuts it off, or lists another size: "
                "check both"
            ),
        ),
        (
            "truncated",
            WEIGHTS,
            rf"cannot fetch '{WEIGHTS}' of {URI}: the body ended early; .*, 6 times; .*check both",
        ),
        (
            "reset",
            WEIGHTS,
            rf"cannot fetch '{WEIGHTS}' of {URI}: .*(early|by peer); .*, 6 times; the store .*",
        ),
        (
            "corrupt",
            WEIGHTS,
            (
                rf"'{WEIGHTS}' of {URI} has the checksum 'md5:[0-9a-f]{{32}}' in the store, but "
                "'md5:[0-9a-f]{32}' here; it is damaged in the store or on the way: upload it "
                "again, or look for a proxy that changes it"
            ),
        ),
    ],
)
def test_a_store_that_fails_for_good(
    kind: str, path: str, pattern: str, server: s3.Server, model: Path
) -> None:
    server.faults = [s3.Fault(kind, path)]
    with pytest.raises(DownloadError, match=f"(?s)^.*{pattern}$") as caught:
        download()
    text = str(caught.value)
    for secret in ("Debug source", "AKIASECRET", "list-type", "<Error>"):
        assert secret not in text
    assert_absent(model)
    server.faults = []
    assert_complete(server, download())


@pytest.mark.parametrize("kind", ["denied", "missing"])
def test_what_will_not_change_is_not_asked_again(kind: str, server: s3.Server) -> None:
    server.faults = [s3.Fault(kind, "config.json")]
    with pytest.raises(DownloadError):
        download()
    # Once by obstore, which is fast, and once by our own reader, which finds out why.
    assert server.count("GET bucket/model/config.json") == 2


@pytest.mark.parametrize(
    ("kind", "times"),
    [("busy", 2), ("throttled", 2), ("truncated", 4), ("reset", 4), ("short", 1), ("corrupt", 1)],
)
def test_a_store_that_fails_for_a_while(
    kind: str, times: int, server: s3.Server, weights: Path
) -> None:
    server.faults = [s3.Fault(kind, WEIGHTS, times=times)]
    assert_complete(server, download())
    if kind in ("truncated", "reset"):
        # Ranges go on where they broke off.
        assert server.sent_of(f"bucket/model/{WEIGHTS}") == weights.stat().st_size


def test_a_small_file_that_arrives_damaged_is_fetched_again(
    server: s3.Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [s3.Fault("corrupt", "config.json", times=1)]
    assert_complete(server, download())
    assert re.search(rf"fetching once more: 'config.json' of {URI} has the checksum", caplog.text)
    assert server.count("GET bucket/model/config.json") == 2
    assert server.count(f"GET bucket/model/{WEIGHTS}") == 6


def test_a_stream_ends_in_mid_file_once_another_has_failed(server: s3.Server) -> None:
    source = stores.open_source(URI)
    (weights,) = [file for path, file in source.list_files().items() if path == WEIGHTS]
    counted = caller.Progress(URI, weights.size, 0, source.caller)
    received: list[int] = []
    with ThreadPoolExecutor() as pool:
        running = transfer._Transfer(checksums.Heads(source), pool, counted, lambda *_: None)

        def fail_elsewhere(offset: int, chunk: memoryview) -> None:
            received.append(len(chunk))
            running._stop.set()

        with pytest.raises(
            DownloadError, match=rf"^cannot fetch '{WEIGHTS}' of {URI}: another file has failed$"
        ):
            running._receive(weights, (0, weights.size), fail_elsewhere)
    source.close()
    assert len(received) == 1


def test_a_file_is_never_mixed_from_two_versions(
    server: s3.Server, weights: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files = stores.Source.list_files

    def changed_after_listing(source: stores.Source) -> Any:
        found = list_files(source)
        weights.write_bytes(bytes(weights.stat().st_size))
        return found

    monkeypatch.setattr(stores.Source, "list_files", changed_after_listing)
    pattern = (
        rf"^cannot fetch '{WEIGHTS}' of {URI}: .*412 Precondition Failed: .*; the object has "
        "changed under the download; try again when its upload is over$"
    )
    with pytest.raises(DownloadError, match=pattern):
        download()
    assert_absent(model)


class TestVerification:
    def test_an_etag_that_is_an_md5(self, server: s3.Server, model: Path) -> None:
        download()
        assert of_weights(model) == ("checksum", "md5")
        assert manifest(model)["verified"] == "checksum"
        assert server.count("HEAD") == 0

    @pytest.mark.parametrize("etags", ["multipart", "opaque"])
    def test_another_etag(self, etags: str, server: s3.Server, model: Path) -> None:
        server.etags, server.crc64 = etags, True
        download()
        assert of_weights(model) == ("checksum", "crc64nvme")

    def test_no_checksum_at_all(self, server: s3.Server, model: Path) -> None:
        server.etags = "multipart"
        download()
        assert of_weights(model) == ("size", "crc64nvme")
        assert manifest(model)["verified"] == "size"

    def test_a_checksum_of_checksums_is_none(
        self, server: s3.Server, model: Path, weights: Path
    ) -> None:
        server.etags = "multipart"
        headers = {"x-amz-checksum-crc32c": "AAAAAA==-2", "x-amz-checksum-type": "COMPOSITE"}
        server.checksums[f"bucket/model/{WEIGHTS}"] = headers
        download()
        assert of_weights(model)[0] == "size"

    @pytest.mark.parametrize("algorithm", ["crc32c", "crc32", "sha256", "sha1"])
    def test_the_other_checksums_of_s3(
        self, algorithm: str, server: s3.Server, model: Path, weights: Path
    ) -> None:
        server.etags = "multipart"
        hashing = checksums.new_hash(algorithm)
        assert hashing is not None
        hashing.update(weights.read_bytes())
        server.checksums[f"bucket/model/{WEIGHTS}"] = {
            f"x-amz-checksum-{algorithm}": base64.b64encode(hashing.digest()).decode(),
            "x-amz-checksum-type": "FULL_OBJECT",
        }
        download()
        assert of_weights(model) == ("checksum", algorithm)

    def test_a_wrong_checksum(self, server: s3.Server, model: Path) -> None:
        server.etags = "multipart"
        server.checksums[f"bucket/model/{WEIGHTS}"] = s3.crc64_headers(b"something else")
        pattern = r"has the checksum 'crc64nvme:\S{12}' in the store, but 'crc64nvme:\S{12}' here; "
        with pytest.raises(DownloadError, match=pattern):
            download()
        assert server.count(f"GET bucket/model/{WEIGHTS}") == 12
        assert_absent(model)
        assert list((model / ".rayserve_hooks" / "partial").iterdir()) == []

    @pytest.mark.parametrize("with_checksum", [True, False])
    def test_the_etag_of_an_encrypted_object_is_no_md5(
        self, with_checksum: bool, server: s3.Server, model: Path, weights: Path
    ) -> None:
        stat = weights.stat()
        server.md5s[str(weights), stat.st_size, stat.st_mtime_ns] = "0" * 32
        headers = s3.crc64_headers(weights.read_bytes()) if with_checksum else {}
        headers["x-amz-server-side-encryption"] = "aws:kms"
        server.checksums[f"bucket/model/{WEIGHTS}"] = headers
        download()
        assert of_weights(model) == ("checksum" if with_checksum else "size", "crc64nvme")

    def test_s3_is_asked_for_large_files(
        self, server: s3.Server, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checksums, "_ABOVE_BYTES", RANGE)
        server.crc64 = True
        download()
        assert of_weights(model) == ("checksum", "crc64nvme")
        assert [request for request in server.requests if request.startswith("HEAD")] == [
            f"HEAD bucket/model/{WEIGHTS}"
        ]

    def test_a_head_that_is_denied_is_told(
        self, server: s3.Server, model: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.etags = "multipart"
        server.faults = [s3.Fault("denied", method="HEAD")]
        with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
            download()
        assert of_weights(model)[0] == "size"
        assert f"no checksum for {WEIGHTS} of {URI}: " in caplog.text

    @pytest.mark.parametrize("prefix", ["", "anonymous@"])
    def test_the_question_for_a_checksum_is_signed_as_the_downloads_are(
        self, prefix: str, server: s3.Server, model: Path
    ) -> None:
        server.etags, server.crc64 = "multipart", True
        download_node("org/tiny", Mirror(URI.replace("//", f"//{prefix}")), ALL)
        assert of_weights(model)[0] == "checksum"
        signatures = {head.get("authorization", "")[:40] for head in server.heads}
        signed = "AWS4-HMAC-SHA256 Credential=key/" + time.strftime("%Y%m%d", time.gmtime())
        assert signatures == {"" if prefix else signed[:40]}

    def test_without_the_library_for_checksums(
        self, server: s3.Server, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.etags, server.crc64 = "multipart", True
        monkeypatch.setitem(sys.modules, "awscrt.checksums", None)
        monkeypatch.delattr("awscrt.checksums")
        monkeypatch.setattr(partials, "segment_crc", partials.segment_crc.__wrapped__)
        monkeypatch.setattr(transfer, "segment_crc", partials.segment_crc)
        for module in (partials, transfer):
            monkeypatch.setattr(module, "segment_combine", lambda: None)
        assert_complete(server, download())
        assert of_weights(model) == ("size", "crc32")


@functools.cache
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return key.decode()


class TestOtherStores:
    """Google's and Azure's protocols; no account of theirs is to be had here."""

    GOOGLE = "gs://bucket/model"
    AZURE = "azure://bucket@account.blob.core.windows.net/model"
    ABFSS = "abfss://bucket@account.dfs.core.windows.net/model"

    @pytest.fixture(params=[GOOGLE, "gs://anonymous@bucket/model", AZURE, ABFSS])
    def uri(self, request: pytest.FixtureRequest, store: s3.Server) -> str:
        return str(request.param)

    @pytest.fixture
    def store(
        self, server: s3.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> s3.Server:
        server.etags = "opaque"
        account = {"client_email": "a@b", "private_key": private_key(), "private_key_id": "1"}
        (tmp_path / "account.json").write_text(json.dumps(account))
        environment = {
            "GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json"),
            "STORAGE_EMULATOR_HOST": server.url,
            "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
            "AZURE_STORAGE_ENDPOINT": server.url,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return server

    @staticmethod
    def fetch(uri: str) -> Path:
        path = download_node("org/tiny", Mirror(uri), ALL)
        assert path is not None
        return Path(path)

    def test_a_model_is_fetched_once(self, uri: str, store: s3.Server, weights: Path) -> None:
        assert_complete(store, self.fetch(uri))
        store.forget()
        assert_complete(store, self.fetch(uri))
        assert store.count("GET") == 0

    def test_what_breaks_off_is_resumed(self, uri: str, store: s3.Server, weights: Path) -> None:
        store.faults = [s3.Fault("truncated", WEIGHTS, times=4)]
        assert_complete(store, self.fetch(uri))
        # Of a body that breaks off, obstore keeps less than a chunk to itself.
        sent = store.sent[f"bucket/model/{WEIGHTS}"]
        assert 0 <= sent - weights.stat().st_size < 4 * CHUNK

    @pytest.mark.parametrize("kind", ["denied", "missing"])
    def test_a_refusal_keeps_the_message_of_the_store(
        self, kind: str, uri: str, store: s3.Server, model: Path
    ) -> None:
        store.faults = [s3.Fault(kind, WEIGHTS)]
        said = {"denied": "Access Denied; check the cred", "missing": "not exist; check bucket"}
        with pytest.raises(
            DownloadError,
            match=f"cannot fetch '{WEIGHTS}' of {re.escape(uri)}: .*{said[kind]}",
        ):
            self.fetch(uri)
        assert_absent(model)

    def test_a_listing_of_many_pages(self, uri: str, store: s3.Server) -> None:
        store.page_size = 1
        assert_complete(store, self.fetch(uri))

    @pytest.mark.parametrize("right", [True, False])
    def test_the_checksum_that_the_store_has(
        self, right: bool, uri: str, store: s3.Server, model: Path, weights: Path
    ) -> None:
        content = weights.read_bytes() if right else b"something else"
        algorithm = "crc32c" if uri.startswith("gs") else "md5"
        hashing = checksums.new_hash(algorithm)
        assert hashing is not None
        hashing.update(content)
        value = base64.b64encode(hashing.digest()).decode()
        md5 = base64.b64encode(b"not looked at: slow").decode()
        store.checksums[f"bucket/model/{WEIGHTS}"] = (
            {"x-goog-hash": f"crc32c={value},md5={md5}"}
            if algorithm == "crc32c"
            else {"Content-MD5": value}
        )
        if right:
            assert_complete(store, self.fetch(uri))
            assert of_weights(model) == ("checksum", algorithm)
            return
        with pytest.raises(DownloadError, match=f"has the checksum '{algorithm}:.*' in the store"):
            self.fetch(uri)
        assert_absent(model)

    def test_an_etag_of_google_that_only_looks_like_an_md5(
        self, store: s3.Server, model: Path, weights: Path
    ) -> None:
        store.etags = "md5"
        status = weights.stat()
        store.md5s[str(weights), status.st_size, status.st_mtime_ns] = "0" * 32
        hashing = checksums.new_hash("crc32c")
        assert hashing is not None
        hashing.update(weights.read_bytes())
        value = base64.b64encode(hashing.digest()).decode()
        store.checksums[f"bucket/model/{WEIGHTS}"] = {"x-goog-hash": f"crc32c={value}"}
        assert_complete(store, self.fetch(self.GOOGLE))
        assert of_weights(model) == ("checksum", "crc32c")

    def test_a_store_that_signs_nothing_is_told_of_once(
        self, store: s3.Server, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=SECRET")
        with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
            assert_complete(store, self.fetch(self.AZURE))
        assert of_weights(model)[0] == "size"
        assert caplog.text.count("some files are verified by size only, because the store ") == 1
        assert "SAS tokens auth is not supported" in caplog.text
        assert "SECRET" not in caplog.text


def break_off(server: s3.Server) -> None:
    server.faults = [s3.Fault("denied", WEIGHTS, start=2 * RANGE)]
    with pytest.raises(DownloadError):
        download()
    server.faults = []


class TestResume:
    def test_only_what_is_missing_is_fetched_after_a_failure(
        self, server: s3.Server, weights: Path
    ) -> None:
        break_off(server)
        missing = missing_bytes(server)
        server.forget()
        assert_complete(server, download())
        assert sum(server.sent.values()) == missing

    def test_a_journal_without_its_file_does_not_count(
        self, server: s3.Server, weights: Path, model: Path
    ) -> None:
        break_off(server)
        for partial in model.glob(".rayserve_hooks/partial/*.partial"):
            partial.unlink()
        assert_complete(server, download())

    def test_bytes_that_the_disk_has_lost_are_fetched_again(
        self, server: s3.Server, weights: Path, model: Path
    ) -> None:
        break_off(server)
        (partial,) = model.glob(".rayserve_hooks/partial/*.partial")
        os.truncate(partial, 10)
        server.forget()
        assert_complete(server, download())
        assert server.sent_of(f"bucket/model/{WEIGHTS}") == weights.stat().st_size

    def test_a_file_that_is_cut_before_it_is_published_is_fetched_again(
        self,
        server: s3.Server,
        weights: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        cuts: list[str] = []
        finish = transfer._Transfer._finish

        def cut(running: transfer._Transfer, partial: Any, *data: Any) -> None:
            if partial.file.path == WEIGHTS and not cuts:
                cuts.append(partial.path)
                os.truncate(partial.path, 10)
            finish(running, partial, *data)

        monkeypatch.setattr(transfer._Transfer, "_finish", cut)
        assert_complete(server, download())
        size = weights.stat().st_size
        text = f"fetching once more: '{WEIGHTS}' of {URI} has 10 bytes on disk, but {size} in the "
        assert text in caplog.text

    def test_partial_files_of_older_versions_are_removed(
        self, server: s3.Server, weights: Path, model: Path
    ) -> None:
        break_off(server)
        partial = model / ".rayserve_hooks" / "partial"
        old = {path.name for path in partial.iterdir()}
        (partial / "not-ours.partial").touch()
        weights.write_bytes(b"new" * RANGE)
        snapshot = download()
        assert (snapshot / WEIGHTS).read_bytes() == b"new" * RANGE
        assert old
        assert [path.name for path in partial.iterdir()] == ["not-ours.partial"]

    @pytest.mark.slow
    def test_a_killed_download_goes_on_where_it_was(
        self, server: s3.Server, weights: Path, model: Path
    ) -> None:
        numbers = random.Random(1)
        for number in range(3):
            weights.with_name(f"{number}.bin").write_bytes(numbers.randbytes(3 * RANGE))
        for number in range(20):
            weights.with_name(f"{number}.json").write_bytes(numbers.randbytes(2000))
        total = sum(file.stat().st_size for file in weights.parent.iterdir())
        server.rate, server.first_byte_s = 2_000_000, 0.001
        resumed = 0
        for _ in range(20):
            subprocess.run(["rm", "-rf", str(model)], check=True)
            server.forget()
            kill_after(server, int(total * numbers.random()))
            missing = missing_bytes(server)
            if missing:
                assert_absent(model)
            resumed += 0 < missing < total
            server.forget()
            assert_complete(server, download())
            server.settle()
            assert sum(server.sent.values()) == missing
        assert resumed >= 10


def missing_bytes(server: s3.Server) -> int:
    """Return the number of bytes that the next run has to fetch, by what is on disk."""
    from huggingface_hub.constants import HF_HUB_CACHE

    model = Path(HF_HUB_CACHE) / "models--org--tiny"
    source = server.root / "bucket" / "model"
    folders = [*model.glob("snapshots/*"), model / ".rayserve_hooks" / "stage"]
    missing = 0
    for file in source.iterdir():
        size = file.stat().st_size
        if any((folder / file.name).exists() for folder in folders):
            continue
        missing += size
        if size > CHUNK:
            name = f"{partials._hash(file.name)}-*.journal"
            for journal in (model / ".rayserve_hooks" / "partial").glob(name):
                lines = partials._LINE.findall(journal.read_bytes())
                missing -= sum(int(end) - int(start) for start, end, _ in lines)
    return missing


def kill_after(server: s3.Server, sent: int) -> None:
    process = PROCESSES.Process(target=child, args=(environment(),))
    process.start()
    until(lambda: sum(server.sent.values()) >= sent or not process.is_alive(), every_s=0.0005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.settle()


def environment() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    names = [name for name in os.environ if name.startswith(("AWS_", "RAYSERVE_"))]
    return {**{name: os.environ[name] for name in names}, "HF_HUB_CACHE": HF_HUB_CACHE}


def child(variables: dict[str, str], barrier: Any = None) -> None:
    os.environ.update(variables)
    small_units()
    if barrier is not None:
        barrier.wait()
    assert (download() / WEIGHTS).stat().st_size == 5 * RANGE + 1000


@pytest.mark.slow
def test_sixteen_processes_download_once(server: s3.Server, weights: Path) -> None:
    server.rate = 2_000_000
    barrier = PROCESSES.Barrier(16)
    processes = [PROCESSES.Process(target=child, args=(environment(), barrier)) for _ in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    assert server.sent == {
        f"bucket/model/{file.name}": file.stat().st_size for file in weights.parent.iterdir()
    }
    assert server.count("LIST") == 16


def run_alone(server: s3.Server, script: str, *command: str) -> str:
    """Run Python code in a process of its own that has the server's environment."""
    prologue = f"""
        import os, sys
        from pathlib import Path
        import huggingface_hub.constants
        from rayserve_hooks.context import NodeModelDownloadable
        from rayserve_hooks.download import transfer
        from rayserve_hooks.download.model import Mirror, download_node
        def download(hub):
            huggingface_hub.constants.HF_HUB_CACHE = hub
            return download_node("org/tiny", Mirror({URI!r}), NodeModelDownloadable["{ALL.name}"])
    """
    code = textwrap.dedent(prologue) + textwrap.dedent(script)
    done = subprocess.run(
        [*command, sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A disk of its own takes no rights here: in a user namespace everybody may mount a tmpfs.
SMALL_DISK = """
    import subprocess
    hub = os.environ["TEST_DISK"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", hub], check=True)
    {before}
    try:
        download(hub)
    except Exception as error:
        print(type(error).__name__, error)
    print(list(Path(hub).glob("models--*/refs/main")), list(Path(hub).glob("*/snapshots/*/model*")))
"""


@pytest.mark.parametrize("checked", [True, False])
def test_a_disk_that_is_too_small(
    checked: bool,
    server: s3.Server,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights.write_bytes(bytes(4 * 2**20))
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("TEST_DISK", str(disk))
    before = "" if checked else "transfer._check_target = lambda *arguments: None"
    out = run_alone(server, SMALL_DISK.format(before=before), "unshare", "-rm")
    if checked:
        pattern = (
            r"DownloadError '\S+/.rayserve_hooks/stage' has [\d,]+ bytes free, but 5,284,\d{3} are "
            r"needed; free some, or set HF_HOME to move the cache"
        )
        assert server.count("GET") == 0
    else:
        pattern = (
            r"DownloadError cannot write '\S+': OSError: \[Errno 28\] No space left on device; "
            r"check the permissions and the free space there, or set HF_HOME to move the cache"
        )
    assert re.fullmatch(rf"{pattern}\n\[\] \[\]\n", out), out


@pytest.mark.slow
def test_memory_stays_small_with_a_large_file_on_a_machine_with_many_cores(
    server: s3.Server, weights: Path, tmp_path: Path
) -> None:
    server.etags = "opaque"
    with weights.open("wb") as file:
        file.truncate(512 * 2**20)
    script = f"""
        import resource, awscrt.checksums, botocore.session, http.client, obstore.store
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        transfer.STREAMS = 64
        before = peak()
        download({str(tmp_path / "hub")!r})
        print(peak() - before)
    """
    assert int(run_alone(server, script)) < 256


def test_a_folder_that_cannot_be_written(server: s3.Server, tmp_path: Path) -> None:
    (tmp_path / "hub").touch()
    pattern = (
        r"^cannot write '.*/hub/models--org--tiny': NotADirectoryError: .*; check the "
        "permissions and the free space there, or set HF_HOME to move the cache$"
    )
    with pytest.raises(DownloadError, match=pattern):
        download()
    assert server.count("GET") == 0


class TestManySmallFiles:
    COUNT = 60

    @pytest.fixture
    def many(self, server: s3.Server) -> s3.Server:
        for number in range(self.COUNT):
            (server.root / "bucket" / "model" / f"{number}.json").write_text(f"{number}")
        return server

    @pytest.mark.parametrize("publishers", [1, 2])
    def test_all_of_them_are_published(
        self, publishers: int, many: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transfer, "PUBLISHERS", publishers)
        assert_complete(many, download())

    @pytest.mark.slow
    def test_those_that_wait_for_a_slow_disk_are_few(
        self, many: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        streams, publishers = 4, 1
        monkeypatch.setattr(transfer, "SMALL_STREAMS", streams)
        monkeypatch.setattr(transfer, "PUBLISHERS", publishers)
        waiting: list[int] = []
        write_whole = partials.PartialFile.write_whole

        def slow(partial: partials.PartialFile, data: memoryview) -> None:
            time.sleep(0.01)  # the disk's
            fetched = sum(request.endswith(".json") for request in list(many.requests))
            waiting.append(fetched - len(waiting))
            write_whole(partial, data)

        monkeypatch.setattr(partials.PartialFile, "write_whole", slow)
        assert_complete(many, download())
        # In the queue, held by a stream that waits for its turn, and under way.
        assert max(waiting) <= 3 * streams + publishers
        assert max(waiting) < self.COUNT / 2

    def test_one_that_cannot_be_written_ends_the_download(
        self, many: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(partial: partials.PartialFile, data: memoryview) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", partial.path)

        monkeypatch.setattr(partials.PartialFile, "write_whole", full)
        with pytest.raises(
            DownloadError,
            match=r"^cannot write '.*\.partial': OSError: .*No space left on device.*; check the "
            "permissions and the free space there, or set HF_HOME to move the cache$",
        ):
            download()


class TestProgress:
    def test_the_log_says_how_far_it_is(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(caller, "REPORT_S", 0.05)
        monkeypatch.setattr(transfer, "WAKE_S", 0.01)
        server.faults = [s3.Fault("slow", WEIGHTS, delay_s=0.3)]
        with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
            download()
        assert re.search(rf"{URI}: 0\.00 of 0\.00 GB \(\d+%\), \d\.\d\d GB/s", caplog.text)
        last = caplog.records[-1].getMessage()
        pattern = (
            rf"{URI}: fetched 2 files, 0\.00 GB, in \d\.\d s, \d\.\d\d GB/s; "
            r"0\.00 GB were there already"
        )
        assert re.fullmatch(pattern, last)

    def test_the_bar_of_the_caller_shows_all_bytes(self, server: s3.Server) -> None:
        bars: list[Bar] = []
        download_node("org/tiny", Mirror(URI), ALL, caller=with_bars(bars))
        total = 5 * RANGE + 1000 + 2
        assert [(bar.n, bar.closed, bar.total) for bar in bars] == [(total, True, total)]
        assert bars[0].description == URI

    def test_the_bar_starts_where_the_last_run_ended(self, server: s3.Server, model: Path) -> None:
        break_off(server)
        # It may be there, or not yet.
        published = 2 * len(list(model.glob(".rayserve_hooks/stage/config.json")))
        reused = 5 * RANGE + 1000 + 2 - missing_bytes(server)
        bars: list[Bar] = []
        download_node("org/tiny", Mirror(URI), ALL, caller=with_bars(bars))
        assert bars[0].updates[0] == reused - published  # what is complete is no part of this run

    def test_the_bar_is_closed_if_the_download_fails(self, server: s3.Server) -> None:
        server.faults = [s3.Fault("denied", WEIGHTS)]
        bars: list[Bar] = []
        with pytest.raises(DownloadError):
            download_node("org/tiny", Mirror(URI), ALL, caller=with_bars(bars))
        assert [bar.closed for bar in bars] == [True]


class Bar:
    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.closed = description, total, False
        self.updates: list[int] = []

    @property
    def n(self) -> int:
        return sum(self.updates)

    def update(self, n: int) -> None:
        self.updates.append(n)

    def close(self) -> None:
        self.closed = True


def with_bars(bars: list[Bar]) -> Caller:
    def new_bar(description: str, total: int) -> Bar:
        bars.append(Bar(description, total))
        return bars[-1]

    return Caller(progress_bar=new_bar)


def test_a_cancelled_download_ends_early_and_can_be_resumed(
    server: s3.Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel() -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(transfer, "WAKE_S", 0.01)
    server.faults = [s3.Fault("slow", WEIGHTS, delay_s=0.2)]
    with pytest.raises(asyncio.CancelledError):
        download_node("org/tiny", Mirror(URI), ALL, caller=Caller(check_cancelled=cancel))
    assert_absent(model)
    assert missing_bytes(server) >= 5 * RANGE + 1000
    server.faults = []
    assert_complete(server, download())
