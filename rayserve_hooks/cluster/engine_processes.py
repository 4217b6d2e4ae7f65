"""The hooks in the engine's own processes, seen from the replica: prepared, watched, collected."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

from rayserve_hooks.cluster import _ray, _vllm
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report, mark_of
from rayserve_hooks.cluster.node_actor import FolderActor
from rayserve_hooks.cluster.remote_node import RemoteNode
from rayserve_hooks.cluster.travel import engine_request_for
from rayserve_hooks.cluster.vllm_plugin import MARK
from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import entry_error, step_error
from rayserve_hooks.core.hooks import ENGINE_PROCESS
from rayserve_hooks.core.log import fields, logger
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.core.running import call_hook, with_background
from rayserve_hooks.errors import HookError, Phase, describe, raise_from

_LOOK_EVERY_S = 0.25
_ANSWER_S = 10.0  # of another node, once something has failed


class EngineProcesses:
    """What ``on_before_engine_init`` needs in one start of a replica; nothing without such a hook.

    Args:
        manager: The replica's manager.
        ctx: The replica's context; ``ctx.engine`` is set before `collect`.
        others: The other nodes of the initialization, whose processes keep the nodes' folders until
            `remove`. Where a callback has initialized the nodes itself, each gets a process for
            that alone.
    """

    def __init__(
        self, manager: PluginManager, ctx: CallbackCtx, others: Sequence[RemoteNode]
    ) -> None:
        self._manager, self._ctx, self._others = manager, ctx, others
        self._folder: EngineFolder | None = None
        self._actors: dict[NodeInfo, Any] = {}

    async def prepare(self) -> None:
        """Set the mark, make the folders, and run the hook in this process.

        Outside of a replica, where no engine follows, nothing happens.

        Raises:
            HookError: A callback has failed, or vLLM would not run the hook in its processes.
        """
        ctx, callbacks = self._ctx, self._manager.run_order()[ENGINE_PROCESS]
        if not callbacks or ctx.process.role != "replica":
            return
        problem = _vllm.problem_here()
        if problem:
            raise _impossible(ctx.node, problem)
        try:
            await self._make_folders(callbacks)
            await threads.run_in_thread(_vllm.load_general_plugins)
            call = call_hook(self._manager, ENGINE_PROCESS, ctx)
            await with_background(self._manager, ctx, call)
        except BaseException:
            await self.remove()
            raise

    async def _make_folders(self, callbacks: Sequence[str]) -> None:
        ctx, stack = self._ctx, self._manager.stack
        token = secrets.token_hex(16)
        # Only these are built there: the others' constructors have nothing to do in the engine.
        entries = tuple(entry for entry in stack.entries if entry.name in callbacks)
        there = replace(stack, entries=entries)
        data = await threads.run_in_thread(engine_request_for, ctx, there)
        mark = mark_of(token, ctx.node.id)
        self._folder = await threads.run_in_thread(EngineFolder.make, mark, (ctx.node, data))
        actors = {other.node: other.actor for other in self._others}
        if ctx.handled is not None:  # no other node has been initialized by us
            group: Any = ctx.placement_group
            nodes = await threads.run_in_thread(_ray.nodes_of, group)
            actors = {node: None for node in nodes if not node.is_local}
        for node, actor in actors.items():
            self._actors[node] = actor or _start_actor(node, ctx.runtime_env)
        made = (
            _ask(node, actor.make_engine_folder.remote(mark_of(token, node.id), (node, data)))
            for node, actor in self._actors.items()
        )
        for node, problem in zip(self._actors, await asyncio.gather(*made), strict=True):
            if problem:
                raise _impossible(node, problem)
        os.environ[MARK] = mark
        self._set_mark({MARK: mark})

    def _set_mark(self, mark: Mapping[str, str]) -> None:
        """Set the mark for what gets the runtime environment: Ray's workers and tasks."""
        env = dict(self._ctx.runtime_env)
        others = {name: env["env_vars"][name] for name in env.get("env_vars") or {} if name != MARK}
        env["env_vars"] = others | dict(mark)
        recorder_of(self._ctx).adopt(runtime_env=env)

    async def watch(self) -> NoReturn:
        """Raise the error that a process reports, as soon as it does; for ever if none does.

        Raises:
            HookError: A callback has failed in a process, or that was killed in a hook.
        """
        while self._folder is not None:
            failure = await threads.run_in_thread(self._failure)
            if failure is not None:
                raise_from(failure, failure.__cause__)
            await asyncio.sleep(_LOOK_EVERY_S)
        await asyncio.Event().wait()
        raise AssertionError

    async def collect(self) -> None:
        """Add the calls of all processes to the trace, and raise if one has not run the hook.

        Raises:
            HookError: A process has not run the hook, or a callback has failed there.
        """
        if self._folder is None:
            return
        reports, lost = await threads.run_in_thread(self._look)
        add_calls(self._ctx, reports)
        failure = failure_in(reports) or lost
        if failure is not None:
            raise_from(failure, failure.__cause__)
        missing = self._missing(reports)
        if missing:
            raise self._not_run(missing)

    def _missing(self, reports: Sequence[Report]) -> list[str]:
        """Return the processes that have not run the hook, such as ``"worker 1"``."""
        missing = _vllm.processes_of(self._ctx.engine)
        if _ray.engine_config_is_made_by_a_task(self._ctx.llm_config):
            missing[_vllm.CONFIG, None] += 1
        missing -= Counter((report.process.role, report.process.rank) for report in reports)
        for report in reports:  # such of which the rank is not known
            same_role = [key for key in missing if key[0] == report.process.role]
            if report.process.rank is None and report.process.role == _vllm.WORKER and same_role:
                missing -= Counter(same_role[:1])
        names = (role if rank is None else f"{role} {rank}" for role, rank in missing.elements())
        return sorted(names)

    def _not_run(self, missing: Sequence[str]) -> HookError:
        processes = " and ".join(missing)
        failure = step_error(
            self._ctx,
            Phase.BEFORE_ENGINE_INIT,
            f"{ENGINE_PROCESS} has not run in {processes}: vLLM has not loaded its plugin "
            f"{_vllm.PLUGIN!r} there; see the log of that process for 'Failed to load plugin', and "
            f"whether {_vllm.PLUGINS_VARIABLE} is set or rayserve_hooks is missing there",
        )
        failure.process = missing[0]
        return failure

    def failure(self) -> HookError | None:
        """Return what a process has reported as its failure, if any has; waits for other nodes."""
        if self._folder is None:
            return None
        # Ray warns of waiting for it where an event loop runs, which a thread of its own has not.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._failure).result()

    def _failure(self) -> HookError | None:
        reports, lost = self._look()
        return failure_in(reports) or lost

    def _look(self) -> tuple[list[Report], HookError | None]:
        """Return what all processes have reported, and the error of a node that does not answer.

        It blocks while it asks the other nodes.
        """
        import ray
        from ray.exceptions import RayError

        folder, lost = self._folder, None
        reports = [] if folder is None else folder.reports()
        answers = {node: actor.engine_reports.remote() for node, actor in self._actors.items()}
        for node, answer in answers.items():
            try:
                reports.extend(ray.get(answer, timeout=_ANSWER_S))
            except RayError as error:
                lost = _lost(node, error)
                lost.__cause__ = error
        return reports, lost

    async def remove(self) -> None:
        """Remove the folders and the mark; again does nothing."""
        folder, self._folder = self._folder, None
        if folder is None:
            return
        os.environ.pop(MARK, None)
        self._set_mark({})
        await threads.run_in_thread(folder.remove)
        actors, self._actors = self._actors, {}  # the last handles: Ray lets the processes exit
        answers = [actor.remove_engine_folder.remote() for actor in actors.values()]
        if answers:
            done = asyncio.gather(*answers, return_exceptions=True)
            try:
                await asyncio.wait_for(done, _ANSWER_S)
            except TimeoutError:
                text = "a node does not answer, and keeps a folder that its next start removes"
                logger.warning(text, extra=fields(node=self._ctx.node.id))


def _start_actor(node: NodeInfo, runtime_env: Mapping[str, Any]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(FolderActor)
    here = NodeAffinitySchedulingStrategy(node.id, soft=False)
    return actor.options(
        num_cpus=0, scheduling_strategy=here, runtime_env=dict(runtime_env)
    ).remote()


def add_calls(ctx: CallbackCtx, reports: Sequence[Report]) -> None:
    """Add the calls of the engine's processes to the replica's trace, process after process."""
    order = _vllm.ROLES.index
    for report in sorted(reports, key=lambda r: (order(r.process.role), r.process.rank or 0)):
        ctx.trace.extend(report.trace)


def failure_in(reports: Sequence[Report]) -> HookError | None:
    """Return the first failure; a callback's own comes before a process that was killed."""
    for report in reports:
        if report.error is not None:
            return report.error
    for report in reports:
        if report.killed:
            running = (call for call in reversed(report.trace) if call.outcome == "running")
            detail = "its process was killed; see the replica's log and the node's memory"
            call = next(running, None)
            failure = entry_error(call, report.node, Phase.BEFORE_ENGINE_INIT, detail)
            failure.process = str(report.process)
            return failure
    return None


def _impossible(node: NodeInfo, problem: str) -> HookError:
    detail = f"{ENGINE_PROCESS} cannot run in the engine's processes: {problem}"
    return entry_error(None, node, Phase.BEFORE_ENGINE_INIT, detail)


async def _ask(node: NodeInfo, answer: Awaitable[str]) -> str:
    from ray.exceptions import RayError

    try:
        return await answer
    except RayError as error:
        raise_from(_lost(node, error), error)


def _lost(node: NodeInfo, error: Exception) -> HookError:
    raised = getattr(error, "cause", None)
    detail = f"the process there that keeps what the engine needs: {describe(raised or error)}"
    return entry_error(None, node, Phase.BEFORE_ENGINE_INIT, detail)
