"""Callbacks with a ``doctor`` of their own; importable in every process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rayserve_hooks import CallbackCtx, Finding, Handled


class Says:
    """Yield one finding, or what it is given."""

    def __init__(self, state: Any = "ok", detail: str = "is there", hf_token: str = "") -> None:
        self.state, self.detail, self.hf_token = state, detail, hf_token

    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
        model = llm_config["model_loading_config"]["model_id"]
        detail = f"{self.detail} for {model} {self.hf_token}".strip()
        yield Finding("disk", self.state, detail, "" if self.state == "ok" else "mount it")

    def on_after_init(self, ctx: CallbackCtx) -> None: ...


class Fails(Says):
    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
        raise RuntimeError(f"no answer for {self.hf_token}")


class Wrong(Says):
    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Any]:
        yield "all is well"


class Where(Says):
    """Say in which process it is looked at."""

    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
        yield Finding("process", "ok", f"{os.getpid()} {os.environ.get('OF_THE_FILE')}")


class Brings(Says):
    """Bring the model on each node but one, where it fails."""

    def __init__(self, folder: str, fails_on: str = "") -> None:
        super().__init__()
        self.folder, self.fails_on = folder, fails_on

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        if ctx.node.id == self.fails_on:
            raise RuntimeError("no such bucket")
        return Handled(self.folder)
