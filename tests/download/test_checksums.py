import sys
from pathlib import Path

import pytest

from rayserve_hooks.download import checksums

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
