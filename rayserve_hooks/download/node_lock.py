"""Per-node inter-process lock. Reports the owner while waiting.

The lock files are on the local disk even if the locked folder is on a share, where the locks of
other nodes would count and may not work at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rayserve_hooks.errors import DownloadError, describe

LOCK_DIR_VARIABLE = "RAYSERVE_HOOKS_LOCK_DIR"
_REPORT_S = 5.0
_POLL_S = 0.1


@contextlib.contextmanager
def node_lock(folder: Path, purpose: str, logger: logging.Logger) -> Iterator[None]:
    """Lock a folder against the other processes of this node; wait for them without a limit.

    The kernel releases the lock of a process that ends, however it ends.

    Args:
        folder: What is locked. Need not exist.
        purpose: What for, shown to processes that wait.
        logger: Logs the owner while waiting.

    Raises:
        DownloadError: The lock file cannot be created.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
    lock_path = _lock_dir() / f"{name}.lock"
    owner_path = lock_path.with_suffix(".json")
    lock = FileLock(lock_path)
    waited = time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_REPORT_S, poll_interval=_POLL_S)
        except Timeout:
            seconds = time.monotonic() - waited
            logger.info("%s: waiting for %s, %.0f s", folder, _owner(owner_path), seconds)
        except OSError as error:
            raise _unusable(lock_path, error) from error
    try:
        _write_owner(owner_path, purpose)
        yield
    finally:
        lock.release()


def _lock_dir() -> Path:
    configured = os.environ.get(LOCK_DIR_VARIABLE)
    folder = Path(configured or Path(tempfile.gettempdir(), f"rayserve_hooks-{os.getuid()}"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owned = configured or folder.stat().st_uid == os.getuid()
    except OSError as error:
        raise _unusable(folder, error) from error
    if not owned:
        raise DownloadError(
            f"{str(folder)!r} belongs to another user; set {LOCK_DIR_VARIABLE} to a folder of yours"
        )
    return folder


def _unusable(path: Path, error: OSError) -> DownloadError:
    return DownloadError(
        f"cannot lock {str(path)!r}: {describe(error)}; "
        f"set {LOCK_DIR_VARIABLE} to a folder on a local disk that can be written"
    )


def _write_owner(path: Path, purpose: str) -> None:
    # Ray writes the name of a worker's actor or task where its command line was.
    process = Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
    owner = {"pid": os.getpid(), "process": process, "purpose": purpose, "since": time.time()}
    written = path.with_suffix(f".{os.getpid()}")
    # It only informs: a full disk must not end a download that may need no space.
    with contextlib.suppress(OSError):
        written.write_text(json.dumps(owner))
        written.replace(path)


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        since = time.strftime("%H:%M:%S", time.localtime(owner["since"]))
        return f"pid {owner['pid']} ({owner['process']}: {owner['purpose']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
