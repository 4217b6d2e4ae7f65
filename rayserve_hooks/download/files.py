"""Downloads by hand: what a callback may fetch, with the guarantees of the default download."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.extra_files import download_extra, download_object
from rayserve_hooks.download.node_lock import node_lock
from rayserve_hooks.download.state import remove_tree, unwritable
from rayserve_hooks.download.store_errors import border
from rayserve_hooks.download.stores import NothingThereError, open_source
from rayserve_hooks.errors import DownloadError

# A store, and a path that does not end as a folder's.
_OBJECT = re.compile(r"[\w-]+://[^/]+/.*[^/]", re.DOTALL)


def download_files(uri: str, target: str | os.PathLike[str], caller: Caller = STANDALONE) -> None:
    """Download a folder of a store, or one object, to this node.

    Complete or an error: each file is verified and then put in place by a rename. Processes of one
    node do it one after the other; what is there already, and unchanged, is not fetched again;
    what a killed run has fetched is used. Files of others in the folder stay. Blocks; in an
    ``async def`` hook call it in a thread.

    Args:
        uri: ``s3://``, ``gs://``, ``azure://``, ``abfss://`` or ``file://``, as for a model. Where
            objects are below it, it is their folder; else it is one object.
        target: The folder that a folder's files go to. Of one object, the file; with a slash at
            its end, the folder that it goes to under its own name. ``~`` and variables are
            expanded.
        caller: Its logger, name, and cancellation.

    Raises:
        DownloadError: The store refused, holds no such thing or sent damaged files, or the target
            cannot be written.
    """
    text = os.path.expanduser(os.path.expandvars(os.fspath(target)))
    with border(uri):
        if not _is_local_file(uri):
            try:
                download_extra(uri, Path(text), caller)
                return
            except NothingThereError:
                if _OBJECT.fullmatch(uri) is None:
                    raise
        name = uri.rpartition("/")[2]
        download_object(uri, Path(text, name) if text.endswith("/") else Path(text), caller)


@contextlib.contextmanager
def new_folder(
    target: str | os.PathLike[str], caller: Caller = STANDALONE
) -> Iterator[Path | None]:
    """Make a folder that is complete or absent, once per node, with whatever client one has.

    Processes of one node wait for the one that fills it. Blocks, as `download_files` does.

    Args:
        target: The folder.
        caller: Its logger, name, and cancellation.

    Yields:
        An empty folder beside the target, to be filled, which becomes the target when the block
        ends, and is removed if it raises; None if the target is there.

    Raises:
        DownloadError: The folder cannot be made.
    """
    path = Path(os.path.expandvars(os.fspath(target))).expanduser()
    # Other nodes may see it, too.
    part = path.with_name(f".{path.name}.part-{socket.gethostname()}")
    with node_lock(path, f"making {path.name}", caller):
        if path.exists():
            yield None
            return
        try:
            remove_tree(part)  # of a run that was killed
            part.mkdir(parents=True)
        except OSError as error:
            raise unwritable(error, path, "name another folder") from error
        try:
            yield part
            with contextlib.suppress(OSError):  # another node was faster
                part.rename(path)
            if not path.exists():
                raise DownloadError(f"{str(path)!r} cannot be made of {str(part)!r}; name another")
        finally:
            remove_tree(part)


def list_folders(uri: str, holding: str, caller: Caller = STANDALONE) -> list[str]:
    """Return the names of the folders right below a URI that hold a file of this name.

    Args:
        uri: As for `download_files`, of a folder.
        holding: The file's name.
        caller: The caller of the listing.

    Raises:
        DownloadError: The store refused, or holds nothing there.
    """
    with border(uri), contextlib.closing(open_source(uri, caller)) as source:
        paths = (path.split("/") for path in source.list_files())
        return sorted(names[0] for names in paths if names[1:] == [holding])


def _is_local_file(uri: str) -> bool:
    """Return whether a URI is a local file's, which its client cannot list as a folder."""
    scheme, _, path = uri.partition("://")
    return scheme == "file" and os.path.isfile(path)
