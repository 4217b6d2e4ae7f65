"""The checksums of objects: asked of the store, and computed here.

An ETag that is an MD5 is in the listing; everything else takes a HEAD request per object. A
checksum of its parts' checksums, which S3 may have instead of the full object's, is of no use here.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayserve_hooks.download.stores import RemoteFile, Source, aws_region, message_of

_READ_BYTES = 2**20
_TIMEOUT_S = 30
_SCHEMES = ("s3", "gs", "azure", "abfss")
# Computing an MD5 takes longer than the download, so a faster checksum is requested of large files.
_ABOVE_BYTES = 64 * 2**20
_MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')


class _Crc:
    """A CRC function as a hash object of ``hashlib``."""

    def __init__(self, function: Callable[[Any, int], int], digest_bytes: int) -> None:
        self._function, self._digest_bytes, self._value = function, digest_bytes, 0

    def update(self, data: Any, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._digest_bytes, "big")


def new_hash(algorithm: str) -> Any:
    """Return a hash object of an algorithm; None if its library is missing."""
    if algorithm in ("md5", "sha1", "sha256"):
        return hashlib.new(algorithm, usedforsecurity=False)
    try:
        from awscrt import checksums
    except ImportError:
        return _Crc(zlib.crc32, 4) if algorithm == "crc32" else None
    return _Crc(getattr(checksums, algorithm), 8 if algorithm == "crc64nvme" else 4)


def checksum_text(algorithm: str, digest: bytes) -> str:
    """Format a digest as the stores do: MD5 in hex, as in ETags, everything else in base64."""
    value = digest.hex() if algorithm == "md5" else base64.b64encode(digest).decode()
    return f"{algorithm}:{value}"


def checksum_of(content: Path | bytes | bytearray, algorithm: str) -> str | None:
    """Return a checksum; a file is not mapped, so that its pages do not count as our memory."""
    hashing = new_hash(algorithm)
    if hashing is None:
        return None
    if not isinstance(content, Path):
        hashing.update(content)
    else:
        buffer = memoryview(bytearray(_READ_BYTES))
        with content.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hashing.update(buffer[:count])
    return checksum_text(algorithm, hashing.digest())


@dataclass(frozen=True)
class Head:
    """What the store knows of an object's content."""

    checksum: str | None  # of the full object
    etag_is_md5: bool  # not if it is encrypted with a key: then its ETag is no hash of the content


def expected_checksum(file: RemoteFile, head: Head | None) -> str | None:
    """Return the checksum that the store has of an object, if any, as ``"<algorithm>:<value>"``."""
    if head is not None and head.checksum is not None:
        return head.checksum
    found = _MD5_ETAG.fullmatch(file.etag or "")
    if found is None or (head is not None and not head.etag_is_md5):
        return None
    return f"md5:{found[1]}"


class Heads:
    """Requests the checksums of one store's objects."""

    def __init__(self, source: Source) -> None:
        self.source, self._logger = source, source.caller.logger
        self._usable = source.scheme in _SCHEMES
        self._etags_are_md5 = True  # until a response shows otherwise

    def wanted(self, file: RemoteFile) -> bool:
        """Return whether the listing has no checksum of an object, or only a slow one."""
        has_md5 = self._etags_are_md5 and expected_checksum(file, None) is not None
        return self._usable and (file.size > _ABOVE_BYTES or not has_md5)

    def of(self, file: RemoteFile) -> Head | None:
        """Return an object's head; None if the store refuses, has none, or boto3 is missing."""
        signed = self._signed(file.path) if self._usable else None
        if signed is None:
            return None
        import urllib.request  # costs more than the rest of this module

        url, fields = signed
        # The endpoint is the operator's own setting, and https by default.
        request = urllib.request.Request(url, method="HEAD", headers=fields)  # noqa: S310
        try:
            tls = self.source.tls if request.type == "https" else None
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=tls) as response:  # noqa: S310
                headers = response.headers
        except Exception as error:  # not worth a failed download, whatever it is
            uri, why = self.source.shown_uri, message_of(error)
            self._logger.warning("no checksum for %s of %s: %s", file.path, uri, why)
            return None
        etags = {str(etag).strip('"') for etag in (headers.get("ETag", file.etag), file.etag)}
        if len(etags) > 1:  # only some listings have the quotes
            return None  # another version; the ranges, which are pinned to ours, will fail
        encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
        etag_is_md5 = self.source.scheme == "s3" and not (encrypted or own_key)
        self._etags_are_md5 &= etag_is_md5
        return Head(_full_checksum(headers), etag_is_md5)

    def _signed(self, path: str) -> tuple[str, dict[str, str]] | None:
        """Return URL and headers, with the credentials that the downloads use."""
        try:
            if self.source.scheme == "s3":
                return self._signed_for_s3(path)
            # Azure signs permissions instead of methods; reading is the permission of GET.
            google = self.source.scheme == "gs"
            return self.source.readable_url_of(path, "HEAD" if google else "GET"), {}
        except Exception as error:  # whatever botocore or obstore raise; it will be so for all
            self._usable = False
            missing = isinstance(error, ImportError)
            self._logger.warning(
                "%s: some files are verified by size only, because the store cannot be asked for "
                "their checksum: %s%s",
                self.source.shown_uri,
                message_of(error),
                "; install 'rayserve_hooks[download]' on every node" if missing else "",
            )
            return None

    def _signed_for_s3(self, path: str) -> tuple[str, dict[str, str]]:
        """Sign as botocore does; obstore's signed URLs cannot request a checksum.

        Not with a client of boto3: creating one holds the GIL for 100 ms, for one kind of request.
        """
        headers = {"x-amz-checksum-mode": "ENABLED"}
        if self.source.anonymous:
            return self.source.url_of(path), headers
        session = self._session
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        region = aws_region() or session.region_name or "us-east-1"
        url = self.source.url_of(path, region)
        signed = AWSRequest("HEAD", url, headers=headers)
        S3SigV4Auth(session.get_credentials(), "s3", region).add_auth(signed)
        return url, dict(signed.headers.items())

    @functools.cached_property
    def _session(self) -> Any:
        import boto3

        return boto3.Session()


def _full_checksum(headers: Mapping[str, str]) -> str | None:
    """Return the fastest checksum of the whole object that can be computed here."""
    for algorithm in ("crc64nvme", "crc32c", "crc32", "sha256", "sha1"):
        value = headers.get(f"x-amz-checksum-{algorithm}")
        # A checksum of checksums ends in the number of parts; some stores do not send the type.
        kind = headers.get("x-amz-checksum-type", "FULL_OBJECT")
        full = kind == "FULL_OBJECT" and "-" not in str(value)
        if value and full and new_hash(algorithm) is not None:
            return f"{algorithm}:{value}"
    google = dict(re.findall(r"(crc32c|md5)=([\w+/]+=*)", headers.get("x-goog-hash", "")))
    if "crc32c" in google and new_hash("crc32c") is not None:
        return f"crc32c:{google['crc32c']}"
    md5 = google.get("md5") or headers.get("Content-MD5")
    return f"md5:{base64.b64decode(md5).hex()}" if md5 else None
