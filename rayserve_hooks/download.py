"""The default download of one node: from an object store into the Hugging Face cache layout.

Ray's own downloader is not used: it logs and swallows failures, of a whole model as of single
files, and writes ``refs/main`` before the files (Ray 2.60, ``CloudModelDownloader.get_model``,
``S3FileSystem.download_files``). Layout, file selection, the ``hash`` object and the
``anonymous@`` convention are Ray's.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.errors import DownloadError, describe
from rayserve_hooks.trace import LOGGER_NAME

if TYPE_CHECKING:
    from obstore.store import ObjectStore

logger = logging.getLogger(LOGGER_NAME)

# What Ray takes for tokenizer files (CloudFileSystem.download_model, Ray 2.60).
_TOKENIZER_PARTS = ("tokenizer", "config.json", "chat_template")
_REVISION_OBJECT = "hash"
_DEFAULT_REVISION = "0" * 40
_PARALLEL_FILES = 8


@dataclass(frozen=True)
class Mirror:
    """Where the model's files are: Ray's ``CloudMirrorConfig``, which is costly to import.

    Args:
        bucket_uri: ``s3://``, ``gs://``, ``azure://`` or ``abfss://``; None for extra files only.
        extra_files: Pairs of a URI and the local folder it goes to.
    """

    bucket_uri: str | None
    extra_files: tuple[tuple[str, str], ...] = ()


def download_node(model_id: str, mirror: Mirror | None, mode: NodeModelDownloadable) -> str | None:
    """Download what ``mode`` asks for, and the mirror's extra files, to this node.

    Args:
        model_id: The engine's model id; names the folder in the cache.
        mirror: The bucket; None for a local path or a Hugging Face id, which the engine reads or
            fetches itself.
        mode: Which of the model's files. Extra files are fetched in every mode, as in Ray.

    Returns:
        The folder with the model, or None when nothing of it was downloaded.

    Raises:
        DownloadError: The store refused, has no such files, or sent less than it announced.
    """
    if mirror is None:
        return None
    for uri, destination in mirror.extra_files:
        store = _open(uri)
        target = Path(os.path.expandvars(destination)).expanduser()
        _fetch_all(store, _list(store, uri), target, uri)
    if mirror.bucket_uri is None or mode is NodeModelDownloadable.NONE:
        return None
    return str(_download_model(model_id, mirror.bucket_uri, mode))


def _download_model(model_id: str, uri: str, mode: NodeModelDownloadable) -> Path:
    from filelock import FileLock
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"models--{model_id.replace('/', '--')}")
    _make_folder(folder)
    with FileLock(folder / ".rayserve_hooks.lock"):
        store = _open(uri)
        objects = _list(store, uri)
        wanted = {path: size for path, size in objects.items() if _selected(path, mode)}
        if not wanted:
            raise DownloadError(
                f"{uri} has {len(objects)} objects, none of which {mode.name} selects; check the "
                "path and the download mode"
            )
        revision = _DEFAULT_REVISION
        if _REVISION_OBJECT in objects:
            revision = _read(store, _REVISION_OBJECT, uri).decode("ascii", "replace").strip()
            if not re.fullmatch(r"[\w-][\w.-]*", revision, re.ASCII):
                raise DownloadError(
                    f"the object 'hash' of {uri} holds {revision!r}, which cannot name a folder; "
                    "store the revision there, or delete it"
                )
        snapshot = folder / "snapshots" / revision
        _fetch_all(store, wanted, snapshot, uri)
        # Written last and by rename: refs/main is what says that the snapshot can be read.
        _make_folder(folder / "refs")
        _replace(folder / "refs" / "main", [revision.encode()])
    return snapshot


def _selected(path: str, mode: NodeModelDownloadable) -> bool:
    if path == _REVISION_OBJECT:
        return False
    if mode is NodeModelDownloadable.TOKENIZER_ONLY:
        return any(part in path for part in _TOKENIZER_PARTS)
    if mode is NodeModelDownloadable.EXCLUDE_SAFETENSORS:
        return not path.endswith(".safetensors")
    return True


def _open(uri: str) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise DownloadError(
            f"downloading {uri} needs the package 'obstore'; install 'rayserve_hooks[download]' "
            "on every node"
        ) from error
    scheme, _, rest = uri.partition("://")
    options: dict[str, Any] = {}
    if rest.startswith("anonymous@"):
        rest = rest.removeprefix("anonymous@")
        options["skip_signature"] = True
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint"] = endpoint
            options["client_options"] = {"allow_http": endpoint.startswith("http://")}
    try:
        return from_url(f"{scheme}://{rest}", **options)
    except Exception as error:  # obstore raises classes of its own per store
        raise DownloadError(f"cannot open {uri}: {_message(error)}") from error


def _list(store: ObjectStore, uri: str) -> dict[str, int]:
    """List the objects below a URI: path relative to it, and size in bytes."""
    try:
        found = {
            meta["path"]: meta["size"]
            for batch in store.list()
            for meta in batch
            if not meta["path"].endswith("/")
        }
    except Exception as error:  # obstore raises classes of its own per store
        raise DownloadError(
            f"cannot list {uri}: {_message(error)}; check endpoint, region and credentials"
        ) from error
    if not found:
        raise DownloadError(f"{uri} holds no object; check bucket and path")
    return found


def _fetch_all(store: ObjectStore, sizes: dict[str, int], folder: Path, uri: str) -> None:
    """Fetch the files that are not there with their full size already."""
    missing = [
        path
        for path, size in sizes.items()
        if not (folder / path).is_file() or (folder / path).stat().st_size != size
    ]
    logger.info("%s: %d files, %d to fetch into %s", uri, len(sizes), len(missing), folder)
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        # list() waits for all, and raises the first failure.
        list(pool.map(lambda path: _fetch(store, path, sizes[path], folder / path, uri), missing))


def _fetch(store: ObjectStore, path: str, size: int, target: Path, uri: str) -> None:
    _make_folder(target.parent)
    try:
        written = _replace(target, store.get(path).stream(), size)
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {describe(error)}") from error
    except Exception as error:  # obstore raises classes of its own per store
        raise DownloadError(f"cannot fetch {path!r} of {uri}: {_message(error)}") from error
    logger.debug("%s: fetched %s, %d bytes", uri, path, written)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot make the folder {folder}: {describe(error)}") from error


def _read(store: ObjectStore, path: str, uri: str) -> bytes:
    try:
        return bytes(store.get(path).bytes())
    except Exception as error:  # obstore raises classes of its own per store
        raise DownloadError(f"cannot fetch {path!r} of {uri}: {_message(error)}") from error


def _message(error: Exception) -> str:
    """Keep the store's own message, without obstore's dump of its internals below it."""
    return describe(error).partition("\n\nDebug source")[0]


def _replace(target: Path, chunks: Iterable[Any], size: int | None = None) -> int:
    """Write a file under a temporary name, check its size, then rename it into place."""
    # Unique: extra files of two deployments may go to one place at the same moment.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            written = file.tell()
        if size is not None and written != size:
            raise DownloadError(
                f"{target.name!r} ended after {written} of {size} bytes; the store or the network "
                "cut it off, try again"
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return written
