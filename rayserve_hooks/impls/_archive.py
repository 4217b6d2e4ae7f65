"""A folder as one signed archive: nothing is unpacked that is not proved to be ours."""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

MAGIC = b"rayserve_hooks 1\n"
_SIGNATURE_BYTES = 32
_MOST_FILES = 100_000


class ArchiveError(ValueError):
    """An archive is not ours, or holds what no archive of ours does."""


def pack(folder: Path, units: Iterable[str], name: str, key: bytes) -> bytes:
    """Return the files of some folders below ``folder`` as an archive, signed for its name.

    Links and what is no plain file are left out.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for unit in sorted(units):
            for path in sorted((folder / unit).rglob("*")):
                if path.is_file() and not path.is_symlink():
                    archive.add(path, path.relative_to(folder).as_posix(), filter=_plain)
    data = buffer.getvalue()
    return MAGIC + _signature(data, name, key) + data


def unpack(data: bytes, folder: Path, name: str, key: bytes, limit_bytes: int) -> list[str]:
    """Check an archive, and publish its units in ``folder``, each by a rename.

    Args:
        data: As `pack` has returned it.
        folder: Where the units go; those that are there stay as they are.
        name: What the archive was signed for.
        key: It was signed with.
        limit_bytes: Of all files together.

    Returns:
        The units that were published.

    Raises:
        ArchiveError: The signature is wrong, or a member is a link, leaves the folder or is in no
            unit. Nothing is published then.
        OSError: The folder cannot be written.
    """
    start = len(MAGIC) + _SIGNATURE_BYTES
    tar = memoryview(data)[start:]
    if data[: len(MAGIC)] != MAGIC or not hmac.compare_digest(
        data[len(MAGIC) : start], _signature(tar, name, key)
    ):
        raise ArchiveError(
            f"the signature of {name!r} is not of this key; give all who write and read the "
            "archives the same one, and delete what others have put there"
        )
    staging = folder / f".restore-{os.getpid()}-{os.urandom(4).hex()}"
    staging.mkdir(mode=0o700)
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            members = archive.getmembers()
            units = _units(members, name, limit_bytes)
            archive.extractall(staging, members, filter="data")
        return [unit for unit in units if _publish(staging / unit, folder / unit)]
    except tarfile.TarError as error:
        raise ArchiveError(f"{name!r} is no archive: {error}; delete it") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def units_of(paths: Iterable[str]) -> list[str]:
    """Return the folders that vLLM makes whole, of the paths of files below its cache.

    They are ``torch_compile_cache/KEY`` and ``torch_compile_cache/torch_aot_compile/KEY``, and
    ``modelinfos``, what an inspection of the model's class has found: it takes seconds.
    """
    found = set()
    for path in paths:
        parts = path.split("/")
        depth = 3 if parts[:2] == ["torch_compile_cache", "torch_aot_compile"] else 2
        depth = 1 if parts[0] == "modelinfos" else depth
        if parts[0] in ("torch_compile_cache", "modelinfos") and len(parts) > depth:
            found.add("/".join(parts[:depth]))
    return sorted(found)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def _units(members: list[tarfile.TarInfo], name: str, limit_bytes: int) -> list[str]:
    # Besides what the filter "data" refuses, which lets links within the folder pass.
    if len(members) > _MOST_FILES or sum(member.size for member in members) > limit_bytes:
        raise ArchiveError(f"{name!r} unpacks to more than {limit_bytes:,} bytes; raise the limit")
    for member in members:
        parts = member.name.split("/")
        if not member.isreg() or {"", ".", ".."} & set(parts) or not units_of([member.name]):
            raise ArchiveError(
                f"{name!r} holds {member.name!r}, which is no plain file of a compile cache; "
                "delete it"
            )
    return units_of(member.name for member in members)


def _publish(staged: Path, target: Path) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        os.rename(staged, target)  # noqa: PTH104 - it fails where a folder with files is
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _signature(data: bytes | memoryview, name: str, key: bytes) -> bytes:
    digest = hmac.new(key, name.encode() + b"\0", hashlib.sha256)
    digest.update(data)
    return digest.digest()
