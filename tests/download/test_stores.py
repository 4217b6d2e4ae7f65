"""URIs, keys and listings, whatever the store; what only one kind has is beside its module."""

from __future__ import annotations

import asyncio
import contextlib
import pkgutil
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moto_server
import pytest
import s3

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import reader, stores
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.download.store_errors import shown
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError

ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
pytestmark = pytest.mark.usefixtures("clean")


def listed(uri: str) -> list[str]:
    with contextlib.closing(open_source(uri)) as source:
        return sorted(source.list_files())


def downloaded(uri: str) -> dict[str, bytes]:
    path = download_node("org/tiny", Mirror(uri), ALL)
    assert path is not None
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in Path(path).rglob("*")
        if file.is_file()
    }


ODD = [
    "tiny#2",
    "a b",
    "a%20b",
    "a+b",
    "tiny?x",
    "tiny?x=1&y=2",
    "tïny/模型",
    "models//tiny",
    "/tiny",
    "tiny/.",
    "tiny/../other",
    "it's (1) [2] {3} ~*;:@=&,$!^|\\\"<>`",
    "%2e%2e/x",
    "anonymous@x",
]


@pytest.mark.slow
class TestOnMoto:
    @pytest.mark.parametrize("prefix", ODD)
    @pytest.mark.parametrize("slash", ["", "/"])
    def test_a_uri_is_taken_as_it_is(self, prefix: str, slash: str, moto: str) -> None:
        decoys = {"tiny", "a", "a b", "a%20b", "models/tiny", "other", "tiny/other"} - {prefix}
        objects = {f"{decoy}/config.json": b"decoy" for decoy in decoys}
        objects |= {f"{prefix}/config.json": b"{}", f"{prefix}/sub/x#y %41?z.txt": b"text"}
        moto_server.fill(moto, "bucket", objects)
        wanted = {"config.json": b"{}", "sub/x#y %41?z.txt": b"text"}
        if prefix in ("tiny", "a"):
            return
        assert downloaded(f"s3://bucket/{prefix}{slash}") == wanted

    @pytest.mark.parametrize("reading", ["small", "large"])
    def test_keys_that_only_some_libraries_write_alike(
        self, reading: str, moto: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = [*(key for key in ODD if ".." not in key and "//" not in key), "~", "é"]
        keys = [key for key in keys if not key.startswith("/") and not key.endswith("/.")]
        objects = {key: key.encode() for key in keys}
        moto_server.fill(moto, "bucket", {f"m/{key}": body for key, body in objects.items()})
        if reading == "large":
            monkeypatch.setattr("rayserve_hooks.download.s3._SMALL_BYTES", 0)
        assert downloaded("s3://bucket/m") == objects

    def test_markers_of_folders(self, moto: str) -> None:
        objects = {
            "tiny/": b"",
            "tiny/original/": b"",
            "tiny/original/sub//": b"",
            "tiny/onnx/": b"",
            "tiny/original/params.json": b"{}",
            "tiny/empty.txt": b"",
            "tiny/config.json": b"{}",
        }
        moto_server.fill(moto, "bucket", objects)
        assert downloaded("s3://bucket/tiny") == {
            "original/params.json": b"{}",
            "empty.txt": b"",
            "config.json": b"{}",
        }

    def test_a_folder_with_bytes_is_told(self, moto: str, caplog: pytest.LogCaptureFixture) -> None:
        moto_server.fill(moto, "bucket", {"tiny/onnx/": b"12345", "tiny/config.json": b"{}"})
        assert listed("s3://bucket/tiny") == ["config.json"]
        text = (
            "s3://bucket/tiny: 'onnx/' is left out: its name is that of a folder, but it has 5 "
            "bytes"
        )
        assert text in caplog.text

    def test_a_file_and_a_folder_of_one_name(self, moto: str, tmp_path: Path) -> None:
        moto_server.fill(moto, "bucket", {"t/a": b"1", "t/a/c/b.json": b"{}"})
        text = (
            "s3://bucket/t holds both 'a' and 'a/c/b.json', and no folder on disk can: one of them "
            "has to be renamed or deleted in the store"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            downloaded("s3://bucket/t")
        assert not list(tmp_path.rglob("snapshots"))

    @pytest.mark.parametrize(
        ("key", "problem"),
        [
            ("/x", "which would leave the folder it goes to; rename it"),
            ("//etc/passwd", "which would leave the folder it goes to; rename it"),
            ("../x", "which would leave the folder it goes to; rename it"),
            ("a/../../x", "which would leave the folder it goes to; rename it"),
            ("a/..", "which would leave the folder it goes to; rename it"),
            (
                "a//x",
                (
                    "of which a part is empty or '.': no file can have that path; rename it, or "
                    "name a folder below it in the URI"
                ),
            ),
            ("./x", "of which a part is empty or '.': no file can have that path; rename it"),
            ("a/.", "of which a part is empty or '.': no file can have that path; rename it"),
            (
                f"a/{'n' * 256}",
                "which is too long for a file: a name has at most 255 bytes, a path 3,072",
            ),
            ("ü" * 128, "which is too long for a file: a name has at most 255 bytes"),
        ],
    )
    def test_a_key_that_no_file_can_have(
        self, key: str, problem: str, moto: str, tmp_path: Path
    ) -> None:
        moto_server.fill(moto, "bucket", {f"tiny/{key}": b"x", "tiny/config.json": b"{}"})
        text = f"s3://bucket/tiny holds an object {key!r}, {problem}"
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}"):
            downloaded("s3://bucket/tiny")
        assert not list(tmp_path.rglob("snapshots"))

    def test_the_object_hash_is_small(self, moto: str) -> None:
        objects = {"tiny/config.json": b"{}", "tiny/hash": b"a" * 4097}
        moto_server.fill(moto, "bucket", objects)
        text = (
            "the object 'hash' of s3://bucket/tiny has 4,097 bytes, but at most 4,096 are read of "
            "it; correct it, or delete it"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            downloaded("s3://bucket/tiny")

    @pytest.mark.parametrize("prefix", ["", "/"])
    def test_a_whole_bucket(self, prefix: str, moto: str) -> None:
        moto_server.fill(moto, "bucket", {"config.json": b"{}", ".rayserve_hooks/x": b"1"})
        assert listed(f"s3://bucket{prefix}") == ["config.json"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    folder = tmp_path / "buckets" / "bucket" / "tiny"
    folder.mkdir(parents=True)
    for name in ("config.json", "weights"):
        (folder / name).write_text(name)
    with s3.serving(tmp_path / "buckets") as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        yield running


@pytest.mark.parametrize("uri", ["s3://bucket/tiny", "gs://anonymous@bucket/tiny"])
class TestBounds:
    @pytest.mark.parametrize("repeats", ["token", "cycle"])
    def test_a_listing_without_end(self, repeats: str, uri: str, server: s3.Server) -> None:
        server.repeats, server.page_size = repeats, 1
        pattern = (
            rf"^cannot list {re.escape(uri)}: (it repeats itself after [12] objects; check the "
            r"endpoint and the proxies: a store ends its listings|\S*PaginationError: .* received "
            r"twice: .*; check the endpoint and the proxies: a store ends its listings)$"
        )
        with pytest.raises(DownloadError, match=pattern):
            open_source(uri).list_files()
        # obstore hands on a thousand objects at once, and asks ahead.
        assert server.count("LIST") <= (20 if uri.startswith("s3") else 8000)

    def test_empty_pages_are_followed(self, uri: str, server: s3.Server) -> None:
        server.empty_pages = 7
        assert sorted(open_source(uri).list_files()) == ["config.json", "weights"]

    def test_an_empty_etag_is_none(self, uri: str, server: s3.Server) -> None:
        server.etags = "empty"
        source = open_source(uri)
        file = source.list_files()["weights"]
        assert file.etag is None
        assert file.version[:10] == "2026-01-01"  # so that a replaced object is noticed
        assert b"".join(bytes(part) for part in source.parts(file, (0, file.size))) == b"weights"

    def test_too_many_objects(
        self, uri: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stores, "MOST_OBJECTS", 1)
        text = f"cannot list {uri}: it has more than 1 objects; name the folder of one model"
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source(uri).list_files()

    def test_an_object_of_a_size_that_cannot_be(self, uri: str, server: s3.Server) -> None:
        server.sizes["bucket/tiny/weights"] = 10**15
        text = (
            f"{uri} holds an object 'weights' of 1,000,000,000,000,000 bytes, which no store can "
            "hold; check the endpoint and the proxies"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source(uri).list_files()

    def test_a_listing_that_stalls_can_be_cancelled(
        self, uri: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stores, "_WAKE_S", 0.02)
        monkeypatch.setattr(reader, "_POLL_S", 0.02)
        server.faults = [s3.Fault("silent")]
        asked = threading.Event()

        def cancel() -> None:
            if server.requests:
                asked.set()
                raise asyncio.CancelledError

        with (
            contextlib.closing(open_source(uri, Caller(check_cancelled=cancel))) as source,
            pytest.raises(asyncio.CancelledError),
        ):
            source.list_files()
        assert asked.is_set()

    def test_a_listing_that_stalls_is_given_up(
        self, uri: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = open_source(uri)
        monkeypatch.setattr(stores, "_WAKE_S", 0.02)
        monkeypatch.setattr(stores, "_GRACE_S", 0.0)
        monkeypatch.setattr(reader, "_POLL_S", 0.02)
        monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", "0.1")
        server.faults = [s3.Fault("silent")]
        with pytest.raises(DownloadError, match=rf"^cannot list {re.escape(uri)}: .*(came|within)"):
            source.list_files()
        source.close()


@pytest.mark.parametrize(
    ("uri", "made"),
    [
        ("s3://bucket/tiny", "s3.S3Source"),
        ("gs://anonymous@bucket/tiny", "other_stores.OtherSource"),
    ],
)
def test_a_client_that_takes_long_to_make_is_no_stall(
    uri: str, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_WAKE_S", 0.02)
    monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", "0.01")
    name = f"rayserve_hooks.download.{made}"
    make = pkgutil.resolve_name(name)

    def make_slowly(*arguments: Any) -> Any:
        threading.Event().wait(0.2)  # as imports on a busy machine
        return make(*arguments)

    monkeypatch.setattr(name, make_slowly)
    open_source(uri).close()


def test_a_store_that_is_none_of_ours() -> None:
    text = (
        "cannot open http://host/x: it is of no store that is supported; write s3://bucket/path, "
        "gs://bucket/path, azure://container@account.blob.core.windows.net/path or "
        "abfss://container@account.dfs.core.windows.net/path"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source("http://host/x")


@pytest.mark.parametrize(
    ("uri", "label"),
    [
        ("s3://bucket/tiny", "s3://bucket/tiny"),
        ("s3://anonymous@bucket/tiny#2 x%20", "s3://anonymous@bucket/tiny#2 x%20"),
        ("s3://bucket/tiny?x", "s3://bucket/tiny?x"),
        ("s3://bucket/a:b@c/d", "s3://bucket/a:b@c/d"),
        ("s3://user:SECRET@bucket/a@b", "s3://***@bucket/a@b"),
        ("s3://user:SE@CRET@bucket/a", "s3://***@bucket/a"),
        ("s3://user:SE/CRET@bucket/a", "s3://***@bucket/a"),
        ("s3://:SECRET@bucket/a", "s3://***@bucket/a"),
        ("s3://SECRET@bucket/a@b", "s3://***@bucket/a@b"),
        ("gs:// user:SECRET@bucket/a", "gs://***@bucket/a"),
        ("azure://c@a.blob.core.windows.net/x", "azure://c@a.blob.core.windows.net/x"),
        (
            "azure://c@a.blob.core.windows.net/x?sv=1&sig=SEC/RET%3D",
            "azure://c@a.blob.core.windows.net/x?sv=***&sig=***",
        ),
        ("s3://b/x?X-Amz-Signature=SECRET", "s3://b/x?X-Amz-Signature=***"),
        ("s3://b/x?a;TOKEN=SECRET?k=SECRET", "s3://b/x?a;TOKEN=***"),
    ],
)
def test_a_label_shows_what_is_no_secret(uri: str, label: str) -> None:
    assert shown(uri) == label
    assert "SECRET" not in label


def test_empty_pages_without_end(server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_EMPTY_PAGES", 5)
    server.empty_pages = float("inf")
    with pytest.raises(DownloadError, match="it repeats itself after 0 objects"):
        open_source("s3://bucket/tiny").list_files()
    assert server.count("LIST") < 20


def test_a_listing_of_other_folders(server: s3.Server) -> None:
    (server.root / "bucket/another").write_text("x")
    server.all_keys = True
    text = (
        "s3://bucket/tiny was listed, and the store answers with 'another', which is not below "
        "it; check the endpoint and the proxies"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source("s3://bucket/tiny").list_files()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://user:SECRET@bucket/tiny",
        "s3://SECRET@bucket/tiny",
        "gs://SECRET@bucket/tiny",
        "s3:// user:SECRET@bucket/tiny",
        "s3://bucket/tiny?X-Amz-Signature=SECRET&X-Amz-Credential=SECRET",
        "gs://bucket/tiny?x-goog-signature=SECRET",
        "azure://c@a.blob.core.windows.net/tiny?sv=1&sig=SECRET",
        "abfss://c:SECRET@a.dfs.core.windows.net/tiny",
        "http://user:SECRET@host/x?sig=SECRET",
        "s3://bucket/tiny?sig=SECRET/..//x",
    ],
)
def test_no_error_and_no_log_has_a_secret_of_the_uri(
    uri: str, server: s3.Server, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level("DEBUG"), pytest.raises(DownloadError) as caught:
        download_node("org/tiny", Mirror(uri), ALL)
    assert "SECRET" not in str(caught.value)
    ours = [record.getMessage() for record in caplog.records if "rayserve" in record.name]
    assert "SECRET" not in "".join(ours)


def test_a_model_id_that_no_folder_can_have() -> None:
    text = f"the model id {'m' * 300!r} is too long to name a folder: with 'models--' it has 308 "
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}bytes, and at most 255 are"):
        download_node("m" * 300, Mirror("s3://bucket/tiny"), ALL)
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}bytes, and at most 255 are"):
        download_node("m" * 300, None, ALL, from_hub=True)
