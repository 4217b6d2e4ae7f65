"""Files beside the model, to a folder that the config names and others may use, too.

It is theirs, so it is updated file by file, and nothing in it is touched but what is in the store
or was, when we fetched it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rayserve_hooks.download.cache import look, stage_suffix
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.checksums import Heads
from rayserve_hooks.download.node_lock import folder_lock, node_lock
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
from rayserve_hooks.download.stores import STATE_FOLDER, RemoteFile, Source, open_source
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
        try:
            _complete(source, target)
        except OSError as error:
            raise unwritable(error, target) from error


def _complete(source: Source, target: Path) -> None:
    files = list(source.list_files().values())
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
