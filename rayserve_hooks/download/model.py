"""The default download of one node: from an object store into the Hugging Face cache layout.

Ray's own downloader is not used: it logs and swallows failures, of a whole model as of single
files, and writes ``refs/main`` before the files (Ray 2.60, ``CloudModelDownloader.get_model``,
``S3FileSystem.download_files``). Layout, file selection and the ``hash`` object are Ray's.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download.cache import ModelCache
from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.extra_files import download_extra
from rayserve_hooks.download.node_lock import node_lock
from rayserve_hooks.download.store_errors import border, shown
from rayserve_hooks.download.stores import RemoteFile, Source, open_source
from rayserve_hooks.errors import DownloadError, missing_download_extra

# What a mode selects, and what it leaves out, as in Ray 2.60 (CloudFileSystem.download_model).
_ALLOWED = {
    NodeModelDownloadable.TOKENIZER_ONLY: ["*tokenizer*", "*config.json*", "*chat_template*"]
}
_IGNORED = {NodeModelDownloadable.EXCLUDE_SAFETENSORS: ["*.safetensors"]}
REVISION_OBJECT = "hash"
_NAME_BYTES = 255


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
    with border(mirror):
        for uri, destination in mirror.extra_files if mirror else ():
            download_extra(uri, Path(os.path.expandvars(destination)).expanduser(), caller)
        if mode is NodeModelDownloadable.NONE:
            return None
        if mirror is not None and mirror.bucket_uri is not None:
            return str(_download_model(model_id, mirror.bucket_uri, mode, caller))
        if from_hub and not is_path(model_id):
            return _download_from_hub(model_id, mode, caller)
        return None


def _download_model(model_id: str, uri: str, mode: NodeModelDownloadable, caller: Caller) -> Path:
    folder = model_folder(model_id)
    purpose = f"{caller.label or model_id}, {mode.name} of {shown(uri)}"
    with (
        node_lock(folder, purpose, caller),
        contextlib.closing(open_source(uri, caller)) as source,
    ):
        listing = source.list_files()
        hash_object = listing.pop(REVISION_OBJECT, None)
        wanted = selected(source, listing, mode)
        cache = ModelCache(folder, source)
        revision = cache.revision(listing, hash_object)
        return cache.complete(revision, listing, wanted, hash_object)


def selected(
    source: Source, listing: Mapping[str, RemoteFile], mode: NodeModelDownloadable
) -> list[RemoteFile]:
    """Return the objects that a mode selects of a listing.

    Raises:
        DownloadError: There is none.
    """
    wanted = [file for path, file in listing.items() if is_selected(path, mode)]
    if not wanted:
        raise DownloadError(
            f"{source.shown_uri} has {len(listing)} objects, none of which {mode.name} "
            "selects; check the path and the download mode"
        )
    return wanted


def model_folder(model_id: str) -> Path:
    """Return a model's folder in the cache, which ``HF_HUB_CACHE`` or ``HF_HOME`` may name.

    They are read now: a callback may have set them since the Hugging Face library was imported.

    Raises:
        DownloadError: The id is too long for a folder's name, or the package is missing whose
            settings name the folder.
    """
    name = f"models--{model_id.replace('/', '--')}"
    if len(os.fsencode(name)) > _NAME_BYTES:
        raise DownloadError(
            f"the model id {model_id!r} is too long to name a folder: with 'models--' it has "
            f"{len(os.fsencode(name))} bytes, and at most {_NAME_BYTES} are possible; shorten it"
        )
    try:
        return _hub_cache() / name
    except ImportError as error:
        raise DownloadError(missing_download_extra(f"downloading {model_id!r}", error)) from error


def _hub_cache() -> Path:
    for variable, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if folder := os.environ.get(variable, "").strip():
            return Path(os.path.expandvars(folder)).expanduser() / below
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE)
    # The library takes a variable that is set to nothing for the current folder.
    return found if found.is_absolute() else Path.home() / ".cache/huggingface/hub"


def is_path(model_id: str) -> bool:
    """Return whether a model's id is a folder on this node, which the engine then reads."""
    with contextlib.suppress(OSError, RuntimeError):  # too long; of a user who is not there
        return Path(model_id).expanduser().exists()
    return False


def _download_from_hub(model_id: str, mode: NodeModelDownloadable, caller: Caller) -> str:
    from rayserve_hooks.download.hub import hub_errors

    allowed, ignored = _ALLOWED.get(mode), _IGNORED.get(mode)
    purpose = f"{mode.name} of the Hugging Face Hub"
    with hub_errors(model_id):
        from huggingface_hub import snapshot_download
    folder = model_folder(model_id)
    with node_lock(folder, purpose, caller), hub_errors(model_id):
        return snapshot_download(
            model_id,
            allow_patterns=allowed,
            ignore_patterns=ignored,
            cache_dir=folder.parent,
        )


def is_selected(path: str, mode: NodeModelDownloadable) -> bool:
    """Match patterns as the Hugging Face Hub does, which is given the same ones."""
    allowed, ignored = _ALLOWED.get(mode, ["*"]), _IGNORED.get(mode, [])
    matches = functools.partial(fnmatch.fnmatchcase, path)
    return any(map(matches, allowed)) and not any(map(matches, ignored))
