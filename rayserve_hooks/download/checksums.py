"""The checksums of objects: asked of the store, and computed here.

An ETag that is an MD5 is in the listing; everything else takes a HEAD request per object. A
checksum of its parts' checksums, which S3 may have instead of the full object's, is of no use here.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayserve_hooks.download.store_errors import message_of
from rayserve_hooks.download.stores import RemoteFile, Source

_READ_BYTES = 2**20
_DIGEST_BYTES = {"crc64nvme": 8, "crc32c": 4, "crc32": 4, "sha256": 32, "sha1": 20, "md5": 16}
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
        return getattr(hashlib, algorithm)(usedforsecurity=False)
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
        self._usable = source.can_head()
        self._etags_are_md5 = source.scheme == "s3"  # there, until an answer shows otherwise

    def wanted(self, file: RemoteFile) -> bool:
        """Return whether the listing has no checksum of an object, or only a slow one."""
        has_md5 = self._etags_are_md5 and expected_checksum(file, None) is not None
        return self._usable and (file.size > _ABOVE_BYTES or not has_md5)

    def of(self, file: RemoteFile) -> Head | None:
        """Return an object's head; None if the store refuses or has none."""
        if not self._usable:
            return None
        try:
            headers = self.source.head(file)
        except Exception as error:  # not worth a failed download, whatever it is
            uri, why = self.source.shown_uri, message_of(error)
            if "auth is not supported" in why:  # a SAS token signs nothing; it will be so for all
                self._usable = False
                text = (
                    "%s: some files are verified by size only, because the store cannot be asked "
                    "for their checksum: %s"
                )
                self._logger.warning(text, uri, why)
            else:
                self._logger.warning("no checksum for %s of %s: %s", file.path, uri, why)
            return None
        etags = {str(etag).strip('"') for etag in (headers.get("etag") or file.etag, file.etag)}
        if len(etags) > 1:  # only some listings have the quotes
            return None  # another version; the ranges, which are pinned to ours, will fail
        encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
        etag_is_md5 = self.source.scheme == "s3" and not (encrypted or own_key)
        self._etags_are_md5 &= etag_is_md5
        return Head(self._checksum(file, headers), etag_is_md5)

    def _checksum(self, file: RemoteFile, headers: Mapping[str, str]) -> str | None:
        found, malformed = full_checksum(headers)
        if malformed:
            text = "%s of %s: the store sends %s, which is no checksum; it is ignored"
            shown = ", ".join(f"{name}: {value!r}" for name, value in malformed)
            self._logger.warning(text, file.path, self.source.shown_uri, shown)
        return found


def full_checksum(headers: Mapping[str, str]) -> tuple[str | None, list[tuple[str, str]]]:
    """Return the fastest checksum of the whole object that can be computed here.

    Args:
        headers: Of the answer, with their names in lower case.

    Returns:
        The checksum, if any, and the headers that hold what cannot be one.
    """
    malformed: list[tuple[str, str]] = []

    def valid(header: str, algorithm: str, value: str) -> str | None:
        if new_hash(algorithm) is None:
            return None
        try:
            digest = base64.b64decode(value, validate=True)
        except ValueError:
            digest = b""
        if len(digest) == _DIGEST_BYTES[algorithm]:
            return checksum_text(algorithm, digest)
        malformed.append((header, value))
        return None

    candidates: list[tuple[str, str, str]] = []
    # Some stores do not send the type.
    full = headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT"
    for algorithm in ("crc64nvme", "crc32c", "crc32", "sha256", "sha1"):
        header = f"x-amz-checksum-{algorithm}"
        value = headers.get(header, "")
        # A checksum of checksums ends in the number of parts.
        if value and full and re.fullmatch(r".*-\d+", value) is None:
            candidates.append((header, algorithm, value))
    sent = headers.get("x-goog-hash", "")
    google = dict(re.findall(r"(crc32c|md5)=([^,\s]*)", sent))
    candidates += [("x-goog-hash", name, google[name]) for name in sorted(google)]
    if sent and not google:
        malformed.append(("x-goog-hash", sent))
    if md5 := headers.get("content-md5"):
        candidates.append(("content-md5", "md5", md5))
    for candidate in candidates:
        if (found := valid(*candidate)) is not None:
            return found, malformed
    return None, malformed
