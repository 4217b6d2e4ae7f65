"""The default download of one node: from an object store into the Hugging Face cache layout.

Ray's own downloader is not used: it logs and swallows failures, of a whole model as of single
files, and writes ``refs/main`` before the files (Ray 2.60, ``CloudModelDownloader.get_model``,
``S3FileSystem.download_files``). Layout, file selection and the ``hash`` object are Ray's.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.checksums import Heads, checksum_of, expected_checksum
from rayserve_hooks.download.node_lock import node_lock
from rayserve_hooks.download.store_errors import no_panics, shown
from rayserve_hooks.download.stores import STATE_FOLDER, RemoteFile, Source, open_source
from rayserve_hooks.download.transfer import Content, fetch, unwritable
from rayserve_hooks.errors import DownloadError, describe

# What a mode selects, and what it leaves out, as in Ray 2.60 (CloudFileSystem.download_model).
_ALLOWED = {
    NodeModelDownloadable.TOKENIZER_ONLY: ["*tokenizer*", "*config.json*", "*chat_template*"]
}
_IGNORED = {NodeModelDownloadable.EXCLUDE_SAFETENSORS: ["*.safetensors"]}
_REVISION_OBJECT = "hash"
_REVISION_BYTES = 4096
_DEFAULT_REVISION = "0" * 40
_CHECK_THREADS = 8
_NAME_BYTES = 255  # of a folder, on every file system there is


@dataclass(frozen=True)
class Mirror:
    """Where the model's files are: Ray's ``CloudMirrorConfig``, which is slow to import.

    Args:
        bucket_uri: ``s3://``, ``gs://``, ``azure://`` or ``abfss://``; None for extra files only.
        extra_files: Pairs of a URI and the local folder it goes to.
    """

    bucket_uri: str | None
    extra_files: tuple[tuple[str, str], ...] = ()


def download_node(
    model_id: str,
    mirror: Mirror | None,
    mode: NodeModelDownloadable,
    *,
    from_hub: bool = False,
    caller: Caller = STANDALONE,
) -> str | None:
    """Download what ``mode`` selects, and the mirror's extra files, to this node.

    Blocks; call it from a thread without a running event loop.

    Args:
        model_id: The engine's model id; names the folder in the cache.
        mirror: The bucket; None for a local path or a Hugging Face id.
        mode: Which of the model's files. Extra files are fetched in every mode, as in Ray.
        from_hub: Fetch a Hugging Face id here instead of leaving it to the engine.
        caller: Its logger, name, progress bar and cancellation.

    Returns:
        The folder with the model, or None if nothing of it was downloaded.

    Raises:
        DownloadError: The store refused, has no such files or sent damaged ones, or the files
            cannot be written.
    """
    with no_panics():
        for uri, destination in mirror.extra_files if mirror else ():
            _download_extra(uri, Path(os.path.expandvars(destination)).expanduser(), caller)
        if mode is NodeModelDownloadable.NONE:
            return None
        if mirror is not None and mirror.bucket_uri is not None:
            return str(_download_model(model_id, mirror.bucket_uri, mode, caller))
        if from_hub and not os.path.exists(os.path.expanduser(model_id)):
            return _download_from_hub(model_id, mode, caller)
        return None


def _download_extra(uri: str, target: Path, caller: Caller) -> None:
    purpose = f"extra files of {shown(uri)}"
    with (
        node_lock(target, purpose, caller.logger),
        contextlib.closing(open_source(uri, caller)) as source,
    ):
        files = source.list_files()
        name = f"extra-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
        records = _Records(target / STATE_FOLDER, name, uri)
        _complete(source, list(files.values()), target, "", records)
        records.finish("", None)


def _download_model(model_id: str, uri: str, mode: NodeModelDownloadable, caller: Caller) -> Path:
    folder = _model_folder(model_id)
    purpose = f"{caller.label or model_id}, {mode.name} of {shown(uri)}"
    with (
        node_lock(folder, purpose, caller.logger),
        contextlib.closing(open_source(uri, caller)) as source,
    ):
        files = source.list_files()
        hash_object = files.pop(_REVISION_OBJECT, None)
        wanted = [file for path, file in files.items() if _selected(path, mode)]
        if not wanted:
            raise DownloadError(
                f"{source.shown_uri} has {len(files)} objects, none of which {mode.name} selects; "
                "check the path and the download mode"
            )
        records = _Records(folder / STATE_FOLDER, mode.name, uri)
        revision = _revision(source, hash_object, records)
        snapshot = folder / "snapshots" / revision
        _complete(source, wanted, snapshot, revision, records)
        # Last: the engine reads the snapshot that refs/main names.
        _write_if_changed(folder / "refs" / "main", revision)
        records.finish(revision, hash_object)
    return snapshot


def _model_folder(model_id: str) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"models--{model_id.replace('/', '--')}"
    if len(os.fsencode(name)) > _NAME_BYTES:
        raise DownloadError(
            f"the model id {model_id!r} is too long to name a folder: with 'models--' it has "
            f"{len(os.fsencode(name))} bytes, and at most {_NAME_BYTES} are possible; shorten it"
        )
    return Path(HF_HUB_CACHE, name)


def _download_from_hub(model_id: str, mode: NodeModelDownloadable, caller: Caller) -> str:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise DownloadError(
            f"downloading {model_id!r} needs the package 'huggingface_hub'; install "
            "'rayserve_hooks[download]' on every node"
        ) from error
    allowed, ignored = _ALLOWED.get(mode), _IGNORED.get(mode)
    purpose = f"{mode.name} of the Hugging Face Hub"
    with node_lock(_model_folder(model_id), purpose, caller.logger):
        try:
            return snapshot_download(model_id, allow_patterns=allowed, ignore_patterns=ignored)
        except Exception as error:  # the hub raises its own and those of its HTTP client
            detail, check = describe(error), "HF_ENDPOINT and the network"
            if isinstance(error, HfHubHTTPError):
                detail = (error.server_message or type(error).__name__).rstrip(".")
                check = "HF_TOKEN and whether the token may read the model"
            raise DownloadError(
                f"cannot fetch {model_id!r} from the Hugging Face Hub: {detail}; check the id, "
                f"{check}"
            ) from error


def _selected(path: str, mode: NodeModelDownloadable) -> bool:
    """Match patterns as the Hugging Face Hub does, which is given the same ones."""
    allowed, ignored = _ALLOWED.get(mode, ["*"]), _IGNORED.get(mode, [])
    matches = functools.partial(fnmatch.fnmatchcase, path)
    return any(map(matches, allowed)) and not any(map(matches, ignored))


def _revision(source: Source, hash_object: RemoteFile | None, records: _Records) -> str:
    if hash_object is None:
        return _DEFAULT_REVISION
    revision = records.revisions.get(hash_object.version)
    if revision is None:
        content = source.read(_REVISION_OBJECT, _REVISION_BYTES)
        revision = content.decode("ascii", "replace").strip()
    if not re.fullmatch(r"[\w-][\w.-]*", revision, re.ASCII):
        raise DownloadError(
            f"the object 'hash' of {source.shown_uri} holds {revision!r}, which cannot name a "
            "folder; store the revision there, or delete it"
        )
    return revision


@dataclass(frozen=True)
class _Record:
    """A file that was complete when this was written."""

    revision: str
    path: str
    size: int
    version: str
    mtime_ns: int
    checksum: str | None
    verified: str


class _Records:
    """What is known of the files in a folder: the markers, and the logs of unfinished downloads.

    A marker records that a mode's download is complete, and is written last. A log gets a line
    for each file before the file is published, so that a killed download loses none.
    """

    def __init__(self, folder: Path, mode: str, uri: str) -> None:
        self.folder, self._mode, self._uri = folder, mode, uri
        self._marker, self._log = folder / f"{mode}.json", folder / f"{mode}.jsonl"
        self.known: dict[str, dict[str, _Record]] = {}  # by path and revision
        self.revisions: dict[str, str] = {}  # by version of the object that holds it
        self.complete: dict[str, _Record] = {}  # by path; what the marker will list
        self._log_file: TextIO | None = None
        self._lock = threading.Lock()
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                marker = json.loads(path.read_text())
                if marker["uri"] == uri and marker["revision_version"]:
                    self.revisions[marker["revision_version"]] = marker["revision"]
                for record in marker["files"]:
                    self._learn({"uri": marker["uri"], **record})
        for path in folder.glob("*.jsonl"):
            for line in path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._learn(json.loads(line))

    def _learn(self, fields: dict[str, Any]) -> None:
        # Versions of two stores cannot be compared.
        if fields.pop("uri") == self._uri:
            record = _Record(**fields)
            self.known.setdefault(record.path, {})[record.revision] = record

    def same_version(self, file: RemoteFile) -> dict[str, _Record]:
        """Return the records of a file in the version that the store has now, by revision."""
        found = self.known.get(file.path, {}).items()
        version = (file.size, file.version)
        return {key: record for key, record in found if (record.size, record.version) == version}

    def add(self, revision: str, file: RemoteFile, content: Content, on_disk: str) -> None:
        """Log that a file is complete; its modification time identifies it later."""
        mtime_ns = os.stat(on_disk).st_mtime_ns
        record = _Record(revision, file.path, file.size, file.version, mtime_ns, **vars(content))
        line = json.dumps({"uri": self._uri, **vars(record)})
        with self._lock:
            if self._log_file is None:
                self._log_file = self._log.open("a", buffering=1)
            self._log_file.write(f"{line}\n")
        self.complete[file.path] = record

    def close(self) -> None:
        if self._log_file is not None:
            self._log_file.close()

    def finish(self, revision: str, hash_object: RemoteFile | None) -> None:
        """Write the marker of a complete download."""
        files = [vars(self.complete[path]) for path in sorted(self.complete)]
        marker = {
            "uri": self._uri,
            "mode": self._mode,
            "revision": revision,
            "revision_version": hash_object.version if hash_object else None,
            "verified": "size" if any(f["verified"] == "size" for f in files) else "checksum",
            "files": files,
        }
        _write_if_changed(self._marker, json.dumps(marker))
        self._log.unlink(missing_ok=True)


def _complete(
    source: Source, wanted: list[RemoteFile], folder: Path, revision: str, records: _Records
) -> None:
    """Fetch those of the wanted files that are missing, incomplete or damaged."""
    started = time.monotonic()
    heads, logger = Heads(source), source.caller.logger

    def incomplete(files: list[RemoteFile]) -> list[RemoteFile]:
        return [file for file in files if not _is_complete(heads, file, folder, revision, records)]

    def publish(file: RemoteFile, content: Content, partial: str) -> None:
        records.add(revision, file, content, partial)
        os.replace(partial, f"{folder}/{file.path}")

    missing = wanted
    with contextlib.closing(records):
        try:
            records.folder.mkdir(parents=True, exist_ok=True)
            if folder.exists() or records.known:
                # Slices: submitting one file to a thread costs more than checking it.
                slices = [wanted[first::_CHECK_THREADS] for first in range(_CHECK_THREADS)]
                with ThreadPoolExecutor(_CHECK_THREADS) as pool:
                    missing = [file for part in pool.map(incomplete, slices) for file in part]
        except OSError as error:
            raise unwritable(error, folder) from error
        count = len(missing)
        logger.info(
            "%s: %d files, %d to fetch into %s", source.shown_uri, len(wanted), count, folder
        )
        if not missing:
            return
        fetched_gb = fetch(heads, missing, folder, records.folder / "partial", publish) / 1e9
    present_gb = sum(file.size for file in wanted) / 1e9 - fetched_gb
    seconds = time.monotonic() - started
    rate = fetched_gb / max(seconds, 1e-9)
    text = "%s: fetched %d files, %.2f GB, in %.1f s, %.2f GB/s; %.2f GB were there already"
    logger.info(text, source.shown_uri, count, fetched_gb, seconds, rate, present_gb)


def _is_complete(
    heads: Heads, file: RemoteFile, folder: Path, revision: str, records: _Records
) -> bool:
    target = f"{folder}/{file.path}"
    known = records.same_version(file)
    record = known.pop(revision, None)
    try:
        status = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
        return any(_linked(file, folder, revision, other, records) for other in known.values())
    if record is not None and record.mtime_ns == status.st_mtime_ns:
        records.complete[file.path] = record
        return True
    if record is not None:
        content = Content(record.checksum, record.verified)
    else:
        head = heads.of(file) if heads.wanted(file) else None
        content = Content(expected_checksum(file, head), "checksum")
    if content.checksum is None:
        return False
    if checksum_of(Path(target), content.checksum.partition(":")[0]) != content.checksum:
        return False
    records.add(revision, file, content, target)
    return True


def _linked(
    file: RemoteFile, folder: Path, revision: str, other: _Record, records: _Records
) -> bool:
    """Hard-link the same version of a file from the snapshot of another revision."""
    old, target = folder.parent / other.revision / file.path, folder / file.path
    if target.exists() or not old.is_file():
        return False
    status = old.stat()
    if (status.st_mtime_ns, status.st_size) != (other.mtime_ns, file.size):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a file system without hard links: fetch it instead
        target.hardlink_to(old)
        records.add(revision, file, Content(other.checksum, other.verified), str(target))
        return True
    return False


def _write_if_changed(path: Path, text: str) -> None:
    try:
        if path.is_file() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}.new")
        written.write_text(text)
        written.replace(path)
    except OSError as error:
        raise unwritable(error, path) from error
