"""Callbacks that fail in every way there is; importable in every process."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from waiting import until

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
        until(self.file.exists)
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


class Waits:
    """Wait for ever on every node but the replica's, after a line in a file."""

    def __init__(self, path: str, fail: bool = False) -> None:
        self.path, self.fail = Path(path), fail

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        if ctx.node.is_local:
            return
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.fail:
            raise RuntimeError("no such bucket")
        await asyncio.Event().wait()


class CrashTogether:
    """End the processes of some nodes at the same moment.

    Args:
        nodes: Their ids.
        how: A method's name.
        folder: Where they meet.
        hook: In which hook.
    """

    def __init__(
        self, nodes: list[str], how: str, folder: str, hook: str = "on_before_download"
    ) -> None:
        self.nodes, self.how, self.folder, self.hook = nodes, how, Path(folder), hook

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._crash("on_before_download", ctx)

    def on_init_failed(self, ctx: CallbackCtx) -> None:
        self._crash("on_init_failed", ctx)

    def _crash(self, hook: str, ctx: CallbackCtx) -> None:
        if hook != self.hook or ctx.node.id not in self.nodes:
            return
        (self.folder / ctx.node.id).touch()
        until(lambda: all((self.folder / node).exists() for node in self.nodes))
        getattr(self, self.how)()

    def exit(self) -> None:
        os._exit(1)

    def segfault(self) -> None:
        ctypes.string_at(0)

    def close_files(self) -> None:
        os.closerange(3, 4096)
        threading.Event().wait()


class HereOnlyError(Exception):
    """Can be rebuilt in its own process only; in another that raises, or exits."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (os.getpid(), *self.args)


def _rebuilt(pid: int, text: str) -> HereOnlyError:
    if os.getpid() == pid:
        return HereOnlyError(text)
    raise SystemExit(3) if "exits" in text else ModuleNotFoundError("no module named 'store'")


class Raises:
    """Raise on one node what cannot be sent to another.

    Args:
        node: Its id.
        text: The error's text, ``times`` over.
        times: How long it is made.
    """

    def __init__(self, node: str, text: str, times: int = 1) -> None:
        self.node, self.text, self.times = node, text, times

    def on_before_download(self, ctx: CallbackCtx) -> None:
        if ctx.node.id == self.node:
            raise HereOnlyError(self.text * self.times)


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


class Exits:
    """Exit where, and as, its arguments say.

    Args:
        place: A hook's name, ``"constructor"`` of an actor, or ``"background"``.
        error: The exception's name.
        on_other: Whether it does so on another node, and not on the replica's.
        is_async: Whether it does so in a coroutine.
    """

    def __init__(
        self,
        place: str,
        error: str = "SystemExit",
        *,
        on_other: bool = False,
        is_async: bool = False,
    ) -> None:
        self.place, self.error, self.on_other, self.is_async = place, error, on_other, is_async
        if place == "constructor" and self._is_other():
            self._exit()

    def on_before_init(self, ctx: CallbackCtx) -> object:
        return self._at("on_before_init", ctx)

    def on_before_download(self, ctx: CallbackCtx) -> object:
        if ctx.node.is_local == self.on_other:
            return None
        if self.place == "background":
            ctx.run_in_background(self._exit_async if self.is_async else self._exit)
        return self._at("on_before_download", ctx)

    def on_after_init(self, ctx: CallbackCtx) -> object:
        return self._at("on_after_init", ctx)

    def on_init_failed(self, ctx: CallbackCtx) -> object:
        return self._at("on_init_failed", ctx)

    def _at(self, place: str, ctx: CallbackCtx) -> object:
        if place != self.place:
            return None
        if self.is_async:
            return self._exit_async()
        self._exit()
        return None

    async def _exit_async(self) -> None:
        await asyncio.sleep(0)
        self._exit()

    def _exit(self) -> None:
        raise EXITS[self.error]("out")

    @staticmethod
    def _is_other() -> bool:
        """Return whether this is the process of a node's actor."""
        import ray

        return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


class BlocksItsLoop:
    """Block the loop of async callbacks on one node."""

    def __init__(self, node: str, *, stops: bool) -> None:
        self.node, self.stops = node, stops

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        if ctx.node.id == self.node:
            if self.stops:
                asyncio.get_running_loop().stop()
                await asyncio.sleep(0)
            threading.Event().wait()

    async def on_init_failed(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)


class PanicException(BaseException):
    """No Exception, and none of Python's own."""


EXITS = {
    kind.__name__: kind
    for kind in (
        SystemExit,
        KeyboardInterrupt,
        GeneratorExit,
        asyncio.CancelledError,
        PanicException,
    )
}
