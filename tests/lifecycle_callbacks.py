"""Callbacks for tests of the whole path; importable in every process."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx, Handled, hookimpl


class Plain:
    """Take part in every hook, and record where."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.seen = ["on_before_init"]
        ctx.custom_data["set_before"] = 1

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self.seen = [*getattr(self, "seen", []), "on_before_download"]
        ctx.custom_data["pid"] = os.getpid()
        ctx.custom_data["seen"] = self.seen
        ctx.custom_data["heavy"] = [
            name for name in ("torch", "vllm", "ray.serve.llm") if name in sys.modules
        ]
        ctx.custom_data["thread"] = threading.current_thread() is threading.main_thread()

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["seen_after"] = [*self.seen, "on_after_init"]


class First:
    @hookimpl(tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass

    @hookimpl(tryfirst=True)
    async def on_before_download(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)


class Last:
    @hookimpl(trylast=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass

    @hookimpl(trylast=True)
    async def on_after_init(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)


class Set:
    """Set fields of the context in one hook; ``values`` maps field to value."""

    def __init__(self, hook: str, values: dict[str, Any]) -> None:
        self.hook = hook
        self.values = values

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._set("on_before_init", ctx)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._set("on_before_download", ctx)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        self._set("on_after_init", ctx)

    def _set(self, hook: str, ctx: CallbackCtx) -> None:
        if hook == self.hook:
            for name, value in self.values.items():
                current = getattr(ctx, name)
                setattr(ctx, name, {**current, **value} if isinstance(value, dict) else value)


class SpreadOverNodes:
    """Use a placement group with a bundle on the head node and one on the other."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        from ray.util.placement_group import placement_group

        ctx.placement_group = placement_group(
            [{"CPU": 1, "node:__internal_head__": 0.001}, {"other": 1}], "STRICT_SPREAD"
        )


class FailOnOtherNode:
    def on_before_download(self, ctx: CallbackCtx) -> None:
        if not ctx.node.is_local:
            raise RuntimeError("no such bucket")


class Fail:
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._fail("on_before_init")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._fail("on_before_download")

    def on_after_init(self, ctx: CallbackCtx) -> None:
        self._fail("on_after_init")

    def _fail(self, hook: str) -> None:
        if hook == self.hook:
            raise RuntimeError("no such bucket")


class Unpicklable:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        # Not a lock: a process that has used Ray Serve can pickle those.
        ctx.custom_data["client"] = (number for number in range(1))


class Lock:
    """Set a value that a process can pickle once it has used Ray Serve, and a node cannot."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["lock"] = threading.Lock()


class PathPerNode:
    def on_before_download(self, ctx: CallbackCtx) -> str:
        here = Path(__file__).parent
        return str(here if ctx.node.is_local else here.parent)


class SeedPerNode:
    def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["seed"] = 1 if ctx.node.is_local else 2


class SeeHandled:
    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["handled"] = ctx.handled
        ctx.custom_data["brought"] = [
            (node.model_path, node.handled) for node in ctx.nodes.values()
        ]


class RemovedGroup:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        from ray.util.placement_group import placement_group, remove_placement_group

        ctx.placement_group = placement_group([{"CPU": 1}])
        remove_placement_group(ctx.placement_group)


class ReadEnvironment:
    def __init__(self, name: str) -> None:
        self.name = name

    def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["environment"] = os.environ.get(self.name)


class ReadConfig:
    def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["model_id"] = ctx.llm_config.model_id


RELEASE = threading.Event()


class Block:
    """Block in a synchronous hook until something on the event loop sets `RELEASE`."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        assert RELEASE.wait(30), "the event loop was blocked"


class TakeOver:
    def __init__(self, path: str = "models/taken-over") -> None:
        self.path = path

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(model_path=self.path, reason="it is baked into the image")


class BlockFor:
    """Block the thread of a synchronous hook."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_before_init(self, ctx: CallbackCtx) -> None:
        time.sleep(self.seconds)


class Wraps:
    """Surround the other callbacks."""

    @hookimpl(wrapper=True)
    def on_before_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def on_after_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        return (yield)


class BringModel:
    """Take over on each node: the model is there, and later callbacks do not run."""

    def __init__(self, path: str, other_path: str = "") -> None:
        self.path = path
        self.other_path = other_path

    async def on_before_download(self, ctx: CallbackCtx) -> str:
        await asyncio.sleep(0)
        return self.path if ctx.node.is_local else self.other_path or self.path


class Logs:
    """Log from each kind of code that a callback has."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.log.info("in a %s", "hook")
        ctx.run_in_background(lambda: ctx.log.info("in the background"))

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)
        ctx.log.info("in a coroutine")

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.log.info("after")
