"""The other nodes' part of an initialization: one Ray task on each, followed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from dataclasses import replace
from typing import Any

from rayserve_hooks.context import NodeInfo
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.node import (
    NodeReply,
    NodeRequest,
    NodeStatus,
    run_clean_up_task,
    run_node_task,
)
from rayserve_hooks.trace import LOGGER_NAME

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
        status: The last it has said of itself; None until it starts.
        reply: What it sent back; None until it has ended well.
    """

    def __init__(self, request: NodeRequest, runtime_env: dict[str, Any]) -> None:
        self.node: NodeInfo = request.node
        self.status: NodeStatus | None = None
        self.reply: NodeReply | None = None
        self._request = request
        self._runtime_env = copy.deepcopy(runtime_env)
        self._cleaned_up = False
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
                    self.reply = item
                    return item
                self.status = item
            raise self._failed("its task ended without a reply; see the logs of that node")
        except RayTaskError as error:
            self._cleaned_up = True
            if isinstance(error.cause, HookError):
                raise error.cause from error.cause.__cause__
            raise self._failed(describe(error)) from error
        except TaskCancelledError as error:
            self._cleaned_up = True
            raise self._failed("it was cancelled") from error
        except RayError as error:
            raise self._failed(
                f"its process was killed or the node died: {describe(error)}"
            ) from error

    def _failed(self, detail: str) -> HookError:
        running = self.status.running if self.status else None
        return HookError(
            callback=running.callback if running else None,
            hook=running.hook if running else None,
            node=str(self.node),
            phase=self.status.phase if self.status else "before download",
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
                # A killed process has cleaned up nothing.
                self._cleaned_up &= not force
                return

    async def clean_up(self, error: BaseException) -> list[HookError]:
        """Run ``on_init_failed`` on the node, unless its task has done so itself or never began.

        Returns:
            What failed in it.
        """
        from ray.exceptions import RayError

        with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            self._following.exception()  # has been reported, or follows from what was
        started = self.status.started if self.status else ()
        if self._cleaned_up or (self.status is None and self.reply is None):
            return []
        request = self._request
        if self.reply is not None:
            request = replace(request, custom_data=self.reply.custom_data)
            started = tuple(entry.callback for entry in self.reply.trace)
        limit = request.stack.time_limits.on_init_failed
        task = self._remote(run_clean_up_task, ":clean-up")
        try:
            failures = await asyncio.wait_for(
                task.remote(request, error, started),
                None if limit is None else limit + _CLEAN_UP_START_S,
            )
        except (RayError, TimeoutError) as problem:
            failure = HookError(
                callback=None,
                hook=None,
                node=str(self.node),
                phase="clean-up",
                detail=f"on_init_failed did not run: {describe(problem)}",
            )
            logger.error("%s", failure)  # noqa: TRY400 - the text has the cause
            return [failure]
        return list(failures)
