"""A model's folder in the Hugging Face cache: snapshots that are complete, or not there.

Each listing of a store has a snapshot of its own. It is put together in a stage beside the
snapshots, of what other snapshots have already, by hard links, and of what has to be fetched; it
becomes a snapshot by one rename, and ``refs/main`` names it after that. So no reader sees a
mixture, and a replica that runs on an older snapshot keeps what it has::

    models--org--name/
      refs/main                     the revision to read
      snapshots/<revision>/         only complete ones
      .rayserve_hooks/
        revisions/<revision>.json   what is known of that snapshot's files
        revisions/<revision>.used   locked by the processes that were given that snapshot
        stage/, stage.jsonl         the next snapshot, and what is known of its files
        partial/                    files being fetched
        lock                        for those who share the cache
        replaced-*, removed-*       for a moment, and after a run that was killed
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rayserve_hooks.download.checksums import Heads, checksum_of, expected_checksum
from rayserve_hooks.download.node_lock import (
    folder_lock,
    lock_folder,
    shared_lock_reaches_other_nodes,
)
from rayserve_hooks.download.partials import remove_stale
from rayserve_hooks.download.safe_files import open_owned
from rayserve_hooks.download.state import (
    Content,
    Log,
    Manifest,
    Record,
    check_links,
    key_of,
    make_folder,
    record_of,
    remove_tree,
    text_of,
    unwritable,
    write_if_changed,
)
from rayserve_hooks.download.stores import STATE_FOLDER, RemoteFile, Source
from rayserve_hooks.download.transfer import fetch
from rayserve_hooks.errors import DownloadError, describe

_CHECK_THREADS = 8
_REVISION = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
_REVISION_BYTES = 4096
_RENAME_EXCHANGE = 2  # linux/fs.h
_TRIES = 10
_TRY_S = 0.02
# After this time without a change, what another node has left belongs to nobody.
_STALE_S = 7 * 24 * 3600

Place = tuple[Path, dict[str, Record]]
"""A folder, and what is known of its files."""


@dataclass(frozen=True)
class _Asked:
    """What a snapshot shall have."""

    revision: str
    listing: dict[str, RemoteFile]  # all objects of the store
    wanted: list[RemoteFile]
    revision_version: str | None


class ModelCache:
    """The folder of one model, updated from one store. The caller has the node's lock.

    Args:
        folder: ``models--org--name``. Need not exist.
        source: The store, open.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self._source = folder, source
        self._key, self._heads = key_of(source), Heads(source)
        self._state_folder = folder / STATE_FOLDER
        self._read_manifests()

    def _read_manifests(self) -> None:
        paths = sorted(self._state_folder.glob("revisions/*.json"))
        found = (Manifest.read(path) for path in paths if _REVISION.fullmatch(path.stem))
        self._manifests = {manifest.path.stem: manifest for manifest in found}

    def _snapshot(self, revision: str) -> Path:
        return self.folder / "snapshots" / revision

    def _users(self, revision: str) -> Path:
        return self._state_folder / "revisions" / f"{revision}.used"

    def revision(self, listing: dict[str, RemoteFile], hash_object: RemoteFile | None) -> str:
        """Return the name of a listing's snapshot, the same on every node.

        Args:
            listing: The objects by their path.
            hash_object: The object ``hash``, which holds the name if there is one.

        Raises:
            DownloadError: It holds what cannot name a folder.
        """
        if hash_object is None:
            lines = [f"{file.path!r} {file.size} {file.version}" for file in listing.values()]
            text = "\n".join([self._key, *sorted(lines)])
            return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]
        for name, manifest in self._manifests.items():
            if (manifest.source, manifest.revision_version) == (self._key, hash_object.version):
                return name
        shown = f"the object 'hash' of {self._source.shown_uri}"
        advice = "which cannot name a folder; store the revision there, or delete it"
        held = self._source.read(hash_object.path, _REVISION_BYTES)
        revision = held.decode("ascii", "replace").strip()
        if not _REVISION.fullmatch(revision):
            raise DownloadError(f"{shown} holds {revision!r}, {advice}")
        return revision

    def complete(
        self,
        revision: str,
        listing: dict[str, RemoteFile],
        wanted: list[RemoteFile],
        hash_object: RemoteFile | None,
    ) -> Path:
        """Return the snapshot of a revision, which has the wanted files now.

        Nothing is written where all is complete already, so that the cache may be read-only.

        Args:
            revision: Its name.
            listing: All objects of the store by their path.
            wanted: Those of them that have to be there.
            hash_object: The object that holds the revision, if there is one.

        Raises:
            DownloadError: A file cannot be fetched, or the cache cannot be written.
        """
        state, folder = self._state_folder, self.folder
        check_links(folder, folder / "snapshots", folder / "refs", state, state / "revisions")
        version = hash_object.version if hash_object else None
        asked = _Asked(revision, listing, wanted, version)
        snapshot, before = self._snapshot(revision), self._main()
        with _Use(self._users(revision)) as use:
            try:
                # Before the look: what is in use is not removed by another node in between.
                use.share()
                found, missing = self._look(asked)
                if missing or self._outdated(asked):
                    self._update(asked, use)
                else:
                    self._log_start(wanted, [], snapshot)
                    with contextlib.suppress(OSError, DownloadError):  # a read-only mount
                        self._write_manifest(asked, {**self._kept(asked), **found})
                # Last: the engine reads the snapshot that refs/main names.
                self._switch(revision)
                use.keep(self.folder)
                if before not in (None, revision):
                    self._remove_old({before, revision})
            except OSError as error:
                raise unwritable(error, snapshot) from error
        return snapshot

    def _update(self, asked: _Asked, use: _Use) -> None:
        make_folder(self._state_folder)
        make_folder(self._users(asked.revision).parent)
        use.share()  # the first time there was no file yet
        lock, purpose = self._state_folder / "lock", f"files of {self._source.shown_uri}"
        with folder_lock(lock, purpose, self._source.caller) as locked:
            # Another node may have been here while we waited.
            self._restore()
            self._read_manifests()
            found, missing = self._look(asked)
            stage = _Stage(self._state_folder, self._key, locked)
            with contextlib.closing(stage):
                if missing or self._outdated(asked):
                    self._build(asked, found, stage)
                else:
                    self._log_start(asked.wanted, [], self._snapshot(asked.revision))
                    self._write_manifest(asked, {**self._kept(asked), **found})
            stage.remove(asked.listing.values())

    def _restore(self) -> None:
        """Undo and remove what runs have left that were killed."""
        for path in self._state_folder.glob("replaced-*"):
            snapshot = self._snapshot(path.name.removeprefix("replaced-"))
            with contextlib.suppress(OSError):
                if not os.path.lexists(snapshot):
                    os.rename(path, snapshot)
            remove_tree(path)
        for pattern in ("removed-*", "stage-*", "partial-*", "written-*"):
            for path in self._state_folder.glob(pattern):
                with contextlib.suppress(OSError):
                    if pattern == "removed-*" or time.time() - path.lstat().st_mtime > _STALE_S:
                        remove_tree(path)

    def _log_start(
        self, wanted: list[RemoteFile], missing: list[RemoteFile], snapshot: Path
    ) -> None:
        text, uri = "%s: %d files, %d to fetch into %s", self._source.shown_uri
        self._source.caller.logger.info(text, uri, len(wanted), len(missing), snapshot)

    def _main(self) -> str | None:
        return text_of(self.folder / "refs" / "main").strip() or None

    def _switch(self, revision: str) -> None:
        main = self.folder / "refs" / "main"
        try:
            write_if_changed(main, revision, self._state_folder)
        except OSError as error:
            # The engine gets the snapshot's path; refs/main is for those who look by name.
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            text = "cannot write %s, so it does not name %s: %s"
            self._source.caller.logger.warning(text, main, revision, describe(error))

    def _known(self, revision: str) -> dict[str, Record]:
        """Return the records of a snapshot's files, if they are of this store."""
        manifest = self._manifests.get(revision)
        return manifest.files if manifest and manifest.source == self._key else {}

    def _ours(self, revision: str) -> dict[str, Record]:
        """Return the records of a snapshot's files, of whatever store."""
        manifest = self._manifests.get(revision)
        return manifest.files if manifest else {}

    def _kept(self, asked: _Asked) -> dict[str, Record]:
        """Return the records of what a wider mode has fetched before and the store still has."""
        names = {file.path for file in asked.wanted}
        return {
            path: record
            for path, record in self._known(asked.revision).items()
            if path not in names and path in asked.listing and record.is_of(asked.listing[path])
        }

    def _outdated(self, asked: _Asked) -> bool:
        """Return whether the snapshot has files of ours that the store no longer has like this."""
        gone = set(self._ours(asked.revision))
        gone -= {file.path for file in asked.wanted} | set(self._kept(asked))
        return any(os.path.lexists(f"{self._snapshot(asked.revision)}/{path}") for path in gone)

    def _look(self, asked: _Asked) -> tuple[dict[str, Record], list[RemoteFile]]:
        snapshot = self._snapshot(asked.revision)
        if not snapshot.is_dir():
            return {}, asked.wanted
        return look(self._heads, asked.wanted, snapshot, [self._known(asked.revision)])

    def _write_manifest(self, asked: _Asked, files: dict[str, Record]) -> None:
        path = self._state_folder / "revisions" / f"{asked.revision}.json"
        manifest = Manifest(path, self._key, asked.revision, asked.revision_version, files)
        if manifest != self._manifests.get(asked.revision):
            make_folder(self._state_folder)
            make_folder(path.parent)
            manifest.write(self._source.shown_uri, self._state_folder)
            self._manifests[asked.revision] = manifest

    def _build(self, asked: _Asked, found: dict[str, Record], stage: _Stage) -> None:
        """Put the snapshot together in the stage and publish it."""
        started, snapshot = time.monotonic(), self._snapshot(asked.revision)
        foreign = self._foreign(asked)
        places: list[Place] = [(snapshot, {**self._kept(asked), **found})]
        places += [(self._snapshot(name), self._known(name)) for name in self._manifests]
        stage.open({*(file.path for file in asked.wanted), *self._kept(asked)})
        have, missing = stage.collect(asked.wanted, places)
        self._log_start(asked.wanted, missing, snapshot)
        fetched = 0

        def publish(file: RemoteFile, content: Content, partial: str) -> None:
            have[file.path] = record_of(file, content, partial)
            stage.log.add(have[file.path])
            os.replace(partial, f"{stage.folder}/{file.path}")

        if missing:
            fetched = fetch(self._heads, missing, stage.folder, stage.partial, publish)
        if not stage.locked:  # another node may have published a wider mode in the meantime
            self._read_manifests()
        kept = [asked.listing[path] for path in self._kept(asked)]
        also, _ = stage.collect(kept, [(snapshot, self._known(asked.revision))])
        have.update(also)
        stage.keep_only(set(have))
        for path, origin in foreign.items():
            _link(origin, f"{stage.folder}/{path}", follow=False)
        # Before: what is ours is never taken for another's. Whatever is listed is looked at.
        self._write_manifest(asked, {**self._ours(asked.revision), **have})
        _publish(stage.folder, snapshot)
        self._write_manifest(asked, have)
        if missing:
            self._log_end(asked.wanted, missing, fetched, time.monotonic() - started)

    def _log_end(
        self, wanted: list[RemoteFile], missing: list[RemoteFile], fetched: int, seconds: float
    ) -> None:
        fetched_gb, present_gb = fetched / 1e9, (sum(f.size for f in wanted) - fetched) / 1e9
        rate, uri = fetched_gb / max(seconds, 1e-9), self._source.shown_uri
        text = "%s: fetched %d files, %.2f GB, in %.1f s, %.2f GB/s; %.2f GB were there already"
        values = (uri, len(missing), fetched_gb, seconds, rate, present_gb)
        self._source.caller.logger.info(text, *values)

    def _foreign(self, asked: _Asked) -> dict[str, str]:
        """Return the files that somebody else has put into the snapshot that is replaced.

        By their path in the snapshot, with where they are.

        Raises:
            DownloadError: One is where a folder of the store belongs, or the other way round.
        """
        base = asked.revision
        if not self._snapshot(base).is_dir():
            base = self._main() or ""
            if not self._ours(base):  # its records are lost: nothing can be told
                return {}
        found = _files_below(self._snapshot(base), {*asked.listing, *self._ours(base)})
        folders = {above for path in asked.listing for above in _folders_above(path)}
        for path in found:
            file = next((above for above in _folders_above(path) if above in asked.listing), None)
            if file is not None or path in folders:
                kind = "file" if file is None else "folder"
                shown = str(self._snapshot(base) / (file or path))
                raise DownloadError(
                    f"cannot write {shown!r}: a {kind} of that name is in the way; move it away"
                )
        return found

    def _remove_old(self, keep: set[str | None]) -> None:
        """Remove older snapshots that no process was given, less what is not ours."""
        if not shared_lock_reaches_other_nodes(self._state_folder):
            return  # who is using one cannot be seen
        for name in self._manifests.keys() - keep:
            if not self._manifests[name].source:
                continue  # its records are lost
            with contextlib.suppress(OSError), _Use(self._users(name)) as use:
                if use.alone():
                    self._remove(name)

    def _remove(self, revision: str) -> None:
        snapshot, manifest = self._snapshot(revision), self._manifests[revision]
        removed = self._state_folder / f"removed-{secrets.token_hex(4)}"
        foreign = _files_below(snapshot, manifest.files)
        if foreign:
            make_folder(removed)
            for path, origin in foreign.items():
                _link(origin, f"{removed}/{path}", follow=False)
            _publish(removed, snapshot)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.rename(snapshot, removed)
        manifest.path.unlink(missing_ok=True)
        self._users(revision).unlink(missing_ok=True)
        remove_tree(removed)


class _Stage:
    """Where the next snapshot is put together.

    Where the lock does not keep other nodes out, each has a stage of its own.
    """

    def __init__(self, state: Path, key: str, locked: bool) -> None:
        suffix = stage_suffix(state, locked)
        self.locked = not suffix
        self.folder, self.partial = state / f"stage{suffix}", state / f"partial{suffix}"
        self.log = Log(state / f"stage{suffix}.jsonl", key)

    def open(self, paths: set[str]) -> None:
        """Make the folders; of what an earlier run has left keep what is in some paths."""
        make_folder(self.folder)
        make_folder(self.partial)
        self.keep_only(paths)

    def close(self) -> None:
        self.log.close()

    def remove(self, files: Iterable[RemoteFile]) -> None:
        """Remove what is left when the snapshot is published, but for ranges of some files."""
        self.log.remove()
        remove_tree(self.folder)
        remove_stale(files, self.partial)
        with contextlib.suppress(OSError):  # a wider mode was interrupted
            self.partial.rmdir()

    def collect(
        self, files: list[RemoteFile], places: list[Place]
    ) -> tuple[dict[str, Record], list[RemoteFile]]:
        """Return the records of the files that are here or could be linked, and the others."""
        return _records(lambda file: self._collected(file, places), files)

    def _collected(self, file: RemoteFile, places: list[Place]) -> Record | None:
        target = f"{self.folder}/{file.path}"
        record = self.log.files.get(file.path)
        # Read: the run that put it here was interrupted, perhaps by a power cut.
        if record is not None and record.is_of(file) and record.matches(target, read=True):
            return record
        for folder, records in places:
            record, origin = records.get(file.path), f"{folder}/{file.path}"
            if record is not None and record.is_of(file) and record.matches(origin):
                with contextlib.suppress(OSError):  # fetch it instead
                    _link(origin, target)
                    record = record_of(file, record.content, target)
                    self.log.add(record)
                    return record
        return None

    def keep_only(self, paths: set[str]) -> None:
        """Remove all else, and what is no file: a link could lead out of here."""
        top = str(self.folder)
        for folder, folders, names in os.walk(top, topdown=False):
            for name in names + folders:
                path = os.path.join(folder, name)
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode):
                    with contextlib.suppress(OSError):  # it is not empty
                        os.rmdir(path)
                elif not stat.S_ISREG(mode) or path[len(top) + 1 :] not in paths:
                    os.unlink(path)


def stage_suffix(state: Path, locked: bool) -> str:
    """Return the end of the names of stages and partial files, so that no two nodes share one.

    Args:
        state: The state folder.
        locked: Whether the lock of the folder is held. On some file systems that does not keep
            other nodes out.
    """
    return "" if locked and shared_lock_reaches_other_nodes(state) else f"-{_node_name()}"


def look(
    heads: Heads, files: list[RemoteFile], folder: Path, known: list[dict[str, Record]]
) -> tuple[dict[str, Record], list[RemoteFile]]:
    """Return the records of the files that a folder has whole, and the other files.

    Args:
        heads: The open store and its checksums, for files without a record.
        files: What is looked for.
        folder: Where.
        known: Records, by path.
    """

    def looked(file: RemoteFile) -> Record | None:
        target = f"{folder}/{file.path}"
        records = [found[file.path] for found in known if file.path in found]
        records = [record for record in records if record.is_of(file)]
        for record in records:
            if record.matches(target):
                mtime_ns = os.stat(target).st_mtime_ns
                return dataclasses.replace(record, mtime_ns=mtime_ns)
        if records or not os.path.isfile(target) or os.path.getsize(target) != file.size:
            return None
        checksum = expected_checksum(file, heads.of(file) if heads.wanted(file) else None)
        if checksum is None or checksum_of(Path(target), checksum.partition(":")[0]) != checksum:
            return None
        return record_of(file, Content(checksum, "checksum"), target)

    return _records(looked, files)


def _records(
    look_at: Callable[[RemoteFile], Record | None], files: list[RemoteFile]
) -> tuple[dict[str, Record], list[RemoteFile]]:
    """Return the records that a function finds for files, in threads, and the files without one."""

    def looked_at(part: list[RemoteFile]) -> list[Record | None]:
        return [look_at(file) for file in part]

    found: dict[str, Record] = {}
    # Slices: submitting one file to a thread costs more than looking at it.
    slices = [files[first::_CHECK_THREADS] for first in range(_CHECK_THREADS)]
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        for part in pool.map(looked_at, slices):
            found.update((record.path, record) for record in part if record is not None)
    return found, [file for file in files if file.path not in found]


def _files_below(top: Path, but: Iterable[str]) -> dict[str, str]:
    """Return files and links, by their path below a folder, with where they are."""
    found, but, above = {}, set(but), len(str(top)) + 1
    for folder, folders, names in os.walk(top):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            origin = os.path.join(folder, name)
            if origin[above:] not in but:
                found[origin[above:]] = origin
    return found


def _folders_above(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def _link(origin: str, target: str, *, follow: bool = True) -> None:
    """Link a file to a second name, or copy it where the file system has no hard links.

    Args:
        origin: The file.
        target: The new name; what is there is removed.
        follow: Where the file is a link to one, take that one, as of the Hugging Face library.
    """
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(target) and not os.path.islink(target):
        remove_tree(target)
    elif os.path.lexists(target):
        os.unlink(target)
    if follow:
        origin = os.path.realpath(origin)
    try:
        os.link(origin, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(origin, target, follow_symlinks=follow)


def _publish(stage: Path, snapshot: Path) -> None:
    """Make the stage the snapshot, in one step; what was the snapshot before is removed."""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    replaced = stage.with_name(f"replaced-{snapshot.name}")
    for left in reversed(range(_TRIES)):
        try:
            os.rename(stage, snapshot)
            break
        except OSError as error:
            there = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
            if error.errno not in there or not left:
                raise
        if _exchange(stage, snapshot):
            break
        # NFS cannot exchange: for a moment there is no snapshot, but never half a one. Where there
        # are no locks either, another node may do the same.
        with contextlib.suppress(OSError):
            os.rename(snapshot, replaced)
    remove_tree(replaced)
    remove_tree(stage)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; return whether the system could."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "renameat2", None)
    at, names = -100, (os.fsencode(one), os.fsencode(other))  # AT_FDCWD
    return call is not None and call(at, names[0], at, names[1], _RENAME_EXCHANGE) == 0


def _node_name() -> str:
    """Return what tells processes that share a cache, but no lock of a node, from each other."""
    folder = lock_folder()
    parts: list[object] = [socket.gethostname(), os.geteuid()]
    with contextlib.suppress(OSError):
        parts.append(os.stat(folder).st_ino)
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


class _Use:
    """The use of a snapshot: a locked file, so that nobody removes the snapshot.

    The kernel ends it with the process that has it, and its forks.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def share(self) -> None:
        """Begin the use, as far as the file system can."""
        for _ in range(_TRIES):
            if self._fd >= 0 or not self._lock(fcntl.LOCK_SH):
                return
            time.sleep(_TRY_S)  # while another node removes the snapshot

    def alone(self) -> bool:
        """Return whether nobody uses the snapshot; not if the file system cannot tell."""
        self._lock(fcntl.LOCK_EX)
        return self._fd >= 0

    def keep(self, folder: Path) -> None:
        """Go on as long as the process lives, or is given another snapshot of the model."""
        if self._fd >= 0:
            previous = _used.pop(folder, None)
            _used[folder], self._fd = self._fd, -1
            if previous is not None:
                os.close(previous)

    def _lock(self, kind: int) -> bool:
        """Lock the file; return whether it is worth another try."""
        fd = -1
        try:
            fd = self._open()
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(self._path)):
                self._fd, fd = fd, -1
            return self._fd < 0
        except (BlockingIOError, FileNotFoundError) as error:
            return fd >= 0 or isinstance(error, BlockingIOError)
        except (OSError, DownloadError):  # no locks there, or something else is in its place
            return False
        finally:
            if fd >= 0:
                os.close(fd)

    def _open(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT
            return open_owned(self._path, flags, 0o644, way_out="set HF_HOME", shared=True)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return open_owned(self._path, os.O_RDONLY, way_out="set HF_HOME", shared=True)


_used: dict[Path, int] = {}
"""By a model's folder: the locked file of the snapshot that this process was given last."""
