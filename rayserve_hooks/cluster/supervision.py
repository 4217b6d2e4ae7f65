"""What surrounds one initialization: the limit of the whole, a heartbeat, and failure."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.engine_arguments import Environment
from rayserve_hooks.cluster.placement import Placement
from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import Recorder
from rayserve_hooks.core.running import call_hook, clean_up, timed_out
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import HookError, Phase, describe, raise_from
from rayserve_hooks.trace import TraceEntry

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

    from rayserve_hooks.cluster.remote_node import RemoteNode

_LOG_EVERY_S = 5.0


class Initialization:
    """One initialization, and how far it has come."""

    def __init__(
        self, config: LLMConfig, stack: CallbackStack, placement_group: PlacementGroup | None
    ) -> None:
        mode = _ray.default_download_mode(config)
        self.manager = manager_of(stack)
        self.ctx = CallbackCtx(
            llm_config=config,
            node=_ray.own_node(),
            local_node_download_model=mode,
            worker_node_download_model=mode,
            placement_group=placement_group or _ray.current_placement_group(),
            runtime_env=_ray.initial_runtime_env(config),
        )
        self.recorder = Recorder(self.ctx, role="replica" if _ray.in_replica() else "driver")
        self.environment = Environment(self.ctx)
        self.placement = Placement(self.ctx)
        self.phase = Phase.BEFORE_INIT
        self.others: list[RemoteNode] = []
        self._name = stack.deployment
        self._started = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """Note that a phase begins."""
        self.phase = phase

    async def call(self, hook: str) -> Any:
        """Call a hook in this process and return its result."""
        return await call_hook(self.manager, hook, self.ctx)

    @contextlib.asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Run the block within the limit of the whole, saying what runs; clean up if it fails."""
        heartbeat = asyncio.create_task(self._log_still_running())
        limit = self.manager.stack.time_limits.total
        try:
            try:
                async with asyncio.timeout(limit) as deadline:
                    yield
            except TimeoutError as expired:
                if limit is None or not deadline.expired():
                    raise
                rest = f"; still running: {self._running()}"
                failure = timed_out("total", limit, self.ctx, self.phase, rest, cause=expired)
                raise_from(failure, failure.__cause__)
        except BaseException as raised:  # whatever ends the initialization, it is cleaned up
            ordinary = isinstance(raised, Exception) and not isinstance(raised, HookError)
            error = raised
            if ordinary:
                error = step_error(self.ctx, self.phase, describe(raised), cause=raised)
            await self._fail(error)
            if error is raised:
                raise
            raise_from(error, error.__cause__)
        finally:
            heartbeat.cancel()
        for node in self.others:
            node.end()
        self._log_summary()

    async def _fail(self, error: BaseException) -> None:
        """Stop what is running, let the callbacks clean up, and remove what was created."""
        self.phase = Phase.CLEAN_UP
        try:
            failures = await asyncio.gather(*(node.clean_up(error) for node in self.others))
            for node in self.others:  # their calls are there already if all of them had ended well
                self.ctx.trace.extend([call for call in node.trace if call not in self.ctx.trace])
            here = await clean_up(self.manager, self.ctx, error)
            if isinstance(error, HookError):
                error.cleanup_errors.extend([*itertools.chain(*failures), *here])
        finally:
            self.placement.remove()
        logger.error(
            "initialization of %s failed after %.2f s; what ran until then:\n%s",
            self._name,
            self._seconds,
            self.ctx.trace.table(),
        )

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    async def _log_still_running(self) -> None:
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            running = self._running()
            logger.info("initialization of %s after %.0f s: %s", self._name, self._seconds, running)

    def _running(self) -> str:
        """Return what runs, on each node that is not ready."""
        doing = [
            _doing(node.phase or "waiting for a worker process", node.node, node.running)
            for node in self.others
            if not node.ended
        ]
        if self.recorder.running is not None or not doing:
            doing.append(_doing(self.phase, self.ctx.node, self.recorder.running))
        return "; ".join(doing)

    def _log_summary(self) -> None:
        ran = ", ".join(entry.name for entry in self.manager.stack.entries) or "none"
        if self.ctx.handled is not None:
            reason = redact(self.ctx.handled.reason, self.recorder.values)
            ran += f", handled by a callback: {reason or 'no reason given'}"
        text = "initialized %s in %.2f s: %d node(s), callbacks %s"
        logger.info(text, self._name, self._seconds, len(self.ctx.nodes), ran)
        logger.debug("%r", self.ctx.trace)


def _doing(phase: str, node: NodeInfo, running: TraceEntry | None) -> str:
    if running is None:
        return f"{phase} on node {node}"
    seconds = time.time() - running.start
    return f"{phase} on node {node}, callback {running.callback!r} for {seconds:.0f} s"
