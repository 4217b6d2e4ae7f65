"""Callbacks for tests of a replica's whole life; importable in every process."""

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx


class Life:
    """Take part in every hook but one; write down the last of them, as ``hook name``."""

    def __init__(self, name: str, log: str) -> None:
        self.name, self.log = name, Path(log)

    def _note(self, hook: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{hook} {self.name}\n")

    def on_configure(self, ctx: CallbackCtx) -> None:
        ctx.custom_data[f"configured by {self.name}"] = os.getpid()

    def on_before_init(self, ctx: CallbackCtx) -> None:
        configured = f"configured by {self.name}" in ctx.custom_data
        assert configured == any(call.hook == "on_configure" for call in ctx.trace)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        pass

    def on_after_init(self, ctx: CallbackCtx) -> None:
        pass

    async def on_engine_ready(self, ctx: CallbackCtx) -> None:
        assert ctx.engine is not None
        self._note("on_engine_ready")

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        assert ctx.engine is not None
        self._note("on_shutdown")

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        self._note("on_init_failed")


class LifeOfAll(Life):
    """Take part in the engine's processes, too."""

    async def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        pass


class Old:
    """A callback as written for 0.1, with one hook."""

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["old"] = sorted(ctx.nodes)


class WriteTrace:
    """Write the trace into a folder, once the engine is ready and once it is stopped.

    Being the first of the list it is the last that is shut down.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        self._write(ctx, "shutdown")

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        self._write(ctx, "failed", str(error))

    def _write(self, ctx: CallbackCtx, name: str, error: str = "") -> None:
        calls = [dataclasses.asdict(call) for call in ctx.trace]
        partial = self.folder / f"{name}.partial"
        partial.write_text(json.dumps({"calls": calls, "pid": os.getpid(), "error": error}))
        partial.replace(self.folder / f"{name}.json")


class Configure:
    """Set fields of the context in ``on_configure``; of dicts the keys."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    async def on_configure(self, ctx: CallbackCtx) -> None:
        for name, value in self.fields.items():
            getattr(ctx, name).update(value)


class SetVariable:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def on_configure(self, ctx: CallbackCtx) -> None:
        ctx.runtime_env["env_vars"][self.name] = self.value


class Trouble:
    """Fail in a hook, or end the process there."""

    def __init__(self, hook: str, how: str = "raise", file: str = "") -> None:
        self.hook, self.how, self.file = hook, how, file

    def on_configure(self, ctx: CallbackCtx) -> None:
        self._run("on_configure")

    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        self._run("on_engine_ready")

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        self._run("on_shutdown")

    def _run(self, hook: str) -> None:
        if hook != self.hook:
            return
        if self.file:
            Path(self.file).write_text(str(os.getpid()))
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            threading.Event().wait()
        raise RuntimeError("no such bucket")


class GroupStates:
    """Write down the states of this deployment's own groups, by hook."""

    def __init__(self, file: str) -> None:
        self.file, self.seen = Path(file), dict[str, list[str]]()

    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        self._note("on_engine_ready")

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        self._note("on_shutdown")
        self.file.write_text(json.dumps(self.seen))

    def _note(self, hook: str) -> None:
        from ray.util.placement_group import placement_group_table

        groups = placement_group_table().values()
        self.seen[hook] = [group["state"] for group in groups if group["name"] == "life"]


class Environment:
    """Write the replica's environment into a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_after_init(self, ctx: CallbackCtx) -> None:
        Path(self.path).write_text(json.dumps(dict(os.environ)))
