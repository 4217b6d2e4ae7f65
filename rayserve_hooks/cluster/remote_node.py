"""The other nodes' part of an initialization: one Ray task on each, followed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rayserve_hooks.cluster.node import (
    CleanUp,
    NodeReply,
    NodeRequest,
    run_clean_up_task,
    run_fetch_task,
    run_node_task,
)
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.core.manager import get_plugin_manager
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.hookspecs import CLEAN_UP
from rayserve_hooks.trace import LOGGER_NAME, TraceEntry

logger = logging.getLogger(LOGGER_NAME)

_RETRIES = 1  # of a task whose process was killed, for example for want of memory
_STOP_S = 10.0
_CLEAN_UP_START_S = 60.0  # on top of the hook's own limit: a new worker process has to start


class NodeTask:
    """The initialization of another node.

    Its process ends with it (``max_calls=1``): what a callback imported, hung or leaked there must
    not stay with the next deployment that Ray would give the process to.

    Args:
        request: What travels to the node.
        runtime_env: The runtime environment of the task.

    Attributes:
        node: The node.
        phase: Its step; None until it starts.
        reply: What it sent back; None until it has ended well.
    """

    def __init__(self, request: NodeRequest, runtime_env: dict[str, Any]) -> None:
        self.node: NodeInfo = request.node
        self.phase: str | None = None
        self.reply: NodeReply | None = None
        self._request = request
        self._runtime_env = copy.deepcopy(runtime_env)
        self._calls: dict[int, TraceEntry] = {}
        self._cleaned_up = False
        self._cancelled = False
        self._stream = self._remote(run_node_task, "", num_returns="streaming").remote(request)
        self._following = asyncio.ensure_future(self._follow())

    def _remote(self, function: Any, suffix: str, **options: Any) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return ray.remote(max_calls=1, max_retries=_RETRIES)(function).options(
            name=f"rayserve_hooks:{self._request.stack.deployment}:{self.node.address}{suffix}",
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=self.node.id, soft=False),
            runtime_env=self._runtime_env,
            **options,
        )

    @property
    def ended(self) -> bool:
        return self._following.done()

    @property
    def running(self) -> TraceEntry | None:
        """The call that is running there, the innermost one, as far as it is known here."""
        calls = (self._calls[place] for place in sorted(self._calls, reverse=True))
        return next((c for c in calls if c.outcome == "running" and not c.background), None)

    def take_trace(self) -> list[TraceEntry]:
        """Give the calls made there, in order; each is given once, so ask when no more will come.

        One of which the end was never heard, because its process was stopped, is interrupted.
        """
        calls = [self._calls[place] for place in sorted(self._calls)]
        self._calls.clear()
        for call in calls:
            if call.outcome == "running":
                call.outcome = "interrupted"
        return calls

    async def wait(self) -> NodeReply:
        """Wait for the reply.

        Raises:
            HookError: The node's initialization failed, its process was killed or it died.
        """
        return await asyncio.shield(self._following)

    async def _follow(self) -> NodeReply:
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        try:
            async for ref in self._stream:
                item = await ref
                if isinstance(item, NodeReply):
                    self._calls = dict(enumerate(item.trace))
                    self.reply = item
                    return item
                self.phase = item.phase
                self._calls.update(item.calls)
            raise self._failed("its task ended without a reply; see the logs of that node")
        except TaskCancelledError as error:
            self._cleaned_up = self._cancelled = True
            raise self._failed("its task was cancelled by somebody else") from error
        except RayTaskError as error:
            self._cleaned_up = True
            if isinstance(error.cause, HookError):
                raise error.cause from error.cause.__cause__
            raise self._failed(describe(error.cause)) from error
        except RayError as error:
            raise self._failed(
                f"its process was killed or the node died: {describe(error)}"
            ) from error

    def _failed(self, detail: str) -> HookError:
        running = self.running
        return HookError(
            callback=running.callback if running else None,
            hook=running.hook if running else None,
            node=str(self.node),
            phase=self.phase or "before download",
            detail=detail,
        )

    async def stop(self) -> None:
        """End the task: let its callbacks clean up, and kill its process if that takes too long."""
        import ray

        if self.ended:
            return
        limit = self._request.stack.time_limits.on_init_failed or 0.0
        for force, patience_s in (False, _STOP_S + limit), (True, _STOP_S):
            if force:
                logger.warning("killing the task on node %s, which does not stop", self.node)
            ray.cancel(self._stream, force=force)
            done, _ = await asyncio.wait([self._following], timeout=patience_s)
            if done:
                if force:  # a killed process has cleaned up nothing
                    self._cleaned_up = self._cancelled = False
                return

    async def clean_up(self, error: BaseException) -> list[HookError]:
        """Run ``on_init_failed`` on the node, unless its task has done so itself or never began.

        Returns:
            What failed in it.
        """
        with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            self._following.exception()  # has been reported, or follows from what was
        if self.phase is None and self.reply is None:
            return []
        request = self._request
        if self._cancelled:
            if not get_plugin_manager(request.stack).run_order()[CLEAN_UP]:
                return []
            outcome = await self._on_node(run_fetch_task, "fetch", request)
            if isinstance(outcome, CleanUp):
                self._calls.clear()
        elif self._cleaned_up:
            return []
        else:
            if self.reply is not None:
                request = replace(request, custom_data=self.reply.custom_data)
            calls = self.reply.trace if self.reply else self._calls.values()
            started = {call.callback for call in calls}
            outcome = await self._on_node(run_clean_up_task, "clean-up", request, error, started)
        if isinstance(outcome, CleanUp):
            first = max(self._calls, default=-1) + 1
            self._calls.update(enumerate(outcome.trace, first))
            return outcome.failures
        problem = "on_init_failed did not run"
        if self._cancelled:
            problem = "what on_init_failed did there is not known, see the logs of that node"
        failure = HookError(
            callback=None,
            hook=None,
            node=str(self.node),
            phase="clean-up",
            detail=f"{problem}: {describe(outcome)}",
        )
        logger.error("%s", failure)
        return [failure]

    async def _on_node(
        self, function: Callable[..., CleanUp], name: str, *args: object
    ) -> CleanUp | Exception:
        """Run a task of the clean-up, in a new process on the node."""
        from ray.exceptions import RayError, RayTaskError

        limit = self._request.stack.time_limits.on_init_failed
        task = self._remote(function, f":{name}").remote(*args)
        try:
            outcome: CleanUp = await asyncio.wait_for(
                task, None if limit is None else limit + _CLEAN_UP_START_S
            )
        except RayTaskError as problem:
            return problem.cause  # type: ignore[no-any-return]
        except (RayError, TimeoutError) as problem:
            return problem
        return outcome
