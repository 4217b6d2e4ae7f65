"""The actor that initializes another node, in a process of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from rayserve_hooks.cluster import _vllm, travel
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report
from rayserve_hooks.cluster.node import initialize_this_node
from rayserve_hooks.cluster.ray_callback import unpack_instances
from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import entry_error
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.running import clean_up, with_background
from rayserve_hooks.errors import HookError, Phase, describe, raise_from
from rayserve_hooks.trace import TraceEntry

# Long enough for a replica on a busy machine. One that is gone takes this process along.
_RECEIPT_S = 10.0
_GIVE_UP_S = 2.0


class FolderActor:
    """Keeps this node's folder of a start, for the engine's processes on this node."""

    _engine_folder: EngineFolder | None = None

    async def make_engine_folder(self, mark: str, request: object) -> str:
        """Make the folder, and return why vLLM would not run hooks on this node; "" if it will."""
        problem = _vllm.problem_here()
        if not problem:
            make = EngineFolder.make
            self._engine_folder = await threads.run_in_thread(make, mark, request)
        return problem

    async def engine_reports(self) -> list[Report]:
        """Return what the engine's processes on this node have reported."""
        folder = self._engine_folder
        return [] if folder is None else await threads.run_in_thread(folder.reports)

    async def remove_engine_folder(self) -> None:
        """Remove the folder."""
        folder, self._engine_folder = self._engine_folder, None
        if folder is not None:
            await threads.run_in_thread(folder.remove)


class NodeActor(FolderActor):
    """Initializes its node, says meanwhile what it does, and cleans up on the same instances.

    ``attempt`` is how often the node's process was started, for the trace.
    """

    def __init__(self, request: travel.NodeRequest, attempt: int) -> None:
        self._request, self._attempt = request, attempt
        self._phase: Phase | None = None
        self._ctx: CallbackCtx | None = None
        self._stage: asyncio.Task[travel.NodeReply] | None = None
        self._error: BaseException | None = None
        self._reports = _Reports()

    async def initialize(self) -> travel.NodeReply:
        """Run the node's stage; when it fails nothing is cleaned up yet."""
        self._stage = asyncio.create_task(self._run())
        try:
            return await self._stage
        except asyncio.CancelledError as error:
            self._error = self._error or error
            raise
        except Exception as error:
            # Ours, since Ray has its own ways with one that cannot be rebuilt in the replica.
            if isinstance(error, HookError):
                ours = error
            else:
                ours = self._step_error(describe(error), error)
            self._error = self._error or ours
            raise_from(ours, ours.__cause__)
        finally:
            self._reports.close()

    async def _run(self) -> travel.NodeReply:
        request = self._request
        # In a thread, as all that runs code of callbacks: here it could block or end this loop.
        ctx = await threads.run_in_thread(travel.context_of, request, self._attempt, self._on_call)
        self._ctx = ctx
        manager = await threads.run_in_thread(manager_of, request.stack)
        await threads.run_in_thread(unpack_instances, manager, ctx, request.instances)
        stage = initialize_this_node(manager, ctx, request.source, self._on_phase)
        result = await with_background(manager, ctx, stage)
        custom_data = await threads.run_in_thread(
            travel.pack_custom_data, ctx, request.custom_data_setters
        )
        return travel.NodeReply(result, custom_data, ctx.extra_init_kwargs, list(ctx.trace))

    async def status(self, seen: int) -> travel.NodeStatus:
        """Wait for news since the status with the number ``seen``; 0 before the first."""
        number = await threads.run_in_thread(self._reports.after, seen)
        return travel.NodeStatus(number, self._phase, list(self._ctx.trace) if self._ctx else [])

    async def stop(self) -> bool:
        """Cancel the node's stage if it still runs, and return whether it had begun.

        Returns soon, unless the process hangs.
        """
        self._reports.close()  # the replica asks no more
        if self._stage is None or self._stage.done():
            return self._phase is not None
        self._stage.cancel()
        await asyncio.wait([self._stage], timeout=_GIVE_UP_S)
        detail = "stopped, because the initialization has failed elsewhere or was cancelled"
        self._error = self._step_error(detail)
        return self._phase is not None

    async def clean_up(
        self, error: BaseException, started: Sequence[str], *, followed: bool = False
    ) -> travel.CleanUp:
        """Run ``on_init_failed``, with ``error`` unless the initialization has failed here.

        ``started`` names the callbacks that had started in another process of this node;
        ``followed`` is whether somebody asks for the status meanwhile.
        """
        self._reports.reopen(awaited=followed)
        try:
            if self._ctx is None:
                self._ctx = await threads.run_in_thread(
                    travel.context_of, self._request, self._attempt, self._on_call
                )
            manager = await threads.run_in_thread(manager_of, self._request.stack)
            failures = await clean_up(manager, self._ctx, self._error or error, started)
            return travel.CleanUp(failures, list(self._ctx.trace))
        finally:
            self._reports.close()

    def _step_error(self, detail: str, cause: BaseException | None = None) -> HookError:
        phase = self._phase or Phase.BEFORE_DOWNLOAD
        node, known = self._request.node, self._request.fields
        return entry_error(None, node, phase, detail, cause=cause, known=known)

    def _on_call(self, _: TraceEntry) -> None:
        self._reports.add()
        self._reports.wait_received()  # this may be the last that the replica hears

    def _on_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._reports.add()


class _Reports:
    """Counts what there is to report, and knows what has been received.

    One for all calls of an actor: Ray begins those of one with an event loop in any order, so the
    question for a status may be there before what it is about.
    """

    def __init__(self) -> None:
        self._awaited = True  # whether somebody asks
        self._changed = threading.Condition()
        self._added = self._received = 0
        self._closed = False

    def add(self) -> None:
        with self._changed:
            self._added += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closed = True
        self.add()

    def reopen(self, *, awaited: bool) -> None:
        """Let wait again; ``awaited`` is whether somebody is going to ask."""
        with self._changed:
            self._awaited, self._closed = awaited, False

    def after(self, seen: int) -> int:
        """Note that ``seen`` have been received, wait for more, and return how many there are."""
        with self._changed:
            self._awaited, self._received = True, seen
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._added > seen or self._closed)
            return self._added

    def wait_received(self) -> None:
        """Wait until everything so far has been received; in vain once, until it asks again."""
        with self._changed:
            number = self._added
            if self._awaited:
                self._awaited = self._changed.wait_for(
                    lambda: self._received >= number or self._closed, _RECEIPT_S
                )
