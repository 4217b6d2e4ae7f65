"""The simulated processes of other nodes and of the engine, between which nothing is shared."""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

from rayserve_hooks.cluster._vllm import CONFIG, CORE, ROLES, WORKER
from rayserve_hooks.cluster.engine_folder import Report
from rayserve_hooks.cluster.engine_process import as_failure
from rayserve_hooks.cluster.engine_processes import add_calls, failure_in
from rayserve_hooks.cluster.node_actor import NodeActor
from rayserve_hooks.cluster.platform import ProcessGoneError, RaisedThereError
from rayserve_hooks.cluster.travel import (
    CleanUp,
    EngineRequest,
    NodeReply,
    NodeStatus,
    engine_context_of,
    engine_request_for,
)
from rayserve_hooks.context import CallbackCtx, NodeInfo, ProcessInfo
from rayserve_hooks.core.hooks import ENGINE_PROCESS
from rayserve_hooks.core.manager import PluginManager, manager_of
from rayserve_hooks.core.running import call_hook, with_background
from rayserve_hooks.core.threads import run_in_thread
from rayserve_hooks.errors import HookError, raise_from
from rayserve_hooks.testing.travel import KilledError, arrived, own_process, sent, sent_error
from rayserve_hooks.trace import TraceEntry

T = TypeVar("T")


class NodeProcess:
    """A simulated process of another node, with the real actor in it.

    What it is called with, and what it answers, goes by way of bytes. It is on the loop of the
    replica: no code of a callback ever runs there.
    """

    def __init__(self, actor: NodeActor) -> None:
        self._actor = actor
        self._context = contextvars.copy_context()
        self._context.run(own_process.set, self)
        self._loop = asyncio.get_running_loop()
        self._killed: asyncio.Future[None] = self._loop.create_future()
        self._calls: set[asyncio.Task[Any]] = set()

    async def initialize(self) -> NodeReply:
        return await self._answer(self._actor.initialize())

    async def status(self, seen: int) -> NodeStatus:
        return await self._answer(self._actor.status(seen))

    async def stop(self) -> bool:
        return await self._answer(self._actor.stop())

    async def clean_up(self, error: BaseException, started: Sequence[str]) -> CleanUp:
        error, started = sent_error(error), sent(started)
        return await self._answer(self._actor.clean_up(error, started, followed=True))

    async def _answer(self, call: Coroutine[Any, Any, T]) -> T:
        if self._killed.done():
            call.close()
            raise ProcessGoneError from KilledError("killed by the test")
        task = self._start(call)
        either: list[asyncio.Future[Any]] = [task, self._killed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ProcessGoneError from KilledError("killed by the test")
        try:
            return sent(task.result())
        except (Exception, asyncio.CancelledError) as error:
            raise RaisedThereError from sent_error(error)

    def _start(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(call, context=self._context.copy())
        self._calls.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # or Python complains that nobody asked for it

    def kill(self) -> None:
        """End it: whoever waits for an answer hears at once that the process is gone."""
        if self._killed.done():
            return
        self._killed.set_result(None)
        for call in self._calls:
            call.cancel()
        self._start(self._actor.stop())  # lets its threads end

    def die(self) -> None:
        """End it, from a thread of its own in which a callback runs."""
        self._loop.call_soon_threadsafe(self.kill)

    async def ended(self) -> None:
        """End it, and wait until nothing of it runs any more."""
        self.kill()
        while self._calls:
            await asyncio.wait(self._calls)


def process_of(name: str, nodes: Sequence[NodeInfo]) -> tuple[NodeInfo, ProcessInfo]:
    """Return a process by its name, such as ``"worker 1"``, and the node it is on."""
    role, _, rank = name.rpartition(" ") if name[-1:].isdigit() else (name, "", "")
    if role not in ROLES:
        raise ValueError(
            f"{name!r} is no process of the engine; use one of {CONFIG!r}, {CORE!r}, '{WORKER} 0'"
        )
    number = int(rank) if rank else None
    on = nodes[(number or 0) % len(nodes)] if role == WORKER else nodes[0]
    return on, ProcessInfo(role, number)


@dataclass
class EngineProcesses:
    """Runs ``on_before_engine_init`` in each process of a simulated engine.

    Args:
        manager: The replica's manager.
        ctx: The replica's context.
        processes: The engine's processes.
    """

    manager: PluginManager
    ctx: CallbackCtx
    processes: Sequence[tuple[NodeInfo, ProcessInfo]]
    _request: EngineRequest | None = None
    _reports: list[Report] = field(default_factory=list)
    _failed: asyncio.Event = field(default_factory=asyncio.Event)

    async def prepare(self) -> None:
        callbacks = self.manager.run_order()[ENGINE_PROCESS]
        if not callbacks:
            return
        stack = self.manager.stack
        entries = tuple(entry for entry in stack.entries if entry.name in callbacks)
        data = engine_request_for(self.ctx, replace(stack, entries=entries))
        self._request = EngineRequest.loaded(data)
        call = call_hook(self.manager, ENGINE_PROCESS, self.ctx)
        await with_background(self.manager, self.ctx, call)

    async def start(self) -> None:
        """Start the processes; the first that fails is the last."""
        for node, process in self.processes if self._request else ():
            await self._run(Report(node, process))
            if self.failure() is not None:
                self._failed.set()
                await asyncio.Event().wait()  # as vLLM, which says much later that one is gone

    async def _run(self, report: Report) -> None:
        """Run the hook in a process in which all is built anew."""
        assert self._request is not None
        request = replace(self._request, stack=arrived(self._request.stack))
        ctx = engine_context_of(request, report.node, report.process, lambda _: None)
        context = contextvars.copy_context()
        process = EngineProcess(asyncio.get_running_loop(), ctx.trace)
        context.run(own_process.set, process)
        work = self._hook(request, ctx)
        process.task = asyncio.get_running_loop().create_task(work, context=context)
        await asyncio.wait([process.task])
        error: HookError | None = None
        if not process.killed and not process.task.cancelled():
            raised = process.task.exception()
            if isinstance(raised, Exception):
                arrived_error = sent_error(as_failure(raised, ctx, report))
                assert isinstance(arrived_error, HookError)
                error = arrived_error
        trace = process.seen if process.killed else list(ctx.trace)
        report = replace(report, trace=trace, error=error, killed=process.killed)
        failure = failure_in([report])
        for entry in trace:
            entry.finish("interrupted")
        self._reports.append(replace(report, error=failure, killed=False))

    @staticmethod
    async def _hook(request: EngineRequest, ctx: CallbackCtx) -> None:
        manager = await run_in_thread(manager_of, request.stack)
        await with_background(manager, ctx, call_hook(manager, ENGINE_PROCESS, ctx))

    async def watch(self) -> NoReturn:
        await self._failed.wait()
        failure = self.failure()
        assert failure is not None
        raise_from(failure, failure.__cause__)

    async def collect(self) -> None:
        add_calls(self.ctx, self._reports)
        failure = self.failure()
        if failure is not None:
            raise_from(failure, failure.__cause__)

    def failure(self) -> HookError | None:
        return failure_in(self._reports)

    async def remove(self) -> None:
        """Do nothing: nothing was left."""


class EngineProcess:
    """A simulated process of the engine, which a callback can kill."""

    def __init__(self, loop: asyncio.AbstractEventLoop, trace: Sequence[TraceEntry]) -> None:
        self._loop, self._trace = loop, trace
        self.seen: list[TraceEntry] = []  # the calls, as they were when it was killed
        self.task: asyncio.Task[None] | None = None
        self.killed = False

    def die(self) -> None:
        """End it, from a thread in which a callback runs."""
        self.killed = True
        self.seen = [copy.copy(entry) for entry in self._trace]
        if self.task is not None:
            self._loop.call_soon_threadsafe(self.task.cancel)
