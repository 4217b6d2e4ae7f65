"""The node-initialization path: from a config to nodes on which the engine can start."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from rayserve_hooks import _ray, aio
from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo, NodeResult
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.manager import PluginManager, get_plugin_manager, stack_of
from rayserve_hooks.node import (
    ModelSource,
    NodeReply,
    initialize_this_node,
    request_for,
    run_node_task,
    unpack,
)
from rayserve_hooks.trace import LOGGER_NAME

if TYPE_CHECKING:
    import ray
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger(LOGGER_NAME)

_PLACEMENT_LOG_S = 10.0


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
    started = time.perf_counter()
    manager = get_plugin_manager(stack_of(config))
    ctx = _new_context(config, placement_group or _ray.current_placement_group())
    environment = _Environment(ctx)
    created: PlacementGroup | None = None
    try:
        handled = await aio.run_in_thread(manager.hook.on_before_init, ctx=ctx)
        environment.export(ctx)
        group, created = await _ensure_placement_group(ctx)
        if handled is None:
            await _initialize_nodes(manager, ctx, group)
        _set_model_path(ctx, handled)
        _set_engine_kwargs(ctx)
        await aio.run_in_thread(manager.hook.on_after_init, ctx=ctx)
        _set_engine_kwargs(ctx)
        environment.export(ctx)
    except BaseException:  # whatever ends the initialization, what it created goes
        if created is not None:
            _remove(created)
        raise
    logger.info(
        "initialized %s in %.2f s: %d node(s), callbacks %s%s",
        manager.stack.deployment,
        time.perf_counter() - started,
        len(ctx.nodes),
        ", ".join(entry.name for entry in manager.stack.entries) or "none",
        f", handled by a callback: {handled.reason or 'no reason given'}" if handled else "",
    )
    logger.debug("%r", ctx.trace)
    return ctx


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
        while not await aio.run_in_thread(group.wait, _PLACEMENT_LOG_S):
            logger.info(
                "waiting for placement group %s, bundles %s; 'ray status' shows what is free",
                group.id.hex(),
                group.bundle_specs,
            )
    except BaseException:  # the caller does not know of it yet
        if created is not None:
            _remove(created)
        raise
    return group, created


def _remove(group: PlacementGroup) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)
    logger.info("removed placement group %s, which this initialization had made", group.id.hex())


async def _initialize_nodes(
    manager: PluginManager, ctx: CallbackCtx, group: PlacementGroup
) -> None:
    """Initialize every node at once: this one in a thread, the others as Ray tasks."""
    nodes = await aio.run_in_thread(_ray.nodes_of, group)
    if ctx.node not in nodes and _ray.in_replica():
        # The engine's core runs in the replica's process and reads the model's config and
        # tokenizer there, also when a callback has placed the workers elsewhere.
        nodes.insert(0, ctx.node)
    source = ModelSource(*_ray.model_source(ctx.llm_config))
    refs = _start_tasks(manager, ctx, source, [node for node in nodes if not node.is_local])
    waits: list[Awaitable[NodeReply | NodeResult]] = [
        _wait_for(node, refs[node.id])
        if node.id in refs
        else aio.run_in_thread(initialize_this_node, manager, ctx, source)
        for node in nodes
    ]
    try:
        outcomes = await asyncio.gather(*waits)
    except BaseException:  # a failure or a cancellation: nobody will wait for the others
        for ref in refs.values():
            _cancel(ref)
        raise
    results = [_merge(ctx, o) if isinstance(o, NodeReply) else o for o in outcomes]
    object.__setattr__(ctx, "_nodes", {result.node.id: result for result in results})


def _start_tasks(
    manager: PluginManager, ctx: CallbackCtx, source: ModelSource, nodes: list[NodeInfo]
) -> dict[str, ray.ObjectRef[NodeReply]]:
    """Start one Ray task on each node, pinned to it, with the deployment's runtime_env."""
    if not nodes:
        return {}
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config = cloudpickle.dumps(ctx.llm_config)
    task = ray.remote(run_node_task)
    return {
        node.id: task.options(
            name=f"rayserve_hooks:{manager.stack.deployment}:{node.address}",
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False),
            runtime_env=copy.deepcopy(ctx.runtime_env),
        ).remote(request_for(node, ctx, manager.stack, source, config))
        for node in nodes
    }


async def _wait_for(node: NodeInfo, ref: ray.ObjectRef[NodeReply]) -> NodeReply:
    from ray.exceptions import RayError, RayTaskError

    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, HookError):
            raise error.cause from error.cause.__cause__
        raise _node_failed(node, error) from error
    except RayError as error:
        raise _node_failed(node, error) from error


def _node_failed(node: NodeInfo, error: Exception) -> HookError:
    return HookError(
        callback=None, hook=None, node=str(node), phase="before download", detail=describe(error)
    )


def _cancel(ref: ray.ObjectRef[NodeReply]) -> None:
    import ray

    ray.cancel(ref, force=True)


def _merge(ctx: CallbackCtx, reply: NodeReply) -> NodeResult:
    """Take over what another node's callbacks did: trace, engine arguments, custom_data."""
    ctx.trace.extend(reply.trace)
    node = reply.result.node
    merged = dict(ctx.extra_init_kwargs)
    for entry in reply.trace:
        for path in entry.changes:
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


def _set_model_path(ctx: CallbackCtx, handled: Handled | None) -> None:
    """Tell the engine where the model is; all nodes that report a path must report the same."""
    reported = [handled] if handled is not None else ctx.nodes.values()
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
        detail=f"ctx.{path}: {describe(error)}",
    )
