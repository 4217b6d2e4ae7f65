"""Files beside the model, to a folder that the config names and others may use, too.

It is theirs, so it is updated file by file, and nothing in it is touched but what is in the store
or was, when we fetched it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rayserve_hooks.download.cache import look, stage_suffix
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.checksums import Heads
from rayserve_hooks.download.node_lock import folder_lock, node_lock
from rayserve_hooks.download.reader import Parts, Span
from rayserve_hooks.download.state import (
    Content,
    Log,
    Manifest,
    Record,
    key_of,
    make_folder,
    record_of,
    unwritable,
)
from rayserve_hooks.download.store_errors import shown
from rayserve_hooks.download.stores import (
    STATE_FOLDER,
    NothingThereError,
    RemoteFile,
    Source,
    open_source,
)
from rayserve_hooks.download.transfer import fetch


def download_extra(uri: str, target: Path, caller: Caller) -> None:
    """Download what a URI holds to a folder, and remove what it held when this was last done.

    Args:
        uri: As for `open_source`.
        target: The folder. Need not exist.
        caller: The caller of the download.

    Raises:
        DownloadError: The store refused, or the folder cannot be written.
    """
    with (
        node_lock(target, f"extra files of {shown(uri)}", caller),
        contextlib.closing(open_source(uri, caller)) as source,
    ):
        _complete(source, list(source.list_files().values()), target)


def download_object(uri: str, target: Path, caller: Caller) -> None:
    """Download one object to a file.

    Args:
        uri: As for `open_source`, of the object itself.
        target: The file. Neither it nor its folder need exist.
        caller: The caller of the download.

    Raises:
        NothingThereError: There is no such object.
        DownloadError: The store refused, or the file cannot be written.
    """
    above, _, name = uri.rpartition("/")
    with (
        node_lock(target, f"the file {shown(uri)}", caller),
        contextlib.closing(open_source(above, caller)) as folder,
    ):
        found = folder.find(name)
        if found is None:
            raise NothingThereError(f"{shown(uri)} holds no object; check bucket and path")
        file = dataclasses.replace(found, path=target.name)
        _complete(_OneObject(uri, folder, name, file), [file], target.parent)


class _OneObject(Source):
    """One object of a folder, under the name that it has on disk."""

    def __init__(self, uri: str, folder: Source, name: str, file: RemoteFile) -> None:
        super().__init__(uri, folder.caller)
        # What was fetched is remembered by URI: another copy beside this one is another matter.
        self.uri = f"{uri} {file.path}"
        self.stopped = folder.stopped
        self._folder, self._name, self._file = folder, name, file

    def _pages(self) -> Iterator[list[RemoteFile]]:
        yield [self._file]

    def _object(self, name: str) -> Iterable[RemoteFile]:
        yield from [self._file] if name == self._file.path else []

    def parts(self, file: RemoteFile, span: Span) -> Parts:
        return self._folder.parts(dataclasses.replace(file, path=self._name), span)

    def head(self, file: RemoteFile) -> Mapping[str, str]:
        return self._folder.head(dataclasses.replace(file, path=self._name))

    def can_head(self) -> bool:
        return self._folder.can_head()

    def close(self) -> None:
        self._folder.close()


def _complete(source: Source, files: list[RemoteFile], target: Path) -> None:
    try:
        _update(source, files, target)
    except OSError as error:
        raise unwritable(error, target, "name another folder") from error


def _update(source: Source, files: list[RemoteFile], target: Path) -> None:
    heads, key, state, caller = Heads(source), key_of(source), target / STATE_FOLDER, source.caller
    name = f"extra-{key[:12]}"
    before = Manifest.read(state / f"{name}.json")
    with contextlib.closing(Log(state / f"{name}.jsonl", key)) as log:

        def publish(file: RemoteFile, content: Content, partial: str) -> None:
            found[file.path] = record_of(file, content, partial)
            log.add(found[file.path])
            os.replace(partial, f"{target}/{file.path}")

        found, missing = _look(heads, files, target, before, log)
        if missing:
            make_folder(state)
            purpose = f"extra files of {source.shown_uri}"
            with folder_lock(state / "lock", purpose, caller) as locked:
                # Another node may have been here while we waited.
                found, missing = _look(heads, files, target, before, log)
                partial = state / f"partial{stage_suffix(state, locked)}"
                make_folder(partial)
                if missing:
                    fetch(heads, missing, target, partial, publish)
                with contextlib.suppress(OSError):  # ranges of something else are in it
                    partial.rmdir()
        text = "%s: %d files, %d fetched into %s"
        caller.logger.info(text, source.shown_uri, len(files), len(missing), target)
        for path, record in {**before.files, **log.files}.items():
            if path not in found and record.matches(f"{target}/{path}"):
                Path(target, path).unlink(missing_ok=True)
        after = Manifest(before.path, key, files=found)
        if after != before:
            make_folder(state)
            after.write(source.shown_uri, state)
        log.remove()


def _look(
    heads: Heads, files: list[RemoteFile], target: Path, before: Manifest, log: Log
) -> tuple[dict[str, Record], list[RemoteFile]]:
    return look(heads, files, target, [before.files, log.files])
