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
        stage/, stage.jsonl         the next snapshot, and what is known of its files
        partial/                    files being fetched
        lock                        for those who share the cache
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rayserve_hooks.download.checksums import Heads, checksum_of, expected_checksum
from rayserve_hooks.download.node_lock import folder_lock, shared_lock_reaches_other_nodes
from rayserve_hooks.download.state import (
    Content,
    Log,
    Manifest,
    Record,
    key_of,
    make_folder,
    record_of,
    remove_tree,
    unwritable,
    write_if_changed,
)
from rayserve_hooks.download.stores import STATE_FOLDER, RemoteFile, Source
from rayserve_hooks.download.transfer import fetch
from rayserve_hooks.errors import DownloadError, describe

_CHECK_THREADS = 8
_REVISION = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
_REVISION_BYTES = 1024
_RENAME_EXCHANGE = 2  # linux/fs.h


class ModelCache:
    """The folder of one model, updated from one store. The caller has the node's lock.

    Args:
        folder: ``models--org--name``. Need not exist.
        source: The store, open.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self._source = folder, source
        self._key, self._heads = key_of(source), Heads(source)
        self._state = folder / STATE_FOLDER
        self._read_manifests()

    def _read_manifests(self) -> None:
        found = map(Manifest.read, sorted(self._state.glob("revisions/*.json")))
        self._manifests = {manifest.path.stem: manifest for manifest in found}

    def _snapshot(self, revision: str) -> Path:
        return self.folder / "snapshots" / revision

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
        for manifest in self._manifests.values():
            if (manifest.source, manifest.revision_version) == (self._key, hash_object.version):
                return manifest.revision
        held = self._source.read(hash_object.path)
        revision = held.decode("ascii", "replace").strip()
        if not _REVISION.fullmatch(revision):
            raise DownloadError(
                f"the object 'hash' of {self._source.shown_uri} holds {revision!r}, which cannot "
                "name a folder; store the revision there, or delete it"
            )
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
        snapshot, before = self._snapshot(revision), self._main()
        this = (revision, listing, wanted)
        try:
            found, missing = self._look(*this)
            if missing or self._outdated(*this):
                make_folder(self._state)
                purpose = f"files of {self._source.shown_uri}"
                with folder_lock(self._state / "lock", purpose, self._source.caller) as locked:
                    # Another node may have been here while we waited.
                    self._read_manifests()
                    found, missing = self._look(*this)
                    if missing or self._outdated(*this):
                        self._build(*this, found, _Stage(self._state, self._key, locked))
                    else:
                        self._log_start(wanted, [], snapshot)
                    self._record(*this, found, hash_object)
                    _Stage(self._state, self._key, locked).remove()
            else:
                self._log_start(wanted, [], snapshot)
                with contextlib.suppress(OSError, DownloadError):  # of a mount that is read-only
                    self._record(*this, found, hash_object)
            # Last: the engine reads the snapshot that refs/main names.
            self._switch(revision)
            _hold(self.folder, snapshot)
            if before not in (None, revision):
                self._remove_old({before, revision})
        except OSError as error:
            raise unwritable(error, snapshot) from error
        return snapshot

    def _log_start(
        self, wanted: list[RemoteFile], missing: list[RemoteFile], snapshot: Path
    ) -> None:
        text, uri = "%s: %d files, %d to fetch into %s", self._source.shown_uri
        self._source.caller.logger.info(text, uri, len(wanted), len(missing), snapshot)

    def _main(self) -> str | None:
        try:
            return (self.folder / "refs" / "main").read_bytes().decode(errors="replace").strip()
        except OSError:
            return None

    def _switch(self, revision: str) -> None:
        main = self.folder / "refs" / "main"
        try:
            write_if_changed(main, revision)
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

    def _kept(
        self, revision: str, listing: dict[str, RemoteFile], wanted: list[RemoteFile]
    ) -> dict[str, Record]:
        """Return the records of what a wider mode has fetched before and the store still has."""
        names = {file.path for file in wanted}
        return {
            path: record
            for path, record in self._known(revision).items()
            if path not in names and path in listing and record.is_of(listing[path])
        }

    def _outdated(
        self, revision: str, listing: dict[str, RemoteFile], wanted: list[RemoteFile]
    ) -> bool:
        """Return whether the snapshot has files of ours that the store no longer has like this."""
        manifest = self._manifests.get(revision)
        gone = set(manifest.files) if manifest else set()
        gone -= {file.path for file in wanted} | set(self._kept(revision, listing, wanted))
        return any(os.path.lexists(f"{self._snapshot(revision)}/{path}") for path in gone)

    def _look(
        self, revision: str, listing: dict[str, RemoteFile], wanted: list[RemoteFile]
    ) -> tuple[dict[str, Record], list[RemoteFile]]:
        snapshot = self._snapshot(revision)
        if not snapshot.is_dir():
            return {}, wanted
        # A stage's log, too: a run may have been killed after its rename, before the manifest.
        logs = [Log(path, self._key) for path in self._state.glob("stage*.jsonl")]
        known = [self._known(revision), *(log.files for log in logs)]
        return look(self._heads, wanted, snapshot, known)

    def _record(
        self,
        revision: str,
        listing: dict[str, RemoteFile],
        wanted: list[RemoteFile],
        found: dict[str, Record],
        hash_object: RemoteFile | None,
    ) -> None:
        files = {**self._kept(revision, listing, wanted), **found}
        version = hash_object.version if hash_object else None
        path = self._state / "revisions" / f"{revision}.json"
        manifest = Manifest(path, self._key, revision, version, files)
        if manifest != self._manifests.get(revision):
            make_folder(self._state)
            make_folder(path.parent)
            manifest.write(self._source.shown_uri)
            self._manifests[revision] = manifest

    def _build(
        self,
        revision: str,
        listing: dict[str, RemoteFile],
        wanted: list[RemoteFile],
        found: dict[str, Record],
        stage: _Stage,
    ) -> None:
        """Put the snapshot together in the stage and publish it; add to the records found."""
        started, snapshot = time.monotonic(), self._snapshot(revision)
        kept = self._kept(revision, listing, wanted)
        foreign = self._foreign(revision, listing)
        places = [(snapshot, {**kept, **found})]
        places += [(self._snapshot(name), self._known(name)) for name in self._manifests]
        with contextlib.closing(stage):
            stage.open()
            also, _ = stage.collect([listing[path] for path in kept], places)
            have, missing = stage.collect(wanted, places)
            self._log_start(wanted, missing, snapshot)
            fetched = 0

            def publish(file: RemoteFile, content: Content, partial: str) -> None:
                have[file.path] = record_of(file, content, partial)
                stage.log.add(have[file.path])
                os.replace(partial, f"{stage.folder}/{file.path}")

            if missing:
                fetched = fetch(self._heads, missing, stage.folder, stage.partial, publish)
            stage.keep_only({*have, *also})
            for path, origin in foreign.items():
                _link(origin, f"{stage.folder}/{path}")
            _publish(stage.folder, snapshot)
        found.update(have)
        self._manifests.setdefault(revision, Manifest(Path())).files = {**also, **have}
        self._manifests[revision].source = self._key
        if missing:
            self._log_end(wanted, missing, fetched, time.monotonic() - started)

    def _log_end(
        self, wanted: list[RemoteFile], missing: list[RemoteFile], fetched: int, seconds: float
    ) -> None:
        fetched_gb, present_gb = fetched / 1e9, (sum(f.size for f in wanted) - fetched) / 1e9
        rate, uri = fetched_gb / max(seconds, 1e-9), self._source.shown_uri
        text = "%s: fetched %d files, %.2f GB, in %.1f s, %.2f GB/s; %.2f GB were there already"
        values = (uri, len(missing), fetched_gb, seconds, rate, present_gb)
        self._source.caller.logger.info(text, *values)

    def _foreign(self, revision: str, listing: dict[str, RemoteFile]) -> dict[str, str]:
        """Return the files that somebody else has put into the snapshot that is replaced.

        By their path in the snapshot, with where they are.

        Raises:
            DownloadError: One is where a folder of the store belongs, or the other way round.
        """
        base = revision
        if not self._snapshot(base).is_dir():
            base = self._main() or ""
            if not self._known(base):  # not ours, or its records are lost: nothing can be told
                return {}
        top = str(self._snapshot(base))
        manifest = self._manifests.get(base)
        ours = {*listing, *(manifest.files if manifest else ())}
        if base == revision:
            for log in self._state.glob("stage*.jsonl"):
                ours.update(Log(log, self._key).files)
        found: dict[str, str] = {}
        for folder, _, names in os.walk(top):
            for name in names:
                origin = os.path.join(folder, name)
                path = os.path.relpath(origin, top)
                if path not in ours:
                    found[path] = origin
        for path in found:
            above = {str(parent) for parent in Path(path).parents}
            clash = next((file for file in listing if file in above), None)
            if clash is not None or any(file.startswith(f"{path}/") for file in listing):
                kind = "folder" if clash is not None else "file"
                raise DownloadError(
                    f"cannot write {f'{top}/{clash or path}'!r}: a {kind} of that name is in the "
                    "way; move it away"
                )
        return found

    def _remove_old(self, keep: set[str | None]) -> None:
        """Remove older snapshots that no process of this node was given, less what is foreign."""
        for name in self._manifests.keys() - keep:
            snapshot, manifest = self._snapshot(name), self._manifests[name]
            if _is_held(snapshot):
                continue
            with contextlib.suppress(OSError):  # another time
                manifest.path.unlink(missing_ok=True)
                for path in manifest.files:
                    Path(snapshot, path).unlink(missing_ok=True)
                for folder, _, _ in os.walk(snapshot, topdown=False):
                    with contextlib.suppress(OSError):  # it is not empty
                        os.rmdir(folder)


class _Stage:
    """Where the next snapshot is put together.

    Where the lock does not keep other nodes out, each has a stage of its own.
    """

    def __init__(self, state: Path, key: str, locked: bool) -> None:
        suffix = stage_suffix(state, locked)
        self.folder, self.partial = state / f"stage{suffix}", state / f"partial{suffix}"
        self.log = Log(state / f"stage{suffix}.jsonl", key)

    def open(self) -> None:
        make_folder(self.folder)
        make_folder(self.partial)

    def close(self) -> None:
        self.log.close()

    def remove(self) -> None:
        """Remove what is left when the snapshot is published."""
        self.log.remove()
        with contextlib.suppress(OSError):  # ranges of something else that was interrupted
            self.partial.rmdir()

    def collect(
        self, files: list[RemoteFile], places: list[tuple[Path, dict[str, Record]]]
    ) -> tuple[dict[str, Record], list[RemoteFile]]:
        """Return the records of the files that are here or could be linked, and the others."""
        have, missing = {}, []
        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            found = pool.map(lambda file: self._collected(file, places), files)
            for file, record in zip(files, found, strict=True):
                if record is None:
                    missing.append(file)
                else:
                    have[file.path] = record
        return have, missing

    def _collected(
        self, file: RemoteFile, places: list[tuple[Path, dict[str, Record]]]
    ) -> Record | None:
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
        """Remove what earlier runs have left of other listings."""
        top = str(self.folder)
        for folder, folders, names in os.walk(top, topdown=False):
            for name in names + folders:
                path = os.path.join(folder, name)
                if os.path.islink(path) or not os.path.isdir(path):
                    if os.path.relpath(path, top) not in paths:
                        os.unlink(path)
                else:
                    with contextlib.suppress(OSError):  # it is not empty
                        os.rmdir(path)


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

    def looked_at(part: list[RemoteFile]) -> list[Record | None]:
        return [looked(file) for file in part]

    found: dict[str, Record] = {}
    # Slices: submitting one file to a thread costs more than looking at it.
    slices = [files[first::_CHECK_THREADS] for first in range(_CHECK_THREADS)]
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        for part in pool.map(looked_at, slices):
            found.update((record.path, record) for record in part if record is not None)
    return found, [file for file in files if file.path not in found]


def _link(origin: str, target: str) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.lexists(target):
        if os.path.isdir(target) and not os.path.islink(target):
            remove_tree(Path(target))
        else:
            os.unlink(target)
    origin = os.path.realpath(origin)
    try:
        os.link(origin, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(origin, target)


def _publish(stage: Path, snapshot: Path) -> None:
    """Make the stage the snapshot, in one step; what was the snapshot before is removed."""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(snapshot):
        try:
            os.rename(stage, snapshot)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return
    old = stage.with_name(f"replaced-{secrets.token_hex(4)}")
    if not _exchange(stage, snapshot):
        # NFS cannot exchange: for a moment there is no snapshot, but never half a one.
        os.rename(snapshot, old)
        os.rename(stage, snapshot)
    else:
        os.rename(stage, old)
    remove_tree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; return whether the system could."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "renameat2", None)
    at, names = -100, (os.fsencode(one), os.fsencode(other))  # AT_FDCWD
    return call is not None and call(at, names[0], at, names[1], _RENAME_EXCHANGE) == 0


def _node_name() -> str:
    """Return what tells this node from others that share a cache."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).hexdigest()[:8]
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


_held: dict[Path, int] = {}
"""By a model's folder, the snapshot that this process was given last: a locked descriptor."""


def _hold(folder: Path, snapshot: Path) -> None:
    """Keep a snapshot from being removed as long as this process, or a fork of it, lives."""
    with contextlib.suppress(OSError):
        fd = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        previous = _held.pop(folder, None)
        _held[folder] = fd
        if previous is not None:
            os.close(previous)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _is_held(snapshot: Path) -> bool:
    """Return whether a process holds a snapshot; also where the file system cannot tell."""
    try:
        fd = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
