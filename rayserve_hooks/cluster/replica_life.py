"""A replica's life from its nodes to its end, around whatever engine: started, ready, shut down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rayserve_hooks.cluster.supervision import Initialization
from rayserve_hooks.core.hooks import ENGINE_READY, SHUTDOWN
from rayserve_hooks.core.log import fields, logger
from rayserve_hooks.core.running import call_hook, with_background
from rayserve_hooks.errors import HookError, Phase, raise_from

# Of the time after which Serve kills a replica, less the wait for running requests: the rest is the
# engine's own.
_SHARE_OF_GRACE = 0.75
_LEAST_S = 1.0


async def started(
    this: Initialization, start: Awaitable[None], client: Callable[[], object]
) -> None:
    """Await the engine's start, in which the nodes are prepared, and run ``on_engine_ready``.

    Args:
        this: The start of the replica, which is cleaned up after a failure.
        start: The engine's own start.
        client: Called for the engine's client, once the engine is up.

    Raises:
        HookError: A callback, a process of the engine or the engine's start has failed.
    """
    try:
        async with this.supervised():
            await _start(this, start)
            this.set_engine(client())
            await this.processes.collect()
            this.enter(Phase.ENGINE_READY)
            await with_background(this.manager, this.ctx, this.call(ENGINE_READY))
    finally:
        await this.processes.remove()


async def _start(this: Initialization, start: Awaitable[None]) -> None:
    """Await the engine's start; a hook that fails in a process of it ends the wait."""
    starting = asyncio.ensure_future(start)
    watching = asyncio.ensure_future(_watch(this))
    both = (starting, watching)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            watching.result()
        await starting
    except HookError:
        raise
    except Exception:
        failure = this.processes.failure()
        if failure is None:
            raise
        raise_from(failure, failure.__cause__)  # vLLM's own follows from it, and says less
    finally:
        for one in both:
            one.cancel()
        await asyncio.wait(both)
        if not starting.cancelled():
            starting.exception()  # or Python complains that it was never retrieved
        if not watching.cancelled():
            watching.exception()


async def _watch(this: Initialization) -> None:
    await this.prepared.wait()
    await this.processes.watch()


async def shut_down(this: Initialization, grace_s: float) -> None:
    """Run ``on_shutdown``; ``grace_s`` is after how long Serve kills the replica."""
    this.enter(Phase.SHUTDOWN)
    call = call_hook(this.manager, SHUTDOWN, this.ctx, longest_s(grace_s))
    try:
        await with_background(this.manager, this.ctx, call)
    except HookError as failure:  # its time limit, or what it has started beside
        logger.error("%s", failure, extra=fields(phase=this.phase, node=this.ctx.node.id))


def longest_s(grace_s: float) -> float:
    """Return how long callbacks may take of the seconds after which Serve kills a replica."""
    return max(grace_s, _LEAST_S) * _SHARE_OF_GRACE
