"""The other nodes' part of an initialization, seen from the replica: started, followed, ended."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from dataclasses import replace
from typing import Any

from rayserve_hooks.cluster.node_actor import NodeActor
from rayserve_hooks.cluster.travel import CleanUp, NodeReply, NodeRequest
from rayserve_hooks.context import NodeInfo, NodeResult
from rayserve_hooks.core.failures import entry_error
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.errors import HookError, Phase, describe
from rayserve_hooks.trace import TraceEntry

_ATTEMPTS = 2  # of a process that is killed, for example for want of memory
_STOP_S = 10.0
_START_S = 60.0  # on top of the hook's own limit: a new worker process has to start


class RemoteNode:
    """The initialization of another node, by an actor whose process ends with it.

    ``phase`` is None until the node's stage begins, ``reply`` until it has ended well.
    """

    def __init__(self, request: NodeRequest, runtime_env: dict[str, Any]) -> None:
        self.node: NodeInfo = request.node
        self.phase: Phase | None = None
        self.reply: NodeReply | None = None
        self._request = request
        self._runtime_env = copy.deepcopy(runtime_env)
        self._earlier: list[TraceEntry] = []  # of processes that were killed
        self._calls: list[TraceEntry] = []
        self._actor: Any = None
        self._initializing = asyncio.ensure_future(self._initialize())

    @property
    def ended(self) -> bool:
        return self._initializing.done()

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
        return reply.unpacked()

    async def _initialize(self) -> NodeReply:
        from ray.exceptions import RayError, RayTaskError

        problem: RayError | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            self._actor = self._start(self._request, attempt)
            try:
                self.reply = await self._follow(self._actor)
            except RayTaskError as error:
                if isinstance(error.cause, HookError):
                    raise error.cause from error.cause.__cause__
                raise self._failed(describe(error.cause)) from error
            except RayError as error:
                self._actor, problem = None, error
                self._earlier, self._calls = self.trace, []
            else:
                self._calls = self.reply.trace
                return self.reply
        assert problem is not None
        detail = f"its process was killed or the node died: {describe(problem)}"
        raise self._failed(detail) from problem

    def _start(self, request: NodeRequest, attempt: int) -> Any:
        """Start an actor on the node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor: Any = ray.remote(NodeActor)
        here = NodeAffinitySchedulingStrategy(self.node.id, soft=False)
        actor = actor.options(num_cpus=0, scheduling_strategy=here, runtime_env=self._runtime_env)
        return actor.remote(request, attempt)

    async def _follow(self, actor: Any) -> NodeReply:
        """Wait for the reply, and keep what is heard meanwhile."""
        name = f"rayserve_hooks:{self._request.stack.deployment}:{self.node.address}"
        reply = status = asyncio.ensure_future(actor.initialize.options(name=name).remote())
        seen = 0
        try:
            while not reply.done():
                status = asyncio.ensure_future(actor.status.remote(seen))
                await asyncio.wait([reply, status], return_when=asyncio.FIRST_COMPLETED)
                if not status.done() or status.exception() is not None:
                    break  # the reply is there, or will say why
                heard = status.result()
                seen, self.phase, self._calls = heard.number, heard.phase, heard.trace
            return await reply  # type: ignore[no-any-return]
        finally:
            reply.cancel()
            status.cancel()

    def _failed(self, detail: str) -> HookError:
        # Without a running call the one that was cut off when an earlier process was killed.
        call = self.running or _innermost(self._earlier, "interrupted")
        return entry_error(call, self.node, self.phase or Phase.BEFORE_DOWNLOAD, detail)

    async def clean_up(self, error: BaseException) -> list[HookError]:
        """Stop what still runs on the node, and run ``on_init_failed`` if anything had started.

        ``error`` is what ended the initialization; what fails in the clean-up is returned.
        """
        from ray.exceptions import RayError, RayTaskError

        self._initializing.cancel()
        await asyncio.wait([self._initializing])
        if not self._initializing.cancelled():
            self._initializing.exception()  # has been reported, or follows from what was
        try:
            began = self.phase is not None or self.reply is not None
            return await self._cleaned_up(error) if began else []
        except (RayError, TimeoutError) as problem:
            cause = problem.cause if isinstance(problem, RayTaskError) else problem
            detail = f"on_init_failed did not run: {describe(cause)}"
            failure = entry_error(None, self.node, Phase.CLEAN_UP, detail)
            logger.error("%s", failure)
            return [failure]
        finally:
            self._kill()

    async def _cleaned_up(self, error: BaseException) -> list[HookError]:
        """Clean up in the node's own process or, where that is gone or hangs, in a new one."""
        if not await self._stopped():
            if not manager_of(self._request.stack).run_order()[CLEAN_UP]:
                return []
            request = self._request
            if self.reply is not None:
                request = replace(request, custom_data=self.reply.custom_data)
            self._earlier, self._calls = self.trace, []
            self._actor = self._start(request, _ATTEMPTS)
        started = sorted({call.callback for call in self._earlier})
        answer = self._actor.clean_up.remote(error, started)
        limit = self._request.stack.time_limits.on_init_failed
        outcome: CleanUp = await asyncio.wait_for(answer, limit and limit + _START_S)
        self._calls = outcome.trace
        return outcome.failures

    async def _stopped(self) -> bool:
        """Stop what the node's process does, and return whether it is there and answers."""
        from ray.exceptions import RayError

        if self._actor is not None:
            try:
                await asyncio.wait_for(self._actor.stop.remote(), _STOP_S)
            except RayError:
                self._actor = None
            except TimeoutError:
                logger.warning("killing the process on node %s, which does not stop", self.node)
                self._kill()
        return self._actor is not None

    def end(self) -> None:
        """Let the node's process end, once the initialization has; nothing runs in it any more."""
        self._actor = None  # the last handle: Ray lets the process exit in order

    def _kill(self) -> None:
        import ray

        if self._actor is not None:
            with contextlib.suppress(Exception):  # of an actor that has gone in the meantime
                ray.kill(self._actor)
            self._actor = None


def _innermost(calls: list[TraceEntry], outcome: str) -> TraceEntry | None:
    found = (call for call in reversed(calls) if call.outcome == outcome and not call.background)
    return next(found, None)
