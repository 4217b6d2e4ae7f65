"""Files and folders where another user may have planted a link: what was opened is checked.

A check of a path before it is opened proves nothing, because the path can change in between. So
each file is opened without following a link, and then owner, type and mode of the open one count.
Nothing is truncated or written before that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from rayserve_hooks.errors import DownloadError

# Nonblocking: opening a planted named pipe would wait for its other end. For a file it means
# nothing.
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What opening says of a link, a folder, and a socket or a pipe without its other end.
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
_TRIES = 10
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def open_owned(
    path: str | Path,
    flags: int,
    mode: int = 0o600,
    *,
    way_out: str,
    dir_fd: int | None = None,
    shared: bool = False,
) -> int:
    """Return a descriptor of a regular file that is no link to a file elsewhere.

    A file that is made here needs no check. One that exists must have no second name (a hard
    link), and, unless the folder is shared, belong to this user, root or the folder's owner, and
    be writable only by those who can replace it: the folder's owner, and who may write the folder
    if it is not sticky. So it passes on mounts where all has one owner (NFS that maps root to
    nobody) or one mode (SMB), which are the folder's, too.

    Args:
        path: The file. Links in the folders above it are followed; hand in ``dir_fd`` for none.
        flags: As for ``os.open``. ``O_TRUNC`` truncates after the checks.
        mode: Of a new file, less the umask.
        way_out: What else to do than to remove the file; the end of the error's text.
        dir_fd: An open folder that ``path`` is relative to.
        shared: Several users write this folder on purpose: their files are accepted, and those
            that others may write. For one that stays after the check as it was, look at the
            owner of the open file.

    Raises:
        DownloadError: Something else is there.
        OSError: It cannot be opened, for example for want of permission.
    """
    fd, is_new = _opened(path, flags, mode, way_out, dir_fd)
    try:
        if not is_new:
            folder = os.stat(os.path.dirname(path) or ".", dir_fd=dir_fd)
            problem = _problem(os.fstat(fd), None if shared else folder)
            if problem:
                raise _refusal(path, dir_fd, problem, way_out)
            if flags & os.O_TRUNC:
                os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def private_folder(path: str | Path, *, way_out: str) -> int:
    """Return a descriptor of a folder that is this user's alone, which is made if there is none.

    A mode that lets others in is narrowed: what they may have put there is checked when it is
    opened.

    Args:
        path: The folder.
        way_out: As for `open_owned`.

    Raises:
        DownloadError: A link or a file is there, or the folder is another user's.
        OSError: It can be neither made nor opened.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    fd = _open_folder(path, os.O_NOFOLLOW, way_out)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise _refusal(path, None, _not_ours(status), way_out)
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def shared_folder(path: str | Path, mode: int = 0o700, *, way_out: str) -> int:
    """Return a descriptor of a folder that other users may write, too.

    A link to it is followed if this user or root has made it. Open what is in it with
    ``shared=True``.

    Args:
        path: The folder, which is made if there is none.
        mode: Of a new folder, less the umask; by default for this user alone, because whoever
            shares a folder says with whom.
        way_out: As for `open_owned`.

    Raises:
        DownloadError: A file or another user's link is there.
        OSError: It can be neither made nor opened.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(path, mode)
    status = os.lstat(path)
    trusted = stat.S_ISLNK(status.st_mode) and status.st_uid in (os.geteuid(), 0)
    return _open_folder(path, 0 if trusted else os.O_NOFOLLOW, way_out)


def own_folder(path: Path, *, way_out: str) -> None:
    """Make a folder, or check that all in it can be this user's work, or root's, alone.

    Neither the folder nor the one above may be written by others, and no folder on the way nor
    anything inside may belong to somebody else.

    Args:
        path: The folder; missing ones above it are made, too, with mode 0700.
        way_out: As for `open_owned`.

    Raises:
        DownloadError: It is not so.
        OSError: It can be neither made nor read, or is no folder.
    """
    path = path.absolute()
    for folder in (*reversed(path.parents), path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        _check_owner(folder, os.lstat(folder), way_out)
        status = os.stat(folder)  # of a link of ours: what it leads to
        _check_owner(folder, status, way_out)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        others = stat.S_IWOTH if status.st_gid == os.getegid() else stat.S_IWOTH | stat.S_IWGRP
        if folder == path.parent and status.st_mode & stat.S_ISVTX:
            others = 0
        if folder in (path, path.parent) and status.st_mode & others:
            mode = stat.S_IMODE(status.st_mode)
            raise _refusal(folder, None, f"can be written by others (mode {mode:#o})", way_out)
    for above, folders, files in os.walk(path):
        for name in folders + files:
            found = Path(above, name)
            _check_owner(found, os.lstat(found), way_out)


def _check_owner(path: Path, status: os.stat_result, way_out: str) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise _refusal(path, None, _not_ours(status), way_out)


def _opened(
    path: str | Path, flags: int, mode: int, way_out: str, dir_fd: int | None
) -> tuple[int, bool]:
    existing = flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | _FILE
    tries = _TRIES
    while True:
        # Never O_CREAT alone: Linux refuses it for another user's file in a sticky folder
        # (fs.protected_regular), and what is new could not be told from what was planted.
        if flags & os.O_CREAT:
            try:
                return os.open(path, existing | os.O_CREAT | os.O_EXCL, mode, dir_fd=dir_fd), True
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
        try:
            return os.open(path, existing, dir_fd=dir_fd), False
        except FileNotFoundError:  # removed in between
            tries -= 1
            if not flags & os.O_CREAT or not tries:
                raise
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                raise
            raise _refusal(path, dir_fd, _problem(status), way_out) from error


def _open_folder(path: str | Path, flags: int, way_out: str) -> int:
    try:
        return os.open(path, _FOLDER | flags)
    except NotADirectoryError as error:
        status = os.stat(path, follow_symlinks=False)
        problem = f"is {_kind(status)} of user {status.st_uid} and no folder"
        raise _refusal(path, None, problem, way_out) from error


def _problem(status: os.stat_result, folder: os.stat_result | None = None) -> str:
    """Return what is wrong with a file, in its folder if that counts; nothing if all is well."""
    if not stat.S_ISREG(status.st_mode):
        return f"is {_kind(status)} of user {status.st_uid} and no file"
    if status.st_nlink > 1:
        return f"is a file of user {status.st_uid} with {status.st_nlink} names (hard links)"
    if folder is None:
        return ""
    if status.st_uid not in (os.geteuid(), 0, folder.st_uid):
        return _not_ours(status)
    replaceable = 0 if folder.st_mode & stat.S_ISVTX else folder.st_mode
    if status.st_gid != folder.st_gid:
        replaceable &= ~stat.S_IWGRP
    if status.st_mode & 0o022 & ~replaceable:
        mode = stat.S_IMODE(status.st_mode)
        return f"of user {status.st_uid} can be written by others (mode {mode:#o})"
    return ""


def _not_ours(status: os.stat_result) -> str:
    return f"belongs to user {status.st_uid} and not to {os.geteuid()}"


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a device")


def _refusal(path: str | Path, dir_fd: int | None, problem: str, way_out: str) -> DownloadError:
    folder = ""
    if dir_fd is not None:
        with contextlib.suppress(OSError):
            folder = os.readlink(f"/proc/self/fd/{dir_fd}")
    return DownloadError(f"{os.path.join(folder, path)!r} {problem}; remove it, or {way_out}")
