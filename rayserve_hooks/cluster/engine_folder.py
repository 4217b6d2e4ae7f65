"""A node's folder of one start: what its engine processes need, and what they report.

Its name holds the start's mark, its mode is 0700, and whatever is read in it was opened without
following a link and belongs to this user. So nothing in it is another user's, and it is unpickled.

Whoever has made the folder locks it for as long as it lives. The kernel frees the lock of a process
that ends, however it ends: one that is free belongs to nobody, and the next start removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import pickle
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rayserve_hooks.context import NodeInfo, ProcessInfo
from rayserve_hooks.download.safe_files import open_owned
from rayserve_hooks.errors import HookError
from rayserve_hooks.trace import TraceEntry

# Not of TMPDIR, which need not be the same in all processes of a node.
_PARENT = Path("/tmp")  # noqa: S108 - what is in it is checked
_REQUEST = "request"
_REPORT = "process-"
_MARK = r"[0-9a-f]+-\w+"  # no path leads out of the parent
_LENGTH = 8  # bytes before each report, of which a file has several
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_WAY_OUT = "start the replica again"


@dataclass(frozen=True)
class Report:
    """What a process of the engine says of itself.

    Attributes:
        node: The node it runs on.
        process: Its role, rank and id.
        trace: Its calls, the running one included.
        error: What has ended its hooks, if anything has.
        ended: Whether its hooks have ended, well or not.
        killed: Whether it is gone although they have not; known to whoever reads the report.
    """

    node: NodeInfo
    process: ProcessInfo
    trace: list[TraceEntry] = field(default_factory=list)
    error: HookError | None = None
    ended: bool = False
    killed: bool = False


class EngineFolder:
    """The folder of a start on this node, as its maker or as one of the engine's processes."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self.path = fd, path
        self._maker = 0

    @classmethod
    def make(cls, mark: str, request: object) -> EngineFolder:
        """Make, lock and fill a start's folder; one that nobody has any more is removed.

        Args:
            mark: See `mark_of`.
            request: What the processes need.

        Raises:
            OSError: There is one already, or none can be made.
        """
        remove_left_behind()
        path = _path(mark)
        # Under another name, until it is locked: another start could take it for one left behind.
        new = path.with_name(f"{path.name}.new")
        new.mkdir(0o700)
        folder = cls(os.open(new, _OPEN_FOLDER), new)
        folder._maker = os.getpid()
        _made.append(folder)
        try:
            fcntl.flock(folder._fd, fcntl.LOCK_EX)
            with os.fdopen(folder._open(_REQUEST, _NEW), "wb") as file:
                file.write(pickle.dumps(request))
            new.rename(path)
        except BaseException:
            folder.remove()
            raise
        folder.path = path
        return folder

    @classmethod
    def find(cls, mark: str) -> EngineFolder:
        """Return the folder that was made with this mark.

        Raises:
            OSError: There is none, or it is not this user's alone.
        """
        path = _path(mark)
        folder = cls(os.open(path, _OPEN_FOLDER), path)
        status = os.fstat(folder._fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
            folder.close()
            raise PermissionError(errno.EPERM, "it is not this user's alone", str(path))
        return folder

    def request(self) -> object:
        """Return what the maker has put in."""
        with os.fdopen(self._open(_REQUEST, os.O_RDONLY), "rb") as file:
            return pickle.loads(file.read())

    def report(self) -> ReportFile:
        """Return where this process reports.

        Raises:
            FileExistsError: It has reported already.
        """
        name = f"{_REPORT}{os.getpid()}"
        return ReportFile(self._open(name, _NEW))

    def reports(self) -> list[Report]:
        """Return the last report of each process, in the order in which they began."""
        found = (self._last_report(name) for name in self._names() if name.startswith(_REPORT))
        return sorted(filter(None, found), key=_began)

    def _names(self) -> list[str]:
        # Of the open folder, wherever its path leads; opened once more, because two listings of
        # one descriptor at once would share its position, and miss files.
        fd = os.open(".", _OPEN_FOLDER, dir_fd=self._fd)
        try:
            return os.listdir(fd)  # noqa: PTH208 - pathlib takes no descriptor
        finally:
            os.close(fd)

    def _last_report(self, name: str) -> Report | None:
        fd = self._open(name, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            # First: what is written between the two looks is of one that lives.
            gone = _lock(fd, fcntl.LOCK_SH)  # of several who look, all see the same
            written = list(_complete(file.read()))
        if not written:
            return None
        report: Report = pickle.loads(written[-1])
        return replace(report, killed=gone and not report.ended)

    def _open(self, name: str, flags: int) -> int:
        return open_owned(name, flags, way_out=_WAY_OUT, dir_fd=self._fd)

    def remove(self) -> None:
        """Remove the folder, if this process has made it; again does nothing."""
        if self._maker == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Close the folder, which frees its lock."""
        if self in _made:
            _made.remove(self)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._maker = -1, 0


class ReportFile:
    """A process's file of reports, locked until it is closed; the last one counts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        fcntl.flock(fd, fcntl.LOCK_EX)

    def write(self, report: Report) -> None:
        """Add a report."""
        data = pickle.dumps(report)
        data = len(data).to_bytes(_LENGTH, "big") + data
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Close the file: its process says no more."""
        os.close(self._fd)


def remove_left_behind() -> None:
    """Remove this user's folders whose makers are gone, for example killed."""
    with contextlib.suppress(OSError):
        for path in _PARENT.iterdir():
            if re.fullmatch(_name(_MARK), path.name):
                with contextlib.suppress(OSError):  # another user's, or a link
                    _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    fd = os.open(path, _OPEN_FOLDER)
    try:
        if os.fstat(fd).st_uid == os.geteuid() and _lock(fd):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)


def _lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Return whether nobody else had the lock, which is this process's now."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _complete(data: bytes) -> Iterator[bytes]:
    """Yield the reports of a file; one that is being written is left out."""
    while len(data) >= _LENGTH:
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
        if len(data) < end:
            return
        yield data[_LENGTH:end]
        data = data[end:]


def _began(report: Report) -> float:
    return min((entry.start for entry in report.trace), default=0.0)


def mark_of(token: str, node_id: str) -> str:
    """Return the mark of a start on a node: several of Ray's nodes can share a machine."""
    return f"{token}-{node_id}"


def on_node(mark: str, node_id: str | None) -> str:
    """Return the same start's mark on another node; None leaves it as it is."""
    return mark if node_id is None else mark_of(mark.partition("-")[0], node_id)


def _name(mark: str) -> str:
    return f"rayserve_hooks-engine-{os.geteuid()}-{mark}"


def _path(mark: str) -> Path:
    if not re.fullmatch(_MARK, mark):
        raise ValueError(f"{mark!r} is no mark of a start")
    return _PARENT / _name(mark)


_made: list[EngineFolder] = []  # by this process; each stays locked for as long as it is here


@atexit.register
def _remove_all() -> None:
    for folder in (*_made,):
        folder.remove()


def _forget() -> None:
    """Close a child's copies: their locks would outlive a parent that is killed."""
    for folder in (*_made,):
        folder.close()


os.register_at_fork(after_in_child=_forget)
