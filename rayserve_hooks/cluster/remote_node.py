"""The other nodes' part of an initialization, seen from the replica: started, followed, ended."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from dataclasses import replace
from typing import Any

from rayserve_hooks.cluster.node_actor import NodeActor
from rayserve_hooks.cluster.travel import CleanUp, NodeReply, NodeRequest
from rayserve_hooks.context import NodeInfo
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

    Args:
        request: What travels to the node.
        runtime_env: The runtime environment of its process.

    Attributes:
        node: The node.
        phase: Its step; None until it starts.
        reply: What it sent back; None until it has ended well.
    """

    def __init__(self, request: NodeRequest, runtime_env: dict[str, Any]) -> None:
        self.node: NodeInfo = request.node
        self.phase: Phase | None = None
        self.reply: NodeReply | None = None
        self._request = request
        self._runtime_env = copy.deepcopy(runtime_env)
        self._earlier: list[TraceEntry] = []  # of processes that were killed
        self._killed_in: TraceEntry | None = None
        self._calls: list[TraceEntry] = []
        self._taken = 0
        self._actor: Any = None
        self._initializing = asyncio.ensure_future(self._initialize())

    @property
    def ended(self) -> bool:
        return self._initializing.done()

    @property
    def running(self) -> TraceEntry | None:
        """The call that is running there, the innermost one, as far as it is known here."""
        calls = reversed(self._calls)
        return next((c for c in calls if c.outcome == "running" and not c.background), None)

    def take_trace(self) -> list[TraceEntry]:
        """Return the calls made there, in order, without those returned before."""
        calls = self._all_calls()[self._taken :]
        self._taken += len(calls)
        return calls

    def _all_calls(self) -> list[TraceEntry]:
        """One of which the end was never heard, because its process was stopped, is interrupted."""
        calls = [*self._earlier, *self._calls]
        for call in calls:
            if call.outcome == "running":
                call.outcome = "interrupted"
        return calls

    async def wait(self) -> NodeReply:
        """Wait for the reply.

        Raises:
            HookError: The node's initialization failed, its process was killed or it died.
        """
        return await asyncio.shield(self._initializing)

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
                self._killed_in = self.running or self._killed_in
                self._earlier, self._calls = self._all_calls(), []
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
        return actor.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=self.node.id, soft=False),
            runtime_env=self._runtime_env,
        ).remote(request, attempt)

    async def _follow(self, actor: Any) -> NodeReply:
        """Wait for the reply, and keep what is heard meanwhile."""
        from ray.exceptions import RayError

        name = f"rayserve_hooks:{self._request.stack.deployment}:{self.node.address}"
        reply = asyncio.ensure_future(_answer(actor.initialize.options(name=name).remote()))
        seen = 0
        status: asyncio.Future[Any] | None = None
        try:
            while not reply.done():
                status = asyncio.ensure_future(_answer(actor.status.remote(seen)))
                await asyncio.wait([reply, status], return_when=asyncio.FIRST_COMPLETED)
                if not status.done() or isinstance(status.exception(), RayError):
                    break  # the reply is there, or will say why
                heard = status.result()
                seen, self.phase, self._calls = heard.number, heard.phase, heard.trace
            return await reply  # type: ignore[no-any-return]
        finally:
            for answer in filter(None, (reply, status)):
                answer.cancel()

    def _failed(self, detail: str) -> HookError:
        running = self.running or self._killed_in
        return HookError(
            callback=running.callback if running else None,
            hook=running.hook if running else None,
            node=str(self.node),
            phase=self.phase or Phase.BEFORE_DOWNLOAD,
            detail=detail,
        )

    async def clean_up(self, error: BaseException) -> list[HookError]:
        """Stop what still runs on the node, and run ``on_init_failed`` if anything had started.

        Args:
            error: What ended the initialization.

        Returns:
            What failed in it.
        """
        self._initializing.cancel()
        await asyncio.wait([self._initializing])
        if not self._initializing.cancelled():
            self._initializing.exception()  # has been reported, or follows from what was
        try:
            if self.phase is None and self.reply is None:
                return []
            outcome = await self._cleaned_up(error)
        finally:
            self._kill()
        if isinstance(outcome, CleanUp):
            return outcome.failures
        failure = HookError(
            node=str(self.node),
            phase=Phase.CLEAN_UP,
            detail=f"on_init_failed did not run: {describe(outcome)}",
        )
        logger.error("%s", failure)
        return [failure]

    async def _cleaned_up(self, error: BaseException) -> CleanUp | BaseException:
        """Clean up in the node's own process or, where that is gone or hangs, in a new one."""
        from ray.exceptions import RayError, RayTaskError

        limit = self._request.stack.time_limits.on_init_failed
        if not await self._stopped():
            if not manager_of(self._request.stack).run_order()[CLEAN_UP]:
                return CleanUp([], [])
            request = self._request
            if self.reply is not None:
                request = replace(request, custom_data=self.reply.custom_data)
            self._earlier, self._calls = self._all_calls(), []
            self._actor = self._start(request, _ATTEMPTS)
        started = sorted({call.callback for call in self._earlier})
        try:
            outcome: CleanUp = await asyncio.wait_for(
                _answer(self._actor.clean_up.remote(error, started)),
                None if limit is None else limit + _START_S,
            )
        except RayTaskError as problem:
            return problem.cause  # type: ignore[no-any-return]
        except (RayError, TimeoutError) as problem:
            return problem
        self._calls = outcome.trace
        return outcome

    async def _stopped(self) -> bool:
        """Stop what the node's process does, and return whether it is there and answers."""
        from ray.exceptions import RayError

        if self._actor is None:
            return False
        try:
            await asyncio.wait_for(_answer(self._actor.stop.remote()), _STOP_S)
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


async def _answer(ref: Any) -> Any:
    return await ref
