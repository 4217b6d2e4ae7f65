"""The other nodes' part of an initialization, seen from the replica: started, followed, ended."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.platform import (
    NodeProcess,
    Platform,
    ProcessGoneError,
    RaisedThereError,
)
from rayserve_hooks.cluster.travel import CleanUp, NodeReply, NodeRequest, NodeStatus
from rayserve_hooks.context import NodeInfo, NodeResult
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import entry_error
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.core.log import call_fields, fields, logger
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.errors import HookError, Phase, describe, raise_from
from rayserve_hooks.trace import TraceEntry

T = TypeVar("T")

_ATTEMPTS = 2  # of a process that is killed, for example for want of memory
# Processes that may end in a clean-up without having said in which callback: the node's own, if it
# has crashed meanwhile, and one more. All others end the clean-up of a callback, at its second try.
_SILENT_ENDS = 2
_STOP_S = 10.0
_START_S = 60.0  # on top of the hook's own limit: a new worker process has to start


class RemoteNode:
    """The initialization of another node, in a process that ends with it.

    ``phase`` is None until the node's stage begins, ``reply`` until it has ended well. ``on_news``
    is called with this object whenever something is heard.
    """

    def __init__(
        self,
        request: NodeRequest,
        runtime_env: dict[str, Any],
        platform: Platform = _ray,
        on_news: Callable[[RemoteNode], None] = lambda _: None,
    ) -> None:
        self.node: NodeInfo = request.node
        self.phase: Phase | None = None
        self.reply: NodeReply | None = None
        self._request = request
        self._runtime_env = copy.deepcopy(runtime_env)
        self._platform = platform
        self._on_news = on_news
        self._earlier: list[TraceEntry] = []  # of processes that were killed
        self._calls: list[TraceEntry] = []
        self._cleaned: set[str] = set()  # callbacks that have had their clean-up
        self._process: NodeProcess | None = None
        self._initializing = asyncio.ensure_future(self._initialize())

    @property
    def ended(self) -> bool:
        return self._initializing.done()

    @property
    def actor(self) -> Any:
        """On Ray the actor of its process, which lives as long as a handle is held; else None."""
        return getattr(self._process, "actor", None)

    @property
    def running(self) -> TraceEntry | None:
        """The call that is running there, the innermost one, as far as it is known here."""
        return _innermost(self._calls, "running")

    @property
    def trace(self) -> list[TraceEntry]:
        """The calls made there; one that was cut off by the end of its process is interrupted."""
        calls = [*self._earlier, *self._calls]
        for call in calls:
            if call.outcome == "running":
                call.outcome = "interrupted"
        return calls

    async def wait(self) -> NodeResult:
        """Wait for the result, or for the error that has ended the node's initialization."""
        reply = await asyncio.shield(self._initializing)
        return await threads.run_in_thread(reply.unpacked)

    async def _initialize(self) -> NodeReply:
        problem: BaseException | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            process = self._process = self._start(self._request, attempt)
            try:
                reply = await self._follow(process, process.initialize())
            except RaisedThereError as error:
                cause = _cause(error)
                if isinstance(cause, HookError):
                    raise_from(cause, cause.__cause__)
                failure = self._failed(describe(cause), cause)
                raise_from(failure, failure.__cause__)
            except ProcessGoneError as error:
                self._process, problem = None, _cause(error)
                self._earlier, self._calls = self.trace, []
            else:
                self.reply, self._calls = reply, reply.trace
                return reply
        assert problem is not None
        detail = f"its process was killed or the node died: {describe(problem)}"
        raise self._failed(detail, problem)

    def _start(self, request: NodeRequest, attempt: int) -> NodeProcess:
        """Start a process on the node."""
        return self._platform.start_node_process(request, attempt, self._runtime_env)

    async def _follow(self, process: NodeProcess, call: Awaitable[T]) -> T:
        """Wait for the process's reply to a call, and keep what is heard meanwhile."""
        reply: asyncio.Future[T] = asyncio.ensure_future(call)
        status: asyncio.Future[NodeStatus] | None = None
        seen = 0
        try:
            while not reply.done():
                status = asyncio.ensure_future(process.status(seen))
                either: list[asyncio.Future[Any]] = [reply, status]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not status.done() or status.exception() is not None:
                    break  # the reply is there, or will say why
                heard = status.result()
                seen, self._calls = heard.number, heard.trace
                self.phase = heard.phase or self.phase
                self._on_news(self)
            return await reply
        finally:
            reply.cancel()
            if status is not None:
                status.cancel()

    def _failed(self, detail: str, cause: BaseException) -> HookError:
        # Without a running call the one that was cut off when an earlier process was killed.
        call = self.running or _innermost(self._earlier, "interrupted")
        phase, known = self.phase or Phase.BEFORE_DOWNLOAD, self._request.fields
        return entry_error(call, self.node, phase, detail, cause=cause, known=known)

    async def clean_up(self, error: BaseException) -> list[HookError]:
        """Stop what still runs on the node, and run ``on_init_failed`` if anything had started.

        ``error`` is what ended the initialization; what fails in the clean-up is returned.
        """
        self._initializing.cancel()
        await asyncio.wait([self._initializing])
        if not self._initializing.cancelled():
            self._initializing.exception()  # has been reported, or follows from what was
        failures: list[HookError] = []
        try:
            began = await self._stopped()
            if began or self.phase is not None or self.reply is not None:
                await self._clean_up_all(error, failures)
        except Exception as problem:  # whatever it is, the other nodes are cleaned up
            ours = isinstance(problem, RaisedThereError | ProcessGoneError)
            cause = _cause(problem) if ours else problem
            cut_off = _innermost(self.trace, "interrupted", CLEAN_UP)
            happened = "did not end" if cut_off else "did not run"
            detail = f"on_init_failed {happened}: {describe(cause)}"
            known = self._request.fields
            failures.append(entry_error(cut_off, self.node, Phase.CLEAN_UP, detail, known=known))
            here = fields(phase=Phase.CLEAN_UP, node=self.node.id)
            logger.error("%s", failures[-1], extra=call_fields(cut_off) if cut_off else here)
        finally:
            self._kill()
        return failures

    async def _clean_up_all(self, error: BaseException, failures: list[HookError]) -> None:
        """Clean up in the node's own process; where that is gone, or goes, in a new one."""
        silent_ends = 0
        while True:
            if self._process is None:
                request = self._request_to_clean_up(failures)
                if not manager_of(request.stack).run_order()[CLEAN_UP]:
                    return  # none that is left has anything to clean up
                self._process = self._start(request, _ATTEMPTS)
            called = (call for call in self._earlier if call.outcome != "skipped")
            started = sorted({call.callback for call in called})
            cleaning = self._follow(self._process, self._process.clean_up(error, started))
            limit = self._request.stack.time_limits.on_init_failed
            try:
                outcome: CleanUp = await asyncio.wait_for(cleaning, limit and limit + _START_S)
            except (ProcessGoneError, RaisedThereError) as problem:
                if _innermost(self._calls, "running", CLEAN_UP) is None:
                    silent_ends += 1
                if isinstance(problem, RaisedThereError) or silent_ends == _SILENT_ENDS:
                    raise
                self._process = None
            else:
                self._calls = outcome.trace
                failures.extend(outcome.failures)
                return

    def _request_to_clean_up(self, failures: list[HookError]) -> NodeRequest:
        """Return the request for a new process: without the callbacks that have cleaned up.

        One that was cut off has another try. What is known of those that failed in a process that
        is gone is added to ``failures``.
        """
        self._earlier, self._calls = self.trace, []
        request, done = self._request, self._cleaned
        calls = [call for call in self._earlier if call.hook == CLEAN_UP]
        cut_off = Counter(call.callback for call in calls if call.outcome == "interrupted")
        for name, call in {call.callback: call for call in calls}.items():  # each one's last
            interrupted = call.outcome == "interrupted"
            if name in done or (interrupted and cut_off[name] < _ATTEMPTS):
                continue
            done.add(name)
            if call.outcome != "returned":
                detail = "its process was killed or the node died; see the log of that process"
                failures.append(entry_error(call, self.node, Phase.CLEAN_UP, detail))
        stack = request.stack
        entries = tuple(entry for entry in stack.entries if entry.name not in done)
        request = replace(request, stack=replace(stack, entries=entries))
        if self.reply is not None:
            request = replace(request, custom_data=self.reply.custom_data)
        return request

    async def _stopped(self) -> bool:
        """Stop what the node's process does, and return whether it says that it had begun."""
        if self._process is not None:
            try:
                return await asyncio.wait_for(self._process.stop(), _STOP_S)
            except (ProcessGoneError, RaisedThereError):
                self._process = None
            except TimeoutError:
                text = "killing the process on node %s, which does not stop"
                here = fields(phase=Phase.CLEAN_UP, node=self.node.id)
                logger.warning(text, self.node, extra=here)
                self._kill()
        return False

    def end(self) -> None:
        """Let the node's process end, once the initialization has; nothing runs in it any more."""
        self._process = None  # the last handle: Ray lets the process exit in order

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(Exception):  # of one that has gone in the meantime
                self._process.kill()
            self._process = None


def _cause(error: BaseException) -> BaseException:
    assert error.__cause__ is not None
    return error.__cause__


def _innermost(calls: list[TraceEntry], outcome: str, hook: str | None = None) -> TraceEntry | None:
    found = (
        call
        for call in reversed(calls)
        if call.outcome == outcome and not call.background and hook in (None, call.hook)
    )
    return next(found, None)
