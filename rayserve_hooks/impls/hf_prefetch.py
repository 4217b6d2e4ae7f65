"""Bring a model of the Hugging Face Hub to all nodes at once, all of one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.threads import check_given_up
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.hub import download_snapshot, pinned_revision
from rayserve_hooks.hookspecs import hookimpl

COMMITS = "hf_prefetch"
"""The key of ``ctx.custom_data`` with the commit of each model."""


def _repo_id(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise ValueError("write a model of the Hub, such as 'Qwen/Qwen3-8B'")
    return text


def _revision(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+/-]*", text):
        raise ValueError("write a commit, a branch or a tag")
    return text


RepoId = Annotated[str, AfterValidator(_repo_id)]
Revision = Annotated[str, AfterValidator(_revision)]


class HfPrefetch:
    """Download a model with ``huggingface_hub`` on every node, and have the engine load it there.

    A branch or a tag is looked up once, in the replica, so that all nodes have the same commit.
    The token is ``HF_TOKEN`` of the node's environment and never an argument. With
    ``HF_HUB_OFFLINE=1`` the Hub is not asked, and what the node's cache has must be complete. It
    runs after the other callbacks of its hook, because its result ends the chain on its node.

    Args:
        repo_id: The model, such as ``"Qwen/Qwen3-8B"``. Required.
        revision: A commit of 40 hexadecimal digits, which is pinned for good, or a branch or tag,
            which is pinned for this start. Required.
        allow_patterns: Which files, such as ``["*.safetensors", "*.json"]``. Default: None, all.
        ignore_patterns: Which of these not. Default: None, none.
        parallel_files: How many files a node fetches at once. Default: 8.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        repo_id: RepoId,
        revision: Revision,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
        parallel_files: Annotated[int, Field(ge=1, le=64)] = 8,
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.allow_patterns = allow_patterns
        self.ignore_patterns = ignore_patterns
        self.parallel_files = parallel_files

    @property
    def _asked(self) -> str:
        return f"{self.repo_id}@{self.revision}"

    def on_before_init(self, ctx: CallbackCtx) -> None:
        commit = pinned_revision(self.repo_id, self.revision)
        if commit != self.revision:
            text = "%s of %s is %s now; write that as revision to have the same in every start"
            ctx.log.info(text, self.revision, self.repo_id, commit)
        ctx.custom_data[COMMITS] = {**ctx.custom_data.get(COMMITS, {}), self._asked: commit}

    @hookimpl(trylast=True)
    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        commit = ctx.custom_data.get(COMMITS, {}).get(self._asked, self.revision)
        path = download_snapshot(
            self.repo_id,
            commit,
            allow_patterns=self.allow_patterns,
            ignore_patterns=self.ignore_patterns,
            parallel_files=self.parallel_files,
            caller=Caller(ctx.log, "hf_prefetch", check_given_up),
        )
        return Handled(path, f"{self.repo_id} at {commit} is in the Hugging Face cache")
