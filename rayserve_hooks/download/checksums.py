"""The checksums that object stores keep, computed here."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

_READ_BYTES = 2**20


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc:
    """A CRC function as a hash object."""

    def __init__(self, function: Callable[[Any, int], int], digest_bytes: int) -> None:
        self._function, self._digest_bytes, self._value = function, digest_bytes, 0

    def update(self, data: Any, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._digest_bytes, "big")


def new_hash(algorithm: str) -> _Hash | None:
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
