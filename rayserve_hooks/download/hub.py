"""Models of the Hugging Face Hub, by its own client: pinned, once per node, complete."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.model import model_folder
from rayserve_hooks.download.node_lock import node_lock
from rayserve_hooks.download.store_errors import border
from rayserve_hooks.errors import DownloadError, describe, missing_download_extra

_COMMIT = re.compile("[0-9a-f]{40}")
_TRUE = ("1", "ON", "TRUE", "YES")


def pinned_revision(repo_id: str, revision: str) -> str:
    """Return the commit that a revision names now, or the revision itself in offline mode.

    Args:
        repo_id: The model, such as ``"org/name"``.
        revision: A commit, a branch or a tag.

    Raises:
        DownloadError: The Hub refused, or cannot be reached.
    """
    if _COMMIT.fullmatch(revision) or _is_offline():
        return revision
    with border(), hub_errors(repo_id):
        from huggingface_hub import HfApi

        found = HfApi(token=_token()).model_info(repo_id, revision=revision).sha
    return found or revision


def download_snapshot(
    repo_id: str,
    revision: str,
    *,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
    parallel_files: int = 8,
    caller: Caller = STANDALONE,
) -> str:
    """Download a model to the Hugging Face cache of this node, and check that it is complete.

    The token is that of the environment, ``HF_TOKEN``, and no other. In offline mode
    (``HF_HUB_OFFLINE``) nothing is asked of the Hub, and what the cache has must be complete.

    Args:
        repo_id: The model, such as ``"org/name"``.
        revision: The commit; in offline mode also the name of one that the cache has.
        allow_patterns: Which files; None for all.
        ignore_patterns: Which of these not.
        parallel_files: How many files are fetched at once.
        caller: The caller of the download.

    Returns:
        The folder with the files.

    Raises:
        DownloadError: The Hub refused, the cache cannot be written, or files are missing.
    """
    folder, offline = model_folder(repo_id), _is_offline()
    asked: dict[str, Any] = {
        "repo_id": repo_id,
        "revision": revision,
        "cache_dir": folder.parent,
        "token": _token(),
    }
    allowed = None if allow_patterns is None else list(allow_patterns)
    ignored = list(ignore_patterns or ())

    def chosen(name: str) -> bool:
        return (allowed is None or _matches(name, allowed)) and not _matches(name, ignored)

    with border(), node_lock(folder, f"{repo_id} of the Hugging Face Hub", caller):
        with hub_errors(repo_id):
            from huggingface_hub import hf_hub_download, snapshot_download

            path = Path(
                snapshot_download(
                    **asked,
                    local_files_only=offline,
                    allow_patterns=allowed,
                    ignore_patterns=ignored,
                    max_workers=parallel_files,
                )
            )
            listed = {} if offline else _sizes(repo_id, path.name)
            sizes = {name: size for name, size in listed.items() if chosen(name)}
            for name in _damaged(path, sizes):
                caller.logger.warning("%s of %s is damaged and fetched again", name, repo_id)
                hf_hub_download(filename=name, force_download=True, **asked)
        problems = _damaged(path, sizes) if sizes else _gaps(path, chosen)
        if problems:
            raise DownloadError(
                f"{repo_id!r} in {str(path)!r} is not complete: {len(problems)} files are missing "
                f"or damaged, such as {problems[0]!r}; start once with HF_HUB_OFFLINE=0, or remove "
                "that folder"
            )
        caller.logger.info("%s at %s is complete in %s", repo_id, path.name, path)
        return str(path)


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raise what the Hub's client raises in the block as a `DownloadError` with advice."""
    try:
        yield
    except ImportError as error:
        raise DownloadError(missing_download_extra(f"downloading {repo_id!r}", error)) from error
    except Exception as error:  # the hub raises its own and those of its HTTP client
        from huggingface_hub.errors import HfHubHTTPError

        detail, check = describe(error), "HF_ENDPOINT and the network"
        if isinstance(error, HfHubHTTPError):
            detail = (error.server_message or type(error).__name__).rstrip(".")
            check = "HF_TOKEN and whether the token may read the model"
        raise DownloadError(
            f"cannot fetch {repo_id!r} from the Hugging Face Hub: {detail}; check the id, {check}"
        ) from error


def _token() -> str | bool:
    """Return the environment's token; False, for none, instead of what a login has left."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((token for name in names if (token := os.environ.get(name, "").strip())), False)


def _is_offline() -> bool:
    """Return whether the Hub may not be asked; read now, as a callback may have set it."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def _sizes(repo_id: str, commit: str) -> dict[str, int]:
    """Return the sizes that the Hub has; nothing where it cannot be asked just now."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = list(HfApi(token=_token()).list_repo_tree(repo_id, recursive=True, revision=commit))
    except Exception:  # whatever it is, the client has found all in its cache
        return {}
    return {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the patterns matches, as ``huggingface_hub`` reads them."""
    folders = (f"{pattern}*" if pattern.endswith("/") else pattern for pattern in patterns)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in folders)


def _damaged(folder: Path, sizes: dict[str, int]) -> list[str]:
    found = {name: folder / name for name in sizes}
    return [
        name
        for name, path in sorted(found.items())
        if not path.is_file() or path.stat().st_size != sizes[name]
    ]


def _gaps(folder: Path, chosen: Callable[[str], bool]) -> list[str]:
    """Return what is missing by the folder's own word: links, and the parts of an index."""
    gaps = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.exists()]
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, AttributeError):
            parts = json.loads(index.read_text()).get("weight_map", {}).values()
            gaps += [p for p in filter(chosen, set(parts)) if not (folder / p).is_file()]
    return sorted(set(gaps))
