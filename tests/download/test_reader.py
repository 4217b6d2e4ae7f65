"""Ranges: resumed, compared with what was listed, and given up in time."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3

from rayserve_hooks.download import other_stores, reader, settings
from rayserve_hooks.download.stores import RemoteFile, Source, open_source
from rayserve_hooks.errors import DownloadError

CONTENT = random.Random(0).randbytes(300_000)
SPAN = (100_000, 300_000)
WANTED = CONTENT[slice(*SPAN)]
PATH = "bucket/model/we ights"


@pytest.fixture
def root(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    weights = tmp_path / "buckets" / PATH
    weights.parent.mkdir(parents=True)
    weights.write_bytes(CONTENT)
    monkeypatch.setattr(reader, "_BUFFER_BYTES", 2**14)
    return weights.parents[2]


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    with s3.serving(root) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def source(server: s3.Server) -> Iterator[Source]:
    with contextlib.closing(open_source("s3://bucket/model")) as opened:
        yield opened


@pytest.fixture
def file(server: s3.Server, root: Path) -> RemoteFile:
    return RemoteFile("we ights", len(CONTENT), f'"{server.etag(root / PATH)}"', "1")


def read(source: Source, file: RemoteFile, span: tuple[int, int] = SPAN) -> bytes:
    with contextlib.closing(source.parts(file, span)) as parts:
        return b"".join(bytes(part) for part in parts)


def test_a_range(source: Source, file: RemoteFile, server: s3.Server) -> None:
    assert read(source, file) == WANTED
    assert server.sent_of(PATH) == len(WANTED)


@pytest.mark.parametrize("size", [1, 2**14, 2**14 + 1])
def test_a_range_of_any_length(source: Source, file: RemoteFile, size: int) -> None:
    assert read(source, file, (7, 7 + size)) == CONTENT[7 : 7 + size]


def test_the_whole_object(source: Source, file: RemoteFile) -> None:
    assert read(source, file, (0, len(CONTENT))) == CONTENT


def test_a_file_without_an_etag(source: Source) -> None:
    assert read(source, RemoteFile("we ights", len(CONTENT), None, "1")) == WANTED


def test_a_connection_is_used_again(source: Source, file: RemoteFile, server: s3.Server) -> None:
    assert read(source, file) == read(source, file) == WANTED
    assert server.connections == 1


def test_a_connection_that_was_closed_meanwhile_is_replaced(
    source: Source, file: RemoteFile, server: s3.Server
) -> None:
    server.faults = [s3.Fault("hang up", times=1)]
    assert read(source, file) == read(source, file) == WANTED
    assert server.count("GET") == 2
    assert server.connections == 2


def test_a_range_that_is_left_alone_takes_its_connection_along(
    source: Source, file: RemoteFile, server: s3.Server
) -> None:
    parts = source.parts(file, SPAN)
    assert next(parts) == WANTED[: 2**14]
    parts.close()
    assert read(source, file) == WANTED
    assert server.connections == 2


@pytest.mark.parametrize("kind", ["truncated", "reset", "busy", "throttled", "short"])
def test_what_passes_is_asked_again_from_the_byte_reached(
    kind: str, source: Source, file: RemoteFile, server: s3.Server
) -> None:
    server.faults = [s3.Fault(kind, times=2)]
    assert read(source, file) == WANTED
    assert server.sent_of(PATH) == len(WANTED)


@pytest.mark.parametrize("kind", ["denied", "missing"])
def test_what_is_refused_is_not_asked_again(
    kind: str, source: Source, file: RemoteFile, server: s3.Server
) -> None:
    server.faults = [s3.Fault(kind)]
    with pytest.raises(DownloadError, match=r"^cannot fetch 'we ights' of s3://bucket/model: 40"):
        read(source, file)
    assert server.count("GET") == 1


class TestAnotherContent:
    """One version, unencoded, of one length, from one host: or an error."""

    @pytest.mark.parametrize("listed", [True, False])
    def test_a_store_that_ignores_the_version_asked_for(
        self, listed: bool, source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        remote = file if listed else RemoteFile("we ights", len(CONTENT), None, "1")
        if not listed:
            assert read(source, remote) == WANTED
        server.faults = [s3.Fault("other")]
        pattern = (
            r"^cannot fetch 'we ights' of s3://bucket/model: the version is '\"other\"', but "
            r"'\"[0-9a-f]{32}\"' was listed or sent before; the object has changed under the "
            r"download; try again when its upload is over$"
        )
        with pytest.raises(DownloadError, match=pattern):
            read(source, remote)

    def test_another_version_is_refused_by_the_store(self, source: Source) -> None:
        pattern = "412 Precondition Failed: .*; the object has changed under the download; try"
        with pytest.raises(DownloadError, match=pattern):
            read(source, RemoteFile("we ights", len(CONTENT), '"old"', "1"))

    def test_an_object_of_another_size(self, source: Source, file: RemoteFile) -> None:
        pattern = "it has 300000 bytes, but 400000 in the listing; the object has changed"
        with pytest.raises(DownloadError, match=pattern):
            read(source, RemoteFile("we ights", 400_000, file.etag, "1"))

    @pytest.mark.parametrize("span", [SPAN, (0, len(CONTENT)), (0, 5)])
    def test_an_answer_that_is_encoded(
        self, span: tuple[int, int], source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        server.faults = [s3.Fault("gzip")]
        pattern = (
            r"^cannot fetch 'we ights' of s3://bucket/model: \d+ bytes are sent in the encoding "
            r"'gzip'; the store or a proxy changes it: let it send what is stored$"
        )
        with pytest.raises(DownloadError, match=pattern):
            read(source, file, span)
        assert {headers["accept-encoding"] for headers in server.headers} == {"identity"}

    @pytest.mark.parametrize("span", [SPAN, (0, len(CONTENT))])
    def test_a_length_that_is_no_number_says_nothing(
        self, span: tuple[int, int], source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        server.faults = [s3.Fault("unmeasured")]
        assert read(source, file, span) == CONTENT[slice(*span)]

    @pytest.mark.parametrize("span", [SPAN, (0, len(CONTENT))])
    def test_an_answer_without_a_length_that_is_longer(
        self, span: tuple[int, int], source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        server.faults = [s3.Fault("excess")]
        pattern = "^cannot fetch 'we ights' of s3://bucket/model: the answer has more bytes than"
        with pytest.raises(DownloadError, match=pattern):
            read(source, file, span)

    @pytest.mark.parametrize("whole", [True, False])
    def test_a_redirect_gets_no_credentials(
        self,
        whole: bool,
        file: RemoteFile,
        server: s3.Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
        with s3.serving(server.root) as evil:
            server.faults = [s3.Fault("redirect", to=evil.url.replace("127.0.0.1", "localhost"))]
            pattern = (
                r"PermanentRedirect: '127.0.0.1' redirects to 'localhost', where no credentials "
                "are sent; check the region, and that the endpoint is that of the bucket"
            )
            with (
                contextlib.closing(open_source("s3://bucket/model")) as opened,
                pytest.raises(DownloadError, match=pattern),
            ):
                read(opened, file, (0, len(CONTENT)) if whole else SPAN)
            assert evil.requests == []

    def test_a_small_object_that_is_redirected(
        self, source: Source, server: s3.Server, root: Path
    ) -> None:
        (root / "bucket/model/small").write_text("small")
        small = RemoteFile("small", 5, f'"{server.etag(root / "bucket/model/small")}"', "1")
        with s3.serving(server.root) as evil:
            server.faults = [s3.Fault("redirect", to=evil.url.replace("127.0.0.1", "localhost"))]
            with pytest.raises(DownloadError, match="where no credentials are sent"):
                read(source, small, (0, 5))
            assert evil.requests == []


class TestStalls:
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch, source: Source) -> None:
        # Only now: making a client may take longer on a machine with other work.
        monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", "0.2")
        monkeypatch.setattr(reader, "_POLL_S", 0.02)

    @pytest.mark.parametrize("kind", ["silent", "stall", "trickle"])
    def test_one_that_passes(
        self, kind: str, source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        server.faults = [s3.Fault(kind, delay_s=0.03, times=2)]
        assert read(source, file) == WANTED

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "got"), [("silent", r"0"), ("trickle", r"\d+")])
    def test_one_that_does_not(
        self, kind: str, got: str, source: Source, file: RemoteFile, server: s3.Server
    ) -> None:
        server.faults = [s3.Fault(kind, delay_s=0.03)]
        pattern = (
            r"^cannot fetch 'we ights' of s3://bucket/model: \d+ bytes came in 0\.2 s; "
            rf"{got} of 200,000 bytes in \d\.\d s, 3 times; look for what stalls, the store, a "
            "proxy or the network, or set RAYSERVE_HOOKS_STALL_S to wait longer$"
        )
        with pytest.raises(DownloadError, match=pattern):
            read(source, file)
        assert server.count("GET") == 3

    @pytest.mark.slow
    def test_a_slow_body_is_no_stall(
        self, source: Source, file: RemoteFile, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A busy machine sends less than a byte each 0.3 ms.
        monkeypatch.setattr(settings, "LEAST_RATE", 64)
        server.faults = [s3.Fault("trickle", delay_s=0.0003)]
        assert read(source, file, (0, 3000)) == CONTENT[:3000]
        assert server.count("GET") == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["silent", "trickle"])
    def test_that_of_another_store(
        self, kind: str, source: Source, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(other_stores, "CHUNK_BYTES", 2**14)
        with contextlib.closing(open_source("gs://anonymous@bucket/model")) as opened:
            (file,) = opened.list_files().values()
            server.faults = [s3.Fault(kind, delay_s=0.03)]
            pattern = r"^cannot fetch 'we ights' of gs://.*3 times; look for what stalls, the store"
            with pytest.raises(DownloadError, match=pattern):
                read(opened, file)

    def test_a_machine_that_was_busy_for_a_minute_is_none(
        self, source: Source, file: RemoteFile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        minutes = itertools.count()
        clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
        monkeypatch.setattr(reader, "time", clock)
        assert read(source, file) == WANTED

    def test_the_end_of_a_download_is_noticed(
        self, source: Source, file: RemoteFile, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", "60")
        server.faults = [s3.Fault("stall")]
        parts = source.parts(file, SPAN)
        next(parts)
        threading.Timer(0.05, source.stop).start()
        with pytest.raises(DownloadError, match="the download has ended"):
            for _ in parts:
                pass


def test_nobody_listens(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    source = open_source("s3://bucket/model")
    pattern = (
        r"^cannot fetch 'x' of s3://bucket/model, asked 6 times: http://127.0.0.1:1: "
        r"ConnectionRefusedError: \[Errno 111\] Connection refused; check endpoint, region"
    )
    with pytest.raises(DownloadError, match=pattern):
        read(source, RemoteFile("x", len(CONTENT), None, "1"))


class TestProxies:
    @pytest.fixture
    def proxy(self, server: s3.Server) -> Iterator[list[bytes]]:
        """Forward every request to the server; yield what was asked for."""
        seen: list[bytes] = []
        listening = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        head = connection.recv(65536)
                        seen.append(head)
                        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
                        with socket.create_connection(address) as onwards:
                            onwards.sendall(re.sub(rb"http://[^/]*/", b"/", head, count=1))
                            onwards.shutdown(socket.SHUT_WR)
                            while data := onwards.recv(65536):
                                connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self.url = f"http://us%40er:pass@127.0.0.1:{listening.getsockname()[1]}"
        yield seen
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()

    def test_everything_goes_through_it(
        self,
        server: s3.Server,
        proxy: list[bytes],
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (root / "bucket/model/small").write_text("small")
        monkeypatch.setenv("http_proxy", self.url)
        server.etags = "multipart"
        with contextlib.closing(open_source("s3://bucket/model")) as opened:
            files = opened.list_files()
            assert read(opened, files["we ights"]) == WANTED
            assert read(opened, files["small"], (0, 5)) == b"small"
            assert opened.head(files["small"])["content-length"] == "5"
        assert [head.split()[0] for head in proxy] == [b"GET", b"GET", b"GET", b"HEAD"]
        assert all(b"Proxy-Authorization: Basic dXNAZXI6cGFzcw==" in head for head in proxy)
        assert all(head.split()[1].startswith(b"http://127.0.0.1:") for head in proxy)
        assert len(server.requests) == len(proxy)

    @pytest.mark.parametrize("uri", ["s3://bucket/model", "gs://anonymous@bucket/model"])
    @pytest.mark.parametrize(
        "variables",
        [
            {"no_proxy": "*"},
            {"no_proxy": "127.0.0.1"},
            {"NO_PROXY": "10.0.0.1, 127.0.0.1"},
            {"no_proxy": "127.0.0.1:PORT"},
            {"NO_PROXY": "host:1,127.0.0.1:PORT"},
        ],
    )
    def test_what_goes_past_it(
        self,
        uri: str,
        variables: dict[str, str],
        server: s3.Server,
        proxy: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("http_proxy", self.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        for name, value in variables.items():
            monkeypatch.setenv(name, value.replace("PORT", server.url.rpartition(":")[2]))
        with contextlib.closing(open_source(uri)) as opened:
            (file,) = opened.list_files().values()
            assert read(opened, file) == WANTED
            opened.head(file)
        assert proxy == []

    @pytest.mark.parametrize(
        ("uri", "variables", "through"),
        [
            # boto3 reads neither; requests, and with it the others, reads both.
            ("s3://bucket/model", {"all_proxy": ""}, False),
            ("s3://bucket/model", {"http_proxy": "", "no_proxy": "127.0.0.0/8"}, True),
            ("gs://anonymous@bucket/model", {"all_proxy": ""}, True),
            ("gs://anonymous@bucket/model", {"http_proxy": "", "no_proxy": "127.0.0.0/8"}, False),
            ("gs://anonymous@bucket/model", {"http_proxy": ""}, True),
            ("gs://anonymous@bucket/model", {"http_proxy": "", "no_proxy": "127.0.0.1:1"}, True),
            ("s3://bucket/model", {"http_proxy": "", "no_proxy": "127.0.0.1:1"}, True),
        ],
    )
    def test_all_requests_agree(
        self,
        *,
        uri: str,
        variables: dict[str, str],
        through: bool,
        server: s3.Server,
        proxy: list[bytes],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value or self.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        with contextlib.closing(open_source(uri)) as opened:
            (file,) = opened.list_files().values()
            assert read(opened, file) == WANTED
            opened.head(file)
        assert len(proxy) == (3 if through else 0)

    @pytest.mark.parametrize("uri", ["s3://bucket/model", "gs://anonymous@bucket/model"])
    def test_one_that_is_not_there_is_named_without_its_password(
        self, uri: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", "http://user:SECRET@127.0.0.1:1")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(other_stores, "RETRIES", {"max_retries": 0})
        started = time.monotonic()
        with pytest.raises(DownloadError) as caught:
            open_source(uri).list_files()
        text = str(caught.value)
        assert "the proxy 'http://127.0.0.1:1': " in text
        assert text.endswith("; check the variables http_proxy, https_proxy and no_proxy")
        assert "SECRET" not in text
        assert time.monotonic() - started < 10
        assert server.requests == []

    def test_one_that_never_answers(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", "0.2")
            monkeypatch.setattr(reader, "_POLL_S", 0.02)
            source = open_source("s3://bucket/model")
            pattern = r"^cannot list s3://bucket/model: the proxy 'http://127.0.0.1:\d+': 0 bytes"
            with pytest.raises(DownloadError, match=pattern):
                source.list_files()
