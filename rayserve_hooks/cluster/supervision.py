"""What surrounds one initialization: the limit of the whole, a heartbeat, and failure."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayserve_hooks import __version__
from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.configure import take_up
from rayserve_hooks.cluster.engine_arguments import Environment
from rayserve_hooks.cluster.placement import Placement
from rayserve_hooks.cluster.platform import Platform
from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo, ProcessInfo
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.hooks import CLEAN_UP, ENGINE_PROCESS
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
        self,
        config: LLMConfig,
        stack: CallbackStack,
        placement_group: PlacementGroup | None,
        platform: Platform = _ray,
    ) -> None:
        mode = platform.default_download_mode(config)
        self.manager, self.platform = manager_of(stack), platform
        self.ctx = CallbackCtx(
            llm_config=config,
            node=platform.own_node(),
            process=ProcessInfo("replica" if platform.in_replica() else "driver"),
            local_node_download_model=mode,
            worker_node_download_model=mode,
            placement_group=placement_group or platform.current_placement_group(),
            placement_group_config=copy.deepcopy(config.placement_group_config or {}),
            runtime_env=platform.initial_runtime_env(config),
        )
        self.recorder = Recorder(self.ctx)
        self.environment = Environment(self.ctx)
        self.placement = Placement(self.ctx, platform)
        self.phase = Phase.BEFORE_INIT
        self.others: list[RemoteNode] = []
        self.processes = platform.engine_processes(self.manager, self.ctx, self.others)
        self.prepared = asyncio.Event()
        self._configured = stack.configured
        self._name = stack.deployment
        self._started = time.perf_counter()

    def take_up_configured(self) -> None:
        """Begin with what ``on_configure`` has left where the app was built."""
        if self._configured is not None:
            take_up(self.ctx, self._configured)

    def begin_engine(self) -> None:
        """Go on from the nodes to the engine; their processes stay where they are needed."""
        self.phase = Phase.ENGINE_START
        order = self.manager.run_order()
        if not (order[CLEAN_UP] or order[ENGINE_PROCESS]):
            self.end_nodes()

    def set_engine(self, client: object) -> None:
        """Set what callbacks find as ``ctx.engine``."""
        self.recorder.set_engine(client)

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
    async def within_total(self) -> AsyncIterator[None]:
        """Run the block within the limit of the whole initialization."""
        limit = self.manager.stack.time_limits.total
        try:
            async with asyncio.timeout(limit) as deadline:
                yield
        except TimeoutError as expired:
            if limit is None or not deadline.expired():
                raise
            rest = f"; still running: {'; '.join(map(str, self._running()))}"
            failure = timed_out("total", limit, self.ctx, self.phase, rest, cause=expired)
            raise_from(failure, failure.__cause__)

    @contextlib.asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Run the block, saying what runs; clean up if it fails."""
        heartbeat = asyncio.create_task(self._log_still_running())
        try:
            yield
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
        self.end_nodes()

    def end_nodes(self) -> None:
        """Let the processes of other nodes end, which wait for a clean-up."""
        for node in self.others:
            node.end()

    async def _fail(self, error: BaseException) -> None:
        """Stop what is running, let the callbacks clean up, and remove what was created."""
        failed_in, self.phase = self.phase, Phase.CLEAN_UP
        try:
            await self.processes.remove()  # by the processes that the clean-up ends
            failures = await asyncio.gather(*(node.clean_up(error) for node in self.others))
            for node in self.others:  # their calls are there already if all of them had ended well
                self.ctx.trace.extend([call for call in node.trace if call not in self.ctx.trace])
            here = await clean_up(self.manager, self.ctx, error)
            if isinstance(error, HookError):
                error.cleanup_errors.extend([*itertools.chain(*failures), *here])
                way_without = self.manager.stack.way_without(error.callback)
                error.advice = "; ".join(filter(None, [error.advice, way_without]))
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

    def log_start(self) -> None:
        """Log who begins: the package's version, and the order of the callbacks."""
        order = [
            f"{hook}: {', '.join(names)}"
            for hook, names in self.manager.run_order().items()
            if names
        ]
        text = "rayserve_hooks %s initializes %s: %s"
        shown = "; ".join(order) or "no callbacks"
        logger.info(text, __version__, self._name, shown, extra=self._fields(self.phase))

    def log_summary(self) -> None:
        """Log that the nodes are initialized, and what ran."""
        trace = self.ctx.trace
        called = {entry.callback for entry in trace if entry.outcome != "skipped"}
        names = [entry.name for entry in self.manager.stack.entries]
        ran = ", ".join(name for name in names if name in called) or "none"
        ran = "; skipped: ".join([ran, *(["; ".join(skips(trace))] if skips(trace) else [])])
        text = "initialized %s in %.2f s: %d node(s), callbacks that ran: %s"
        nodes = len(self.ctx.nodes)
        logger.info(text, self._name, self._seconds, nodes, ran, extra=self._fields())
        self._log_trace()

    def log_ready(self) -> None:
        """Log that the engine is ready, and what ran."""
        text = "the engine of %s is ready after %.2f s"
        logger.info(text, self._name, self._seconds, extra=self._fields(self.phase))
        self._log_trace()

    def _log_trace(self) -> None:
        level = logging.INFO if trace_is_wanted() else logging.DEBUG
        logger.log(level, "what ran:\n%s", self.ctx.trace.table(), extra=self._fields())


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
