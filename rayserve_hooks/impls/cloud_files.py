"""Bring files and folders of a store to given paths on every node, before the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.threads import check_given_up
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.files import download_files

SCHEMES = ("s3", "gs", "azure", "abfss", "file")


def _of_a_store(uri: str) -> str:
    scheme, found, rest = uri.removeprefix("pyarrow-").partition("://")
    if not found or not rest or scheme not in SCHEMES:
        choices = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"write a URI of a store, with one of {choices}")
    return uri


def _not_empty(path: str) -> str:
    if not path.strip():
        raise ValueError("write the path on each node that it goes to")
    return path


def _some(paths: Sequence[Pair]) -> Sequence[Pair]:
    if not paths:
        raise ValueError("give at least one pair of a URI and a path")
    return paths


Pair = tuple[
    Annotated[str, AfterValidator(_of_a_store)], Annotated[str, AfterValidator(_not_empty)]
]
Paths = Annotated[Sequence[Pair], AfterValidator(_some)]


class CloudFiles:
    """Download extra files and folders to each node: what Ray's ``CloudDownloader`` does.

    Its arguments are taken as they are. Unlike there, what arrives is verified, a failure ends the
    start, processes of one node wait for each other, and a second start fetches only what has
    changed. List it before the callback that brings the model, which ends the chain on its node.

    Args:
        paths: Pairs of a URI (``s3://``, ``gs://``, ``azure://``, ``abfss://`` or ``file://``) and
            a path on each node, fetched one after the other. A folder's files go below the path;
            one object goes to the path itself, or below it if it ends with a slash. ``~`` and
            variables of the node are expanded. Required.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(self, paths: Paths) -> None:
        self.paths = list(paths)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        caller = Caller(ctx.log, "cloud_files", check_given_up)
        for uri, path in self.paths:
            download_files(uri, path, caller)
