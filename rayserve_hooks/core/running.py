"""Hooks run from an event loop: in a thread, within limits, beside background work."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import entry_error, settle
from rayserve_hooks.core.hooks import CLEAN_UP, PHASES
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError, Phase, raise_from
from rayserve_hooks.trace import TraceEntry

T = TypeVar("T")

_POLL_S = 0.5


async def call_hook(
    manager: PluginManager, hook: str, ctx: CallbackCtx, longest: float | None = None
) -> Any:
    """Return a hook's result; it runs in a thread, within its time limit.

    ``longest`` is a limit of others, such as Serve's grace, for a config that allows more.
    """
    limits = (getattr(manager.stack.time_limits, hook), longest)
    limit = min((limit for limit in limits if limit is not None), default=None)
    async with time_limit(hook, limit, ctx, PHASES[hook]):
        return await threads.run_in_thread(getattr(manager.hook, hook), ctx=ctx)


@contextlib.asynccontextmanager
async def time_limit(
    name: str, seconds: float | None, ctx: CallbackCtx, phase: Phase
) -> AsyncIterator[None]:
    """Cancel the block, and what it runs in a thread, after ``seconds``; None means never."""
    try:
        async with asyncio.timeout(seconds) as deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired() or seconds is None:
            raise
        failure = timed_out(name, seconds, ctx, phase, cause=error)
        raise_from(failure, failure.__cause__)


def timed_out(
    name: str,
    seconds: float,
    ctx: CallbackCtx,
    phase: Phase,
    rest: str = "",
    *,
    cause: BaseException | None = None,
) -> HookError:
    """Return the error of a time limit that has run out; names the callback that is running."""
    # An async call has ended because its wait was cancelled; the last of them is the innermost.
    ended = (entry for entry in reversed(ctx.trace) if entry.outcome == "interrupted")
    running = recorder_of(ctx).running or next(ended, None)
    if running is not None:
        running.finish("timed out")
        running.outcome = "timed out"
    detail = (
        f"not done after {seconds:g} s, the time limit {name!r}; see what it waits for, or raise "
        f"the limit in time_limits{rest}"
    )
    return entry_error(running, ctx.node, phase, detail, cause=cause)


async def with_background(
    manager: PluginManager, ctx: CallbackCtx, work: Coroutine[Any, Any, T]
) -> T:
    """Await ``work`` and all that callbacks start beside it; if one fails, cancel the rest."""
    main = asyncio.ensure_future(work)
    started = recorder_of(ctx).background
    tasks: dict[asyncio.Future[Any], tuple[TraceEntry, threads.ThreadCall[Any]]] = {}
    try:
        while True:
            while started:
                entry, call = started.pop(0)
                tasks[asyncio.wrap_future(call.future)] = entry, call
            waiting = [future for future in (main, *tasks) if not future.done()]
            if not waiting:
                return main.result()
            # Tasks started while we wait send no signal, so poll.
            done, _ = await asyncio.wait(
                waiting, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            if main in done:
                main.result()
            for future in done - {main}:
                error = future.exception()
                if error is not None:
                    _settle(manager, ctx, tasks[future][0], error)
    finally:
        for future in (main, *tasks):
            future.cancel()
        for _, call in (*tasks.values(), *started):  # some it has not noticed yet
            call.give_up()
        started.clear()
        await asyncio.wait([main])
        if not main.cancelled():
            main.exception()  # or Python complains that it was never retrieved


def _settle(
    manager: PluginManager, ctx: CallbackCtx, entry: TraceEntry, error: BaseException
) -> None:
    if isinstance(error, threads.EscapedError) and error.__cause__ is not None:
        error = error.__cause__
    what = f"its background task {entry.background!r} raised "
    blame = replace(manager.blame(entry.callback, entry.hook), what=what)
    settle(error, ctx, blame, entry)
    entry.outcome = blame.outcome_of(error)


async def clean_up(
    manager: PluginManager, ctx: CallbackCtx, error: BaseException, started: Iterable[str] = ()
) -> list[HookError]:
    """Run ``on_init_failed`` in this process and return what failed in it, its limit included.

    ``started`` are callbacks that had started in another process of this node.
    """
    here = (ctx.node.id, os.getpid())
    called = (e for e in ctx.trace if (e.node_id, e.pid) == here and e.outcome != "skipped")
    started = {*started, *(e.callback for e in called)}
    limit = manager.stack.time_limits.on_init_failed
    try:
        async with time_limit(CLEAN_UP, limit, ctx, Phase.CLEAN_UP):
            return await threads.run_in_thread(manager.clean_up, ctx, error, started)
    except HookError as failure:
        return [failure]
