"""What is known of the files of a folder, kept in its state folder.

None of it is believed without a look at the file it speaks of, and none of it is needed: what is
lost or damaged costs a check of the files against the store, or another download of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rayserve_hooks.download.checksums import checksum_of
from rayserve_hooks.download.safe_files import open_owned
from rayserve_hooks.download.stores import RemoteFile, Source
from rayserve_hooks.errors import DownloadError, describe

_WAY_OUT = "set HF_HOME to move the cache"
# Of what is read at once: a million records take a quarter of it.
MOST_BYTES = 2**30
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


@dataclass(frozen=True)
class Content:
    """What is known of a file's content."""

    checksum: str | None  # "<algorithm>:<value>"
    verified: str  # "checksum" if the store has the same one, "size" if it has none


@dataclass(frozen=True)
class Record:
    """A file that was complete when this was written."""

    path: str
    size: int
    version: str
    mtime_ns: int
    checksum: str | None
    verified: str

    @property
    def content(self) -> Content:
        return Content(self.checksum, self.verified)

    def is_of(self, file: RemoteFile) -> bool:
        """Return whether the store still has the version that this speaks of."""
        return (self.size, self.version) == (file.size, file.version)

    def matches(self, path: str, *, read: bool = False) -> bool:
        """Return whether a file on disk is the one that this speaks of.

        Size and time say so, unless the file has holes: a power cut leaves them where the disk
        has not got the bytes. Otherwise the content decides.

        Args:
            path: The file.
            read: Let only the content decide.
        """
        try:
            status = os.stat(path)
        except OSError:
            return False
        if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
            return False
        if not read and status.st_mtime_ns == self.mtime_ns and not _has_holes(path, self.size):
            return True
        algorithm = (self.checksum or "").partition(":")[0]
        return bool(algorithm) and checksum_of(Path(path), algorithm) == self.checksum


def _has_holes(path: str, size: int) -> bool:
    """Return whether bytes of a file were never written; on some file systems nobody knows."""
    if not size:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) < size
    except OSError:  # not supported
        return False
    finally:
        os.close(fd)


def record_of(file: RemoteFile, content: Content, path: str) -> Record:
    """Return the record of a complete file on disk."""
    return Record(file.path, file.size, file.version, os.stat(path).st_mtime_ns, **vars(content))


@dataclass
class Manifest:
    """The files of a folder, all complete when this was written.

    Args:
        path: Where it is kept.
        source: The store that the files are of, by `key_of`; empty if nothing is known.
        revision_version: Of the object ``hash`` that names the revision.
        revision: What that object holds.
        files: By path.
    """

    path: Path
    source: str = ""
    revision: str = ""
    revision_version: str | None = None
    files: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest; one that is damaged in any way says nothing."""
        found = _parsed(text_of(path))
        manifest = cls(path)
        if isinstance(found, dict):
            text = {name: found.get(name) for name in ("source", "revision")}
            version, files = found.get("revision_version"), found.get("files")
            if all(isinstance(value, str) for value in text.values()) and isinstance(files, list):
                manifest.source, manifest.revision = str(text["source"]), str(text["revision"])
                manifest.revision_version = version if isinstance(version, str) else None
                manifest.files = _by_path(files)
        return manifest

    def write(self, uri: str, state: Path) -> None:
        """Write it, unless it says so already.

        Args:
            uri: Of the store, as it may be shown.
            state: As for `write_if_changed`.

        Raises:
            OSError: It cannot be written.
        """
        verified = {record.verified for record in self.files.values()}
        files = [vars(self.files[path]) for path in sorted(self.files)]
        content = {
            "uri": uri,
            "source": self.source,
            "revision": self.revision,
            "revision_version": self.revision_version,
            "verified": "size" if "size" in verified else "checksum",
            "files": files,
        }
        write_if_changed(self.path, json.dumps(content), state)


class Log:
    """A line for each file that is complete, written before the file is published."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self._source = path, source
        lines = (_parsed(line) for line in text_of(path).splitlines())
        ours = (line for line in lines if isinstance(line, dict) and line.get("source") == source)
        self.files = _by_path(ours)
        self._file: TextIO | None = None
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Log a file.

        Raises:
            OSError: It cannot be written.
        """
        line = json.dumps({"source": self._source, **vars(record)})
        with self._lock:
            if self._file is None:
                try:
                    fd = open_owned(self.path, _APPEND, 0o644, way_out=_WAY_OUT)
                except DownloadError:  # no file, or one that others may write
                    make_way(self.path)
                    fd = open_owned(self.path, _APPEND, 0o644, way_out=_WAY_OUT)
                self._file = open(fd, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - close()
                self._file.write("\n")  # the last line of a run that was killed may be half a one
            self._file.write(f"{line}\n")
            self.files[record.path] = record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.close()
        if os.path.lexists(self.path):  # otherwise the folder may be on a read-only mount
            make_way(self.path)
        self.files = {}


def key_of(source: Source) -> str:
    """Return what tells stores apart: versions of two cannot be compared. No secret is in it."""
    return hashlib.sha256(source.uri.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def text_of(path: Path) -> str:
    """Return what a small file holds; nothing if it is no file, or cannot be read."""
    with (
        contextlib.suppress(OSError, DownloadError),
        open(open_owned(path, os.O_RDONLY, way_out=_WAY_OUT, shared=True), "rb") as file,
    ):
        # The size of a damaged one may be anything.
        if os.fstat(file.fileno()).st_size <= MOST_BYTES:
            return file.read().decode("utf-8", "replace")
    return ""


def _parsed(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _by_path(items: Iterable[Any]) -> dict[str, Record]:
    records = (_record_from(item) for item in items)
    return {record.path: record for record in records if record is not None}


_CHECKSUM = re.compile(r"(md5|sha1|sha256|crc32|crc32c|crc64nvme):\S+")
_TYPES = {"path": str, "size": int, "version": str, "mtime_ns": int, "verified": str}


def _record_from(item: Any) -> Record | None:
    if not isinstance(item, dict):
        return None
    fields: dict[str, Any] = {name: item.get(name) for name in _TYPES}
    checksum = item.get("checksum")
    right = all(type(fields[name]) is kind for name, kind in _TYPES.items())
    right = right and (checksum is None or bool(_CHECKSUM.fullmatch(str(checksum))))
    if not right or not _is_below(fields["path"]):
        return None
    return Record(**fields, checksum=checksum)


def _is_below(path: str) -> bool:
    """Return whether a path leads to a file below the folder it is relative to."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return bool(path) and path[0] != "/" and ".." not in path.split("/") and "\0" not in path


def check_links(*folders: Path) -> None:
    """Raise if a folder is a link by which another user leads elsewhere what is written there.

    A link of this user, of root, or of the owner of the folder around it is as good as a folder.

    Raises:
        DownloadError: It is.
    """
    for path in folders:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
            trusted = {os.geteuid(), 0, path.parent.stat().st_uid}
            if stat.S_ISLNK(status.st_mode) and status.st_uid not in trusted:
                raise DownloadError(
                    f"{str(path)!r} is a link of user {status.st_uid}, which may lead anywhere; "
                    f"remove it, or {_WAY_OUT}"
                )


def make_folder(path: Path) -> None:
    """Make a folder of ours; what else is there is moved away.

    Raises:
        DownloadError: It is a link, or another user's who does not own the cache, either.
        OSError: It cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file: say so
        text = os.strerror(errno.ENOTDIR)
        raise NotADirectoryError(errno.ENOTDIR, text, error.filename) from error
    for _ in range(2):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode):
            break
        make_way(path)
    trusted = {os.geteuid(), 0, path.parent.stat().st_uid}
    if not stat.S_ISDIR(status.st_mode) or status.st_uid not in trusted:
        raise DownloadError(
            f"{str(path)!r} is a link, or belongs to user {status.st_uid}, who could exchange what "
            f"is written there; remove it, or {_WAY_OUT}"
        )


def make_way(path: str | Path) -> None:
    """Remove a file of ours, or move a folder away that is where one belongs."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        if not os.path.isdir(path):
            raise
        with contextlib.suppress(OSError):
            os.rmdir(path)
            return
        os.rename(path, f"{path}.damaged-{secrets.token_hex(4)}")


def write_if_changed(path: Path, text: str, state: Path) -> None:
    """Write a small file at once, never half.

    Args:
        path: The file.
        text: What it shall hold.
        state: A folder of ours on the same file system, for the file before it is renamed.

    Raises:
        OSError: It cannot be written.
    """
    if not path.is_symlink() and text_of(path) == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    make_folder(state)
    # A name of its own: another node may write the same file on a share.
    written = state / f"written-{secrets.token_hex(4)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(open_owned(written, flags, 0o644, way_out=_WAY_OUT), "w") as file:
            file.write(text)
        if path.is_dir() and not path.is_symlink():
            make_way(path)
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def remove_tree(path: str | Path) -> None:
    """Remove a folder of ours, or what is in its place, as far as that can be done."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def unwritable(error: OSError, path: str | Path, way_out: str = _WAY_OUT) -> DownloadError:
    """Return the error for a path that cannot be written."""
    return DownloadError(
        f"cannot write {error.filename or str(path)!r}: {describe(error)}; check the permissions "
        f"and the free space there, or {way_out}"
    )
