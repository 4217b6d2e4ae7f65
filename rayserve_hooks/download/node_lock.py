"""Locks between the processes of a node, and of those that share a cache. Report the owner.

The locks of a node are on its local disk even if the locked folder is on a share, where locks may
not work at all. A lock in the shared folder itself adds what the share can.

Both are ``flock``: the kernel frees the lock of a process that ends, however it ends. To lock a
file needs an open descriptor and no permission to write, so that users can share a lock without a
file that all of them may change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.safe_files import open_owned, private_folder, shared_folder
from rayserve_hooks.errors import DownloadError, describe

LOCK_DIR_VARIABLE = "RAYSERVE_HOOKS_LOCK_DIR"
_REPORT_S = 5.0
_CHECK_S = 1.0
_POLL_S = 0.1
# How long a lock file of another user may stay unreadable: for a moment, while it is new.
_DENIED_S = 1.0
_OWNER_BYTES = 4096
_SHOWN_CHARACTERS = 300
_COMMON_FOLDER = (
    f"set {LOCK_DIR_VARIABLE} to a folder on a local disk that every user of the cache can write"
)
_OWN_FOLDER = f"set {LOCK_DIR_VARIABLE} to a folder of yours"
_OTHER_CACHE = "set HF_HOME to move the cache"
# The file system has no locks. EBADF: NFS wants a file that is open for writing.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
# No lock file can be made, and so nothing be written that the lock would protect.
_NO_FILE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
# File systems, and options, with which a lock counts on one node only, or that may have it so
# without saying it in their options.
_LOCAL_TYPES = re.compile(
    r"fuse.*|9p|virtiofs|cifs|smb\w*|ncpfs|afs|beegfs|orangefs|pvfs2|vboxsf|vmhgfs|prl_fs"
)
_LOCAL_OPTIONS = {"nolock", "local_lock=flock", "local_lock=all"} | {
    "localflock",  # Lustre
    "localflocks",  # GFS2 and OCFS2
    "noflock",
}


@contextlib.contextmanager
def node_lock(folder: Path, purpose: str, caller: Caller) -> Iterator[None]:
    """Lock a folder against the other processes of this node; wait for them without a limit.

    Threads of one process exclude each other as well. Processes of several users do if
    ``RAYSERVE_HOOKS_LOCK_DIR`` names a folder that all of them may write.

    Args:
        folder: What is locked. Need not exist.
        purpose: What for, shown to processes that wait. Without secrets.
        caller: Its logger gets the owner while waiting; its check for cancellation ends it.

    Raises:
        DownloadError: The lock file cannot be used.
    """
    # Of the bytes: a name that is no UTF-8 is a name all the same.
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    configured, path = os.environ.get(LOCK_DIR_VARIABLE), lock_folder()
    fd = _open_lock_folder()
    with contextlib.closing(_LockFile(fd, f"{name}.lock", _COMMON_FOLDER)) as file:
        if configured:
            file.shared, file.mode, file.exact_mode = True, 0o644, True
        problem = _wait(file, folder, caller)
        if problem is not None:
            raise _unusable(path / file.name, problem) from problem
        file.write_owner(purpose)
        yield


@contextlib.contextmanager
def folder_lock(path: Path, purpose: str, caller: Caller) -> Iterator[bool]:
    """Lock a file in a cache against all who use the cache, as far as its file system can.

    Whoever takes a lock of the node as well takes that one first. The lock file follows the umask,
    as the files of the cache do, and may be another user's.

    Args:
        path: The lock file; made if there is none, and its folder, too.
        purpose: What for, shown to processes that wait. Without secrets.
        caller: As for `node_lock`.

    Yields:
        Whether the lock is held. It is not where the file system has no locks, or cannot be written
        and has no lock file.

    Raises:
        DownloadError: Something else is where the lock file or its folder should be, or the file
            system has no locks and the cache is another user's, whose locks of the node are others.
    """
    try:
        fd = shared_folder(path.parent, 0o777, way_out=_OTHER_CACHE)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise _unusable_in_cache(path, error) from error
        yield False
        return
    lock = _LockFile(fd, path.name, _OTHER_CACHE, shared=True, mode=0o666)
    with contextlib.closing(lock) as file:
        problem = _wait(file, path, caller)
        if problem is None:
            file.write_owner(purpose)
        elif problem.errno in _NO_LOCKS:
            _refuse_other_users(fd, path.parent)
        elif problem.errno not in _NO_FILE:
            raise _unusable_in_cache(path, problem) from problem
        yield problem is None


def shared_lock_reaches_other_nodes(path: Path) -> bool:
    """Return whether a lock on a file there excludes all who use that file system.

    False where nothing is known of it. A path need not exist.
    """
    return lock_reaches_other_nodes(_mounts(), os.path.realpath(path))


def file_system_of(path: Path) -> str:
    """Return the type of a path's file system, such as ``"ext4"``; empty if nothing is known."""
    return _mounted(_mounts(), os.path.realpath(path))[0]


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return ""


def lock_reaches_other_nodes(mounts: str, path: str) -> bool:
    """Return what the text of ``/proc/<pid>/mountinfo`` says of a path without links."""
    kind, options = _mounted(mounts, path)
    return bool(kind) and not _LOCAL_TYPES.fullmatch(kind) and not options & _LOCAL_OPTIONS


def _mounted(mounts: str, path: str) -> tuple[str, set[str]]:
    """Return the type of the file system that is mounted at or above a path, and its options."""
    deepest, kind, options = -1, "", set[str]()
    for line in mounts.split("\n"):
        # The optional fields between options and type vary in number.
        mount, found, file_system = line.partition(" - ")
        fields, described = mount.split(" "), file_system.split(" ")
        if not found or len(fields) < 6 or len(described) < 3:
            continue
        point = _unescaped(fields[4]).rstrip("/")
        # The last of several mounts at one place hides the others.
        if len(point) >= deepest and f"{path}/".startswith(f"{point}/"):
            deepest, kind = len(point), described[0]
            options = {*fields[5].split(","), *described[2].split(",")}
    return kind, options


def _unescaped(text: str) -> str:
    """Return a mount point with its blanks, which mountinfo writes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda number: chr(int(number[1], 8)), text)


@dataclass(eq=False)
class _LockFile:
    """A lock file, and its lock if it is held. Owns the descriptor of its folder."""

    folder_fd: int
    name: str
    way_out: str
    shared: bool = False
    mode: int = 0o600
    exact_mode: bool = False  # regardless of the umask
    fd: int = -1
    held: bool = False

    def try_lock(self) -> bool:
        """Return whether the lock is held now.

        Raises:
            OSError: The file system cannot lock, or the file can be neither made nor opened.
        """
        if self.fd < 0:
            self.fd = self._open()
            _open_files.add(self)
        locked = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        if not self._is_current():
            # Removed while we waited, for example by what cleans up old temporary files. The next
            # process makes a new one, which this lock would not keep out.
            self.release()
            return False
        self.held = locked
        return locked

    def _open(self) -> int:
        try:
            fd = self._open_with(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            try:
                return self._open_with(os.O_RDONLY)  # another user's, or a mount for reading only
            except FileNotFoundError:
                raise error from None
        status = os.fstat(fd)
        wrong = self.exact_mode and stat.S_IMODE(status.st_mode) != self.mode
        if wrong and status.st_uid == os.geteuid():
            os.fchmod(fd, self.mode)
        return fd

    def _open_with(self, flags: int) -> int:
        return open_owned(
            self.name,
            flags,
            self.mode,
            way_out=self.way_out,
            dir_fd=self.folder_fd,
            shared=self.shared,
        )

    def _is_current(self) -> bool:
        try:
            named = os.stat(self.name, dir_fd=self.folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self.fd))

    def write_owner(self, purpose: str) -> None:
        """Write into the file who has locked it; another user's file may not be writable."""
        # It only informs: a full disk must not end a download that may need no space.
        with contextlib.suppress(OSError):
            # Ray writes the name of a worker's actor or task where its command line was. Only the
            # first word: those after it may hold secrets.
            process = Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0]
            owner = {
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "process": _printable(process.decode(errors="replace")),
                "purpose": _printable(purpose),
                "since": time.time(),
            }
            os.ftruncate(self.fd, 0)
            os.pwrite(self.fd, json.dumps(owner, ensure_ascii=False).encode(), 0)

    def owner(self) -> str:
        """Return who says that they have locked the file. Any user may have written it."""
        try:
            owner = json.loads(os.pread(self.fd, _OWNER_BYTES, 0))
            since = time.strftime("%H:%M:%S", time.localtime(owner["since"]))
            pid, host = int(owner["pid"]), str(owner["host"])
            process, purpose = _printable(str(owner["process"])), _printable(str(owner["purpose"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return "another process"
        if host == os.uname().nodename:
            # Left by one that was killed, in a file that the present owner cannot write.
            if not os.path.exists(f"/proc/{pid}"):
                return "another process"
            return f"pid {pid} ({process}: {purpose}, since {since})"
        return f"pid {pid} on {_printable(host)} ({process}: {purpose}, since {since})"

    def release(self) -> None:
        if self.fd < 0:  # not opened, or this process was forked from the one that has it
            return
        _open_files.discard(self)
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):
            if self.held:
                # The next owner may be a user who cannot write here.
                os.ftruncate(fd, 0)
        self.held = False
        with contextlib.suppress(OSError):
            # Closing is not enough: a child may have the descriptor, too, until it runs a program.
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def close(self) -> None:
        self.release()
        os.close(self.folder_fd)


_open_files: set[_LockFile] = set()


def _forget_locks() -> None:
    """Close a child's copies of its parent's locks: they would outlive a parent that crashes."""
    for file in _open_files:
        os.close(file.fd)
        file.fd, file.held = -1, False
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _wait(file: _LockFile, shown: Path, caller: Caller) -> OSError | None:
    """Wait for a lock; return the error of a file that cannot be locked."""
    started = checked = reported = time.monotonic()
    while True:
        try:
            if file.try_lock():
                return None
        except OSError as error:
            new = isinstance(error, PermissionError) and file.exact_mode
            if not new or time.monotonic() - started > _DENIED_S:
                return error
        now = time.monotonic()
        if now - checked >= _CHECK_S:
            checked = now
            caller.check_cancelled()
        if now - reported >= _REPORT_S:
            reported = now
            text = "%s: waiting for %s, %.0f s"
            caller.logger.info(text, shown, file.owner(), now - started)
        time.sleep(_POLL_S)


def lock_folder() -> Path:
    """Return the folder of this node's locks; it need not exist."""
    return Path(os.environ.get(LOCK_DIR_VARIABLE) or _default_folder())


def check_lock_folder() -> None:
    """Raise a `DownloadError` if the folder of this node's locks cannot be used; it is made."""
    os.close(_open_lock_folder())


def _open_lock_folder() -> int:
    path = lock_folder()
    try:
        if os.environ.get(LOCK_DIR_VARIABLE):
            return shared_folder(path, way_out=_COMMON_FOLDER)
        return private_folder(path, way_out=_OWN_FOLDER)
    except OSError as error:
        raise _unusable(path, error) from error


def _default_folder() -> str:
    return os.path.join(tempfile.gettempdir(), f"rayserve_hooks-{os.geteuid()}")


def _refuse_other_users(fd: int, folder: Path) -> None:
    """Raise if another user may write the folder, too, under another lock of the node."""
    owner = os.fstat(fd).st_uid
    ours = owner in (os.geteuid(), 0) or not os.access(folder, os.W_OK, effective_ids=True)
    if ours or os.environ.get(LOCK_DIR_VARIABLE):
        return
    raise DownloadError(
        f"{str(folder)!r} belongs to user {owner}, its file system has no locks, and those in "
        f"{_default_folder()!r} are of user {os.geteuid()} alone; {_COMMON_FOLDER}"
    )


def _unusable(path: Path, error: OSError) -> DownloadError:
    return DownloadError(f"cannot lock {str(path)!r}: {describe(error)}; {_COMMON_FOLDER}")


def _unusable_in_cache(path: Path, error: OSError) -> DownloadError:
    return DownloadError(f"cannot lock {str(path)!r}: {describe(error)}; {_OTHER_CACHE}")


def _printable(text: str) -> str:
    """Return a text without what could move a terminal's cursor or begin a line of the log."""
    return "".join(filter(str.isprintable, text))[:_SHOWN_CHARACTERS]
