"""What can be known of a model's download before it: what it will fetch, and where it goes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download.caller import STANDALONE
from rayserve_hooks.download.model import REVISION_OBJECT, is_selected, model_folder, selected
from rayserve_hooks.download.node_lock import file_system_of, shared_lock_reaches_other_nodes
from rayserve_hooks.download.store_errors import border
from rayserve_hooks.download.stores import open_source, supervised
from rayserve_hooks.errors import DownloadError, describe, missing_download_extra

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile, RepoFolder


@dataclass(frozen=True)
class Wanted:
    """What a download will fetch.

    Attributes:
        where: The store and folder, or the hub, without secrets.
        files: How many files.
        size: Their bytes.
    """

    where: str
    files: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a model goes on this node.

    Attributes:
        folder: The model's folder in the cache; it need not exist.
        file_system: Its type, such as ``"ext4"``; empty if nothing is known of it.
        shared: Whether a lock there reaches other nodes, too.
        free: Bytes that are free there.
        held: Bytes of the model that are there, of whichever revision.
        problem: Why the folder cannot be written; empty if it can.
    """

    folder: Path
    file_system: str
    shared: bool
    free: int
    held: int
    problem: str


def look_at_bucket(uri: str, mode: NodeModelDownloadable) -> Wanted:
    """List what a mode selects of a bucket, and read a byte of it: each may be refused by itself.

    Raises:
        DownloadError: The store refused one of them, or has no such files.
    """
    with border(uri), contextlib.closing(open_source(uri)) as source:
        listing = source.list_files()
        listing.pop(REVISION_OBJECT, None)
        wanted = selected(source, listing, mode)
        smallest = min(wanted, key=lambda file: (not file.size, file.size))
        if smallest.size:
            with contextlib.closing(source.parts(smallest, (0, 1))) as parts:
                next(parts)
        return Wanted(source.shown_uri, len(wanted), sum(file.size for file in wanted))


def look_at_hub(model_id: str, mode: NodeModelDownloadable) -> Wanted:
    """Return what a mode selects of a model of the Hugging Face Hub, of which nothing is fetched.

    Raises:
        DownloadError: The hub cannot be reached or refused, or the package is missing.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DownloadError(missing_download_extra(f"looking at {model_id!r}", error)) from error
    what = f"cannot list {model_id!r} of the Hugging Face Hub"

    def tree() -> Iterator[RepoFile | RepoFolder]:
        yield from HfApi().list_repo_tree(model_id, recursive=True)

    with border():
        try:
            found = list(supervised(tree, STANDALONE, what, threading.Event()))
        except Exception as error:  # the hub raises its own and those of its HTTP client
            text = getattr(error, "server_message", None) or describe(error)
            raise DownloadError(
                f"{what}: {text.rstrip('.')}; check the id, HF_TOKEN and whether it may read the "
                "model, HF_ENDPOINT and the network"
            ) from error
    files = [file for file in found if hasattr(file, "size") and is_selected(file.path, mode)]
    size = sum(file.size for file in files)
    return Wanted(f"{model_id!r} of the Hugging Face Hub", len(files), size)


def place_of(model_id: str) -> Place:
    """Look at the folder that a model goes to; nothing is made there.

    Raises:
        DownloadError: The folder's name cannot be known.
    """
    folder = model_folder(model_id)
    above = next(path for path in (folder, *folder.parents) if path.exists())
    problem = ""
    if not above.is_dir():
        problem = f"{str(above)!r} is no folder"
    elif not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        problem = f"{str(above)!r} cannot be written by user {os.geteuid()}"
    elif os.statvfs(above).f_flag & os.ST_RDONLY:
        problem = f"{str(above)!r}: {os.strerror(errno.EROFS)}"
    return Place(
        folder,
        file_system_of(above),
        shared_lock_reaches_other_nodes(above),
        shutil.disk_usage(above).free,
        _bytes_below(folder),
        problem,
    )


def _bytes_below(folder: Path) -> int:
    """Return what the files in a folder take, each once however many links lead to it."""
    sizes: dict[tuple[int, int], int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(path, name))
                sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())
