"""The node-initialization path: from a config to nodes on which the engine can start."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.node import (
    ModelSource,
    NodeReply,
    clean_up,
    initialize_this_node,
    request_for,
    time_limit,
    unpack,
    with_background,
)
from rayserve_hooks.cluster.remote_node import NodeTask
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeResult
from rayserve_hooks.core import threads as aio
from rayserve_hooks.core.manager import get_plugin_manager, stack_of
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.hookspecs import PHASES
from rayserve_hooks.trace import LOGGER_NAME, TraceEntry

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(LOGGER_NAME)

T = TypeVar("T")

_LOG_EVERY_S = 5.0


async def initialize_node(
    config: LLMConfig, *, placement_group: PlacementGroup | None = None
) -> CallbackCtx:
    """Initialize all nodes of a deployment, with its callbacks.

    Inside a Serve replica `HooksCallback` calls this; anywhere else connect to Ray first.
    Synchronous callbacks run in a thread, so the calling event loop stays free.

    Args:
        config: An ``LLMConfig`` of this package or, configured with ``HooksCallback``, of Ray.
            Its engine config gets the model path and the callbacks' ``extra_init_kwargs``.
        placement_group: The group that callbacks find in the context; by default the one this
            process runs in, which in a replica is Serve's. Without either, and unless a callback
            supplies one, the config's default group is created.

    Returns:
        The context after ``on_after_init``: ``nodes``, ``trace``, ``placement_group`` and what
        the callbacks left in the other fields.

    Raises:
        CallbackConfigError: The config's callbacks cannot be loaded.
        HookError: A callback or a node failed. Tasks on other nodes are cancelled, and a
            placement group created here is removed.
    """
    initialization = _Initialization(config, placement_group)
    return await initialization.run()


class _Initialization:
    """One initialization, and how far it has come."""

    def __init__(self, config: LLMConfig, placement_group: PlacementGroup | None) -> None:
        stack = stack_of(config)
        self.manager = get_plugin_manager(stack)
        self.limits = stack.time_limits
        self.deployment = stack.deployment
        self.ctx = _new_context(config, placement_group or _ray.current_placement_group())
        self.environment = _Environment(self.ctx)
        self.phase = "before init"
        self.tasks: list[NodeTask] = []
        self.created: PlacementGroup | None = None
        self.started = time.perf_counter()

    async def run(self) -> CallbackCtx:
        log = asyncio.create_task(self._log_still_running())
        try:
            async with time_limit("total", self.limits.total, self.ctx, "total"):
                await self._run_hooks()
        except BaseException as raised:  # whatever ends the initialization, it is cleaned up
            error = self._as_hook_error(raised)
            await self._fail(error)
            if error is raised:
                raise
            raise error from raised
        finally:
            log.cancel()
        self._log_summary()
        return self.ctx

    async def _run_hooks(self) -> None:
        ctx = self.ctx
        await with_background(self.manager, ctx, self._make_nodes_ready())
        here = ctx._nodes.get(ctx.node.id)
        if here is not None:  # only now no background task adds to it any more
            ctx._nodes[ctx.node.id] = replace(here, custom_data=dict(ctx.custom_data))
        self.phase = "engine arguments"
        _set_model_path(ctx)
        _set_engine_kwargs(ctx)
        self.phase = "after init"
        await with_background(self.manager, ctx, self._call("on_after_init"))
        self.phase = "engine arguments"
        _set_engine_kwargs(ctx)
        self.environment.export(ctx)

    async def _call(self, hook: str) -> Any:
        limit = getattr(self.limits, hook)
        async with time_limit(hook, limit, self.ctx, PHASES[hook]):
            return await aio.run_in_thread(getattr(self.manager.hook, hook), ctx=self.ctx)

    async def _make_nodes_ready(self) -> None:
        before = self.ctx.placement_group
        self.ctx._take_over(await self._call("on_before_init"))
        self.environment.export(self.ctx)
        self.phase = "placement"
        _warn_of_reserved(self.ctx, before)
        group, self.created = await _ensure_placement_group(self.ctx)
        if self.ctx.handled is None:
            await self._initialize_nodes(group)

    async def _initialize_nodes(self, group: PlacementGroup) -> None:
        """Initialize every node at once: this one in a thread, the others as Ray tasks."""
        ctx = self.ctx
        nodes = await aio.run_in_thread(_ray.nodes_of, group)
        if ctx.node not in nodes and _ray.in_replica():
            # The engine's core runs in the replica's process and reads the model's config and
            # tokenizer there, also when a callback has placed the workers elsewhere.
            nodes.insert(0, ctx.node)
        source = ModelSource(*_ray.model_source(ctx.llm_config))
        others = [node for node in nodes if not node.is_local]
        self.phase = "before download"
        if others:
            from ray import cloudpickle

            config = cloudpickle.dumps(ctx.llm_config)
            for node in others:
                request = request_for(node, ctx, self.manager.stack, source, config)
                self.tasks.append(NodeTask(request, ctx.runtime_env))
        waits: list[Awaitable[NodeReply | NodeResult]] = [task.wait() for task in self.tasks]
        if len(others) < len(nodes):
            here = initialize_this_node(self.manager, ctx, source, self._set_phase)
            waits.append(here)
        outcomes = await _all(waits)
        for task in self.tasks:
            ctx.trace.extend(task.take_trace())
        results = {}
        for outcome in outcomes:
            result = _merge(ctx, outcome) if isinstance(outcome, NodeReply) else outcome
            results[result.node.id] = result
        ctx._nodes.update({node.id: results[node.id] for node in nodes})

    def _set_phase(self, phase: str) -> None:
        self.phase = phase

    def _as_hook_error(self, raised: BaseException) -> BaseException:
        """Give every ordinary failure the same form; leave exits and cancellations alone."""
        if isinstance(raised, HookError) and raised.phase == "total":
            waiting = "; ".join(self._running()) or "no node"
            return HookError(
                callback=raised.callback,
                hook=raised.hook,
                node=raised.node,
                phase=self.phase,
                detail=f"{raised.detail}; still running: {waiting}",
            )
        if isinstance(raised, HookError) or not isinstance(raised, Exception):
            return raised
        return HookError(
            callback=None,
            hook=None,
            node=str(self.ctx.node),
            phase=self.phase,
            detail=redact(describe(raised), self.ctx._values),
        )

    async def _fail(self, error: BaseException) -> None:
        """Stop what is running, let the callbacks clean up, and remove what was created."""
        self.phase = "clean-up"
        try:
            await asyncio.gather(*(task.stop() for task in self.tasks))
            failures = await asyncio.gather(*(task.clean_up(error) for task in self.tasks))
            for task in self.tasks:
                self.ctx.trace.extend(task.take_trace())
            here = await clean_up(self.manager, self.ctx, error)
            if isinstance(error, HookError):
                error.cleanup_errors.extend([*itertools.chain(*failures), *here])
        finally:
            if self.created is not None:
                _remove(self.created)
        logger.error(
            "initialization of %s failed after %.2f s; what ran until then:\n%s",
            self.deployment,
            self._seconds(),
            self.ctx.trace.table(),
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    async def _log_still_running(self) -> None:
        while True:
            await asyncio.sleep(_LOG_EVERY_S)
            logger.info(
                "initialization of %s after %.0f s: %s",
                self.deployment,
                self._seconds(),
                "; ".join(self._running()),
            )

    def _running(self) -> list[str]:
        """Say for each node that is not ready what runs there."""
        texts = []
        for task in self.tasks:
            if not task.ended:
                phase = task.phase or "waiting for a worker process"
                texts.append(_doing(phase, task.node, task.running))
        running = self.ctx._running
        if running is not None or not texts:
            texts.append(_doing(self.phase, self.ctx.node, running))
        return texts

    def _log_summary(self) -> None:
        handled = self.ctx.handled
        reason = redact(handled.reason, self.ctx._values) if handled else ""
        logger.info(
            "initialized %s in %.2f s: %d node(s), callbacks %s%s",
            self.deployment,
            self._seconds(),
            len(self.ctx.nodes),
            ", ".join(entry.name for entry in self.manager.stack.entries) or "none",
            f", handled by a callback: {reason or 'no reason given'}" if handled else "",
        )
        logger.debug("%r", self.ctx.trace)


def _doing(phase: str, node: NodeInfo, running: TraceEntry | None) -> str:
    if running is None:
        return f"{phase} on node {node}"
    seconds = time.time() - running.start
    return f"{phase} on node {node}, callback {running.callback!r} for {seconds:.0f} s"


async def _all(awaitables: list[Awaitable[T]]) -> list[T]:
    """Await all at once; at the first failure cancel the others."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


def _warn_of_reserved(ctx: CallbackCtx, before: PlacementGroup | None) -> None:
    """Say what a callback that replaces the group of a replica leaves behind."""
    reserved = _ray.current_placement_group()
    if reserved is None or before is None or ctx.placement_group is before:
        return
    setter = ctx.trace.who_changed("placement_group")
    logger.warning(
        "callback %r replaced the placement group that Ray Serve made for this replica; that one, "
        "bundles %s, stays reserved as long as the replica lives; to have only one, set "
        "placement_group_config of the LLMConfig instead",
        setter.callback if setter else None,
        before.bundle_specs,
    )


def _new_context(config: LLMConfig, group: PlacementGroup | None) -> CallbackCtx:
    mode = _ray.default_download_mode(config)
    return CallbackCtx(
        llm_config=config,
        node=_ray.own_node(),
        role="replica" if _ray.in_replica() else "driver",
        local_node_download_model=mode,
        worker_node_download_model=mode,
        placement_group=group,
        runtime_env=_ray.initial_runtime_env(config),
    )


class _Environment:
    """Brings the variables that callbacks put into ``ctx.runtime_env`` into this process.

    Ray gives them to the per-node tasks and to the engine's Ray workers. The replica's own
    callbacks, and the engine processes it forks, see this process's environment instead.
    """

    def __init__(self, ctx: CallbackCtx) -> None:
        self._known = dict(ctx.runtime_env.get("env_vars") or {})

    def export(self, ctx: CallbackCtx) -> None:
        now = dict(ctx.runtime_env.get("env_vars") or {})
        for name in self._known.keys() - now.keys():
            os.environ.pop(name, None)
        for name, value in now.items():
            if value != self._known.get(name):
                try:
                    os.environ[name] = value
                except (TypeError, ValueError) as error:
                    path = f"runtime_env.env_vars.{name}"
                    raise _blame(ctx, path, "before init", error) from error
        self._known = now


async def _ensure_placement_group(
    ctx: CallbackCtx,
) -> tuple[PlacementGroup, PlacementGroup | None]:
    """Wait for the placement group, the default one if no callback supplied any.

    Returns:
        The group, and the same again if it was created here.
    """
    created = None
    group = ctx.placement_group
    if group is None:
        group = await aio.run_in_thread(_ray.create_default_placement_group, ctx.llm_config)
        created = group if _ray.current_placement_group() is None else None
        ctx._adopt(placement_group=group)
    try:
        while not await aio.run_in_thread(group.wait, _LOG_EVERY_S):
            logger.info(
                "waiting for placement group %s, bundles %s; 'ray status' shows what is free",
                group.id.hex(),
                group.bundle_specs,
            )
    except BaseException as error:
        if created is not None:  # the caller does not know of it yet
            _remove(created)
        if not isinstance(error, Exception):
            raise
        raise _blame(ctx, "placement_group", "placement", error) from error
    return group, created


def _remove(group: PlacementGroup) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)
    logger.info("removed placement group %s, which this initialization had made", group.id.hex())


def _merge(ctx: CallbackCtx, reply: NodeReply) -> NodeResult:
    """Take over what another node's callbacks did: trace, engine arguments, custom_data."""
    node = reply.result.node
    merged = dict(ctx.extra_init_kwargs)
    for entry in reply.trace:
        for path in entry.changed:
            field, _, name = path.partition(".")
            name = name.partition(".")[0]
            if field in ("runtime_env", "placement_group"):
                logger.warning(
                    "callback %r set ctx.%s in %s on node %s, where it has no effect; set it in "
                    "on_before_init",
                    entry.callback,
                    path,
                    entry.hook,
                    node,
                )
            if field != "extra_init_kwargs" or name not in reply.extra_init_kwargs:
                continue
            value = reply.extra_init_kwargs[name]
            if name not in merged or merged[name] == value:
                merged[name] = value
            else:
                logger.warning(
                    "callback %r set ctx.%s to another value on node %s than is set already; "
                    "the earlier value stays",
                    entry.callback,
                    path,
                    node,
                )
    ctx._adopt(extra_init_kwargs=merged)
    return unpack(reply)


def _set_model_path(ctx: CallbackCtx) -> None:
    """Tell the engine where the model is; all nodes that report a path must report the same."""
    reported = [ctx.handled] if ctx.handled is not None else ctx.nodes.values()
    paths = {str(source.model_path) for source in reported if source.model_path is not None}
    if len(paths) > 1:
        where = ", ".join(f"{result.node}: {result.model_path!r}" for result in ctx.nodes.values())
        raise HookError(
            callback=None,
            hook=None,
            node=str(ctx.node),
            phase="download",
            detail=f"the engine needs one model path on all nodes, got {where}; return the same "
            "path on each, for example by a symbolic link",
        )
    for path in paths:
        _ray.set_model_path(ctx.llm_config, path)


def _set_engine_kwargs(ctx: CallbackCtx) -> None:
    for name, value in ctx.extra_init_kwargs.items():
        try:
            _ray.set_engine_kwargs(ctx.llm_config, {name: value})
        except ValueError as error:
            raise _blame(ctx, f"extra_init_kwargs.{name}", "engine arguments", error) from error


def _blame(ctx: CallbackCtx, path: str, phase: str, error: Exception) -> HookError:
    """Make the error for a bad value in the context, naming the callback that put it there."""
    setter = ctx.trace.who_changed(path)
    return HookError(
        callback=setter.callback if setter else None,
        hook=setter.hook if setter else None,
        node=str(ctx.node),
        phase=phase,
        detail=redact(f"ctx.{path}: {describe(error)}", ctx._values),
    )
