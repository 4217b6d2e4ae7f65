"""What surrounds one initialization: the limit of the whole, a heartbeat, and failure."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.engine_arguments import Environment
from rayserve_hooks.cluster.placement import Placement
from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.log import call_fields, fields, logger, seconds_of, trace_is_wanted
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.recorder import Recorder
from rayserve_hooks.core.running import call_hook, clean_up, timed_out
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.core.takeovers import log_take_over, named, skips, taken_over_by
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

    def take_over(self, handled: Handled) -> None:
        """Note, and log, that a callback has initialized the nodes itself."""
        hook, node = "on_before_init", self.ctx.node
        call = taken_over_by(self.ctx.trace, hook, node.id)
        if call is not None:
            order = self.manager.run_order()["on_before_download"]
            self.recorder.skip("on_before_download", order, call.callback)
        self.recorder.take_over(named(handled, hook, self.ctx))
        log_take_over(self.ctx.trace, hook, node)

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
                rest = f"; still running: {'; '.join(map(str, self._running()))}"
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
        failed_in, self.phase = self.phase, Phase.CLEAN_UP
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
            extra=self._fields(failed_in),
        )

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    async def _log_still_running(self) -> None:
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            text = "initialization of %s after %.0f s: %s"
            for doing in self._running():
                logger.info(text, self._name, self._seconds, doing, extra=doing.fields())

    def _running(self) -> list[_Doing]:
        """Return what runs, on each node that is not ready."""
        doing = [
            _Doing(node.phase, node.node, node.running) for node in self.others if not node.ended
        ]
        if self.recorder.running is not None or not doing:
            doing.append(_Doing(self.phase, self.ctx.node, self.recorder.running))
        return doing

    def _fields(self, phase: Phase | None = None) -> dict[str, Any]:
        return fields(phase=phase, node=self.ctx.node.id, seconds=self._seconds)

    def _log_summary(self) -> None:
        trace = self.ctx.trace
        called = {entry.callback for entry in trace if entry.outcome != "skipped"}
        names = [entry.name for entry in self.manager.stack.entries]
        ran = ", ".join(name for name in names if name in called) or "none"
        ran = "; skipped: ".join([ran, *(["; ".join(skips(trace))] if skips(trace) else [])])
        text = "initialized %s in %.2f s: %d node(s), callbacks that ran: %s"
        nodes = len(self.ctx.nodes)
        logger.info(text, self._name, self._seconds, nodes, ran, extra=self._fields())
        level = logging.INFO if trace_is_wanted() else logging.DEBUG
        logger.log(level, "what ran:\n%s", trace.table(), extra=self._fields())


@dataclass(frozen=True)
class _Doing:
    """What goes on on a node; without a phase it waits for a worker process."""

    phase: Phase | None
    node: NodeInfo
    running: TraceEntry | None

    def __str__(self) -> str:
        text = f"{self.phase or 'waiting for a worker process'} on node {self.node}"
        if self.running is None:
            return text
        seconds = seconds_of(self.running)
        return f"{text}, callback {self.running.callback!r} for {seconds:.0f} s"

    def fields(self) -> dict[str, Any]:
        if self.running is not None:
            return call_fields(self.running)
        return fields(phase=self.phase, node=self.node.id)
