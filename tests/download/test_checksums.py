"""What is computed, and what is made of a store's answers; how it is asked is in test_transfer."""

import sys
from pathlib import Path

import pytest
import s3

from rayserve_hooks.download import checksums
from rayserve_hooks.download.checksums import Head, Heads, expected_checksum
from rayserve_hooks.download.stores import RemoteFile, open_source

# The check values of the catalogue of CRCs, and of RFC 1321, 3174 and 6234, in the stores' writing.
KNOWN = {
    "crc64nvme": (b"123456789", "crc64nvme:rosUhgp5mIg="),
    "crc32c": (b"123456789", "crc32c:4waSgw=="),
    "crc32": (b"123456789", "crc32:y/Q5Jg=="),
    "md5": (b"abc", "md5:900150983cd24fb0d6963f7d28e17f72"),
    "sha1": (b"abc", "sha1:qZk+NkcGgWq6PiVxeFDCbJzQ2J0="),
    "sha256": (b"abc", "sha256:ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="),
}


@pytest.mark.parametrize("algorithm", KNOWN)
def test_known_values(algorithm: str) -> None:
    data, text = KNOWN[algorithm]
    assert checksums.checksum_of(data, algorithm) == text


@pytest.mark.parametrize("algorithm", KNOWN)
def test_a_file_of_many_blocks(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_READ_BYTES", 2)
    data, text = KNOWN[algorithm]
    (tmp_path / "file").write_bytes(data)
    assert checksums.checksum_of(tmp_path / "file", algorithm) == text


def test_what_cannot_be_computed_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awscrt", None)
    assert checksums.checksum_of(b"x", "crc64nvme") is None
    assert checksums.checksum_of(b"123456789", "crc32") == KNOWN["crc32"][1]


MD5 = "0123456789abcdef" * 2
LARGE = checksums._ABOVE_BYTES + 1


def file(etag: str | None, size: int = 1) -> RemoteFile:
    return RemoteFile("weights", size, etag, "1")


def asking(uri: str = "s3://anonymous@bucket/model") -> Heads:
    return Heads(open_source(uri))


@pytest.mark.parametrize(
    ("etag", "head", "expected"),
    [
        (f'"{MD5}"', None, f"md5:{MD5}"),
        (MD5, None, f"md5:{MD5}"),
        (f'"{MD5}-2"', None, None),
        ('"0x8D9"', None, None),
        (None, None, None),
        (f'"{MD5}"', Head("crc32c:x", etag_is_md5=True), "crc32c:x"),
        (f'"{MD5}"', Head(None, etag_is_md5=True), f"md5:{MD5}"),
        (f'"{MD5}"', Head(None, etag_is_md5=False), None),
    ],
)
def test_the_checksum_that_a_file_should_have(
    etag: str | None, head: Head | None, expected: str | None
) -> None:
    assert expected_checksum(file(etag), head) == expected


@pytest.mark.parametrize(
    ("uri", "remote", "wanted"),
    [
        ("s3://anonymous@bucket/model", file(MD5), False),
        ("s3://anonymous@bucket/model", file(f"{MD5}-2"), True),
        ("s3://anonymous@bucket/model", file(MD5, LARGE), True),
        ("gs://anonymous@bucket/model", file(MD5, LARGE), True),
        ("azure://c@a.blob.core.windows.net/model", file("0x8D9"), True),
        ("file:///tmp", file(None, LARGE), False),
    ],
)
def test_a_store_is_asked_where_its_listing_does_not_do(
    uri: str, remote: RemoteFile, wanted: bool
) -> None:
    assert asking(uri).wanted(remote) == wanted


@pytest.mark.parametrize(
    ("headers", "checksum"),
    [
        ({}, None),
        (
            {"x-amz-checksum-crc32": "y/Q5Jg==", "x-amz-checksum-crc64nvme": "rosUhgp5mIg="},
            "crc64nvme:rosUhgp5mIg=",
        ),
        ({"x-amz-checksum-sha256": "b", "x-amz-checksum-type": "COMPOSITE"}, None),
        ({"x-amz-checksum-sha256": "b-2"}, None),
        ({"x-goog-hash": "crc32c=n03x6A==,md5=kAFQmDzST7DWlj99KOF/cg=="}, "crc32c:n03x6A=="),
        ({"x-goog-hash": "md5=kAFQmDzST7DWlj99KOF/cg=="}, "md5:900150983cd24fb0d6963f7d28e17f72"),
        ({"Content-MD5": "kAFQmDzST7DWlj99KOF/cg=="}, "md5:900150983cd24fb0d6963f7d28e17f72"),
    ],
)
def test_the_checksum_of_a_head(headers: dict[str, str], checksum: str | None) -> None:
    lower = {name.lower(): value for name, value in headers.items()}
    assert checksums.full_checksum(lower) == (checksum, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("content-md5", "abc"),
        ("content-md5", "not base64 at all"),
        ("content-md5", "AAAA"),
        ("content-md5", "\xe9"),
        ("x-goog-hash", "crc32c=AAAAAAAA"),
        ("x-goog-hash", "crc32c=?,md5=!"),
        ("x-goog-hash", "nonsense"),
        ("x-amz-checksum-crc64nvme", "AAAAAA=="),
        ("x-amz-checksum-crc32c", "rosUhgp5mIg="),
        ("x-amz-checksum-sha256", "x"),
        ("x-amz-checksum-sha1", "-"),
    ],
)
def test_a_header_that_holds_no_checksum_is_ignored(name: str, value: str) -> None:
    found, malformed = checksums.full_checksum({name: value})
    assert found is None
    assert {header for header, _ in malformed} == {name}
    sound = {"x-amz-checksum-crc32": "y/Q5Jg=="}
    assert checksums.full_checksum({name: value, **sound})[0] == "crc32:y/Q5Jg=="


def test_a_header_that_holds_no_checksum_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bucket" / "model"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("content")
    with s3.serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.checksums["bucket/model/weights"] = {"x-amz-checksum-crc32c": "abc"}
        remote = file(server.etag(folder / "weights"))
        assert asking().of(remote) == Head(None, etag_is_md5=True)
    text = (
        "weights of s3://anonymous@bucket/model: the store sends x-amz-checksum-crc32c: 'abc', "
        "which is no checksum; it is ignored"
    )
    assert text in caplog.text


def test_once_an_etag_was_no_md5_all_files_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bucket" / "model"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("content")
    with s3.serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        asked = asking("s3://anonymous@bucket/model")
        remote = file(server.etag(folder / "weights"))
        assert not asked.wanted(remote)
        server.checksums["bucket/model/weights"] = {"x-amz-server-side-encryption": "aws:kms"}
        assert asked.of(file(f'"{remote.etag}"')) == Head(None, etag_is_md5=False)
    assert asked.wanted(remote)


def test_a_store_of_another_kind_is_not_asked() -> None:
    assert asking("file:///tmp").of(file(None)) is None
