"""Callbacks that fail in every way there is; importable in every process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx


class SpreadOver:
    """Use a placement group with a bundle on the head node and one for each resource."""

    def __init__(self, resources: list[str]) -> None:
        self.resources = resources

    def on_before_init(self, ctx: CallbackCtx) -> None:
        from ray.util.placement_group import placement_group

        bundles = [
            {"CPU": 1.0, "node:__internal_head__": 0.001},
            *({r: 1.0} for r in self.resources),
        ]
        ctx.placement_group = placement_group(bundles, "STRICT_SPREAD")


class Record:
    """Append a line to a file for each call."""

    def __init__(self, path: str, fail: bool = False) -> None:
        self.path = Path(path)
        self.fail = fail

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._record("on_before_init", ctx)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self.state = os.getpid()
        ctx.custom_data["pid"] = os.getpid()
        self._record("on_before_download", ctx)

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        self._record(
            "on_init_failed",
            ctx,
            error=f"{type(error).__name__}: {error}",
            same_instance=getattr(self, "state", None) == os.getpid(),
            pid_before=ctx.custom_data.get("pid"),
        )
        if self.fail:
            raise RuntimeError("cannot delete the lease")

    def _record(self, hook: str, ctx: CallbackCtx, **more: Any) -> None:
        line = {"hook": hook, "node": ctx.node.id, "pid": os.getpid(), "name": self.path.stem}
        with self.path.open("a") as file:
            file.write(json.dumps({**line, **more}) + "\n")


class OnNode:
    """Do something on one node in ``on_before_download``.

    Args:
        node: Its id.
        what: A method's name.
        file: A file whose existence says that it has begun.
    """

    def __init__(self, node: str, what: str, file: str = "") -> None:
        self.node = node
        self.what = what
        self.file = Path(file) if file else None

    def on_before_download(self, ctx: CallbackCtx) -> None:
        if ctx.node.id == self.node:
            getattr(self, self.what)(ctx)

    def begun(self) -> bool:
        assert self.file is not None
        before = self.file.exists()
        self.file.touch()
        return before

    def say(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["said"] = self.what

    def fail(self, ctx: CallbackCtx) -> None:
        raise RuntimeError("no such bucket")

    def fail_when_the_other_has_begun(self, ctx: CallbackCtx) -> None:
        assert self.file is not None
        while not self.file.exists():  # of another process: there is nothing to wait on
            time.sleep(0.05)
        raise RuntimeError("no such bucket")

    def kill(self, ctx: CallbackCtx) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_once(self, ctx: CallbackCtx) -> None:
        if not self.begun():
            self.kill(ctx)

    def hang(self, ctx: CallbackCtx) -> None:
        if self.file is not None:
            self.begun()
        threading.Event().wait()

    def hang_once(self, ctx: CallbackCtx) -> None:
        if not self.begun():
            threading.Event().wait()

    def hang_in_native_code(self, ctx: CallbackCtx) -> None:
        # With the interpreter's lock held: no signal handler runs, and no other thread.
        self.begun()
        ctypes.PyDLL(None).sleep(600)

    def fail_in_background(self, ctx: CallbackCtx) -> None:
        ctx.run_in_background(self._restore, "compile cache")

    async def _restore(self, what: str) -> None:
        await asyncio.sleep(0)
        raise RuntimeError(f"no {what}")


class RefuseToBeBuilt:
    """A constructor that works on the head node only, as where a library is missing elsewhere."""

    def __init__(self, head: str) -> None:
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_node_id() != head:
            raise OSError("libstore.so: no such file")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        pass


class HangInReplica:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        threading.Event().wait()
