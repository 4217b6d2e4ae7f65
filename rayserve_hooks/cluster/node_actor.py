"""The actor that initializes another node, in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from rayserve_hooks.cluster.node import initialize_this_node
from rayserve_hooks.cluster.travel import (
    CleanUp,
    NodeReply,
    NodeRequest,
    NodeStatus,
    context_of,
    pack_custom_data,
)
from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core import threads
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.running import clean_up, with_background
from rayserve_hooks.errors import HookError, Phase
from rayserve_hooks.trace import TraceEntry

T = TypeVar("T")

_RECEIPT_S = 0.5
_GIVE_UP_S = 2.0


class NodeActor:
    """Initializes its node, says meanwhile what it does, and cleans up on the same instances.

    Its methods run at the same time, on Ray's event loop; the hooks run on loop and threads of
    this package, so that a callback that blocks its loop does not hold up an answer.

    Args:
        request: What travels to the node.
        attempt: How often the node's process was started, for the trace.
    """

    def __init__(self, request: NodeRequest, attempt: int) -> None:
        self._request, self._attempt = request, attempt
        self._phase: Phase | None = None
        self._ctx: CallbackCtx | None = None
        self._stage: asyncio.Task[NodeReply] | None = None
        self._error: BaseException | None = None
        self._reports = _Reports()

    async def initialize(self) -> NodeReply:
        """Run the node's stage.

        Raises:
            HookError: A callback or the download failed. Nothing is cleaned up yet.
        """
        return await _on_process_loop(self._initialize())

    async def status(self, seen: int) -> NodeStatus:
        """Return what has happened since a report; wait until there is something to say.

        Args:
            seen: Number of the last status that was received; 0 before the first.
        """
        number = await self._reports.after(seen)
        return NodeStatus(number, self._phase, list(self._ctx.trace) if self._ctx else [])

    async def stop(self) -> None:
        """Cancel the node's stage if it still runs. Returns soon, unless the process hangs."""
        await _on_process_loop(self._stop())

    async def clean_up(self, error: BaseException, started: Sequence[str]) -> CleanUp:
        """Run ``on_init_failed``.

        Args:
            error: What ended the initialization, if that has not happened here.
            started: Callbacks that had started in another process of this node.
        """
        return await _on_process_loop(self._clean_up(error, started))

    async def _initialize(self) -> NodeReply:
        self._stage = asyncio.create_task(self._run())
        try:
            return await self._stage
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            self._reports.close()

    async def _run(self) -> NodeReply:
        request = self._request
        ctx = self._ctx = context_of(request, self._attempt, self._on_call)
        manager = await threads.run_in_thread(manager_of, request.stack)
        stage = initialize_this_node(manager, ctx, request.source, self._on_phase)
        result = await with_background(manager, ctx, stage)
        return NodeReply(result, pack_custom_data(ctx), ctx.extra_init_kwargs, list(ctx.trace))

    async def _stop(self) -> None:
        if self._stage is None or self._stage.done():
            return
        self._stage.cancel()
        await asyncio.wait([self._stage], timeout=_GIVE_UP_S)
        self._error = HookError(
            node=str(self._request.node),
            phase=self._phase or Phase.BEFORE_DOWNLOAD,
            detail="stopped, because the initialization has failed elsewhere or was cancelled",
        )

    async def _clean_up(self, error: BaseException, started: Sequence[str]) -> CleanUp:
        ctx = self._ctx or context_of(self._request, self._attempt)
        manager = await threads.run_in_thread(manager_of, self._request.stack)
        failures = await clean_up(manager, ctx, self._error or error, started)
        return CleanUp(failures, list(ctx.trace))

    def _on_call(self, _: TraceEntry) -> None:
        # Held up until the replica knows: this may be the last it hears.
        self._reports.wait_received(self._reports.add())

    def _on_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._reports.add()


class _Reports:
    """Counts what there is to report, and knows what has been received."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._added = self._received = 0
        self._next: Future[None] = Future()
        self._closed = False

    def add(self) -> int:
        """Count one more, and return its number."""
        with self._condition:
            self._added += 1
            number, waiting, self._next = self._added, self._next, Future()
        with contextlib.suppress(InvalidStateError):  # of a status call that was cancelled
            waiting.set_result(None)
        return number

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed = True
        self.add()

    async def after(self, seen: int) -> int:
        """Wait for more than ``seen``, and return how many there are."""
        with self._condition:
            self._received = seen
            self._condition.notify_all()
            waiting = None if self._added > seen or self._closed else self._next
        if waiting is not None:
            await asyncio.wrap_future(waiting)
        return self._added

    def wait_received(self, number: int) -> None:
        """Block until a report has arrived, for a while."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._received >= number or self._closed, timeout=_RECEIPT_S
            )


async def _on_process_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(
        asyncio.run_coroutine_threadsafe(coroutine, threads.process_loop())
    )
