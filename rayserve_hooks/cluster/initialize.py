"""The node-initialization path: from a config to nodes on which the engine can start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rayserve_hooks.cluster import _ray, engine_arguments
from rayserve_hooks.cluster.node import check_brought, initialize_this_node
from rayserve_hooks.cluster.ray_callback import packed_instances
from rayserve_hooks.cluster.remote_node import RemoteNode
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.cluster.supervision import Initialization
from rayserve_hooks.cluster.travel import ModelSource, request_for
from rayserve_hooks.cluster.versions import check_ray
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeResult
from rayserve_hooks.core.running import with_background
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.core.takeovers import log_take_over
from rayserve_hooks.core.threads import run_in_thread
from rayserve_hooks.errors import Phase

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

T = TypeVar("T")

check_ray()  # here, and not at the first call, which may come after minutes


async def initialize_node(
    config: LLMConfig, *, placement_group: PlacementGroup | None = None
) -> CallbackCtx:
    """Initialize all nodes of a deployment, with its callbacks.

    Inside a Serve replica `HooksCallback` does this; anywhere else connect to Ray first.
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
        HookError: A callback or a node failed. The other nodes are stopped, and a placement group
            created here is removed.
    """
    return await initialize(config, stack_of(config), placement_group)


async def initialize(
    config: LLMConfig, stack: CallbackStack, placement_group: PlacementGroup | None
) -> CallbackCtx:
    """Initialize all nodes of a deployment with a given stack; see `initialize_node`."""
    this = Initialization(config, stack, placement_group)
    async with this.supervised():
        await with_background(this.manager, this.ctx, _make_nodes_ready(this))
        this.recorder.set_own_custom_data()
        this.enter(Phase.ENGINE_ARGUMENTS)
        engine_arguments.set_model_path(this.ctx)
        engine_arguments.set_engine_kwargs(this.ctx)
        this.enter(Phase.AFTER_INIT)
        await with_background(this.manager, this.ctx, this.call("on_after_init"))
        this.enter(Phase.ENGINE_ARGUMENTS)
        engine_arguments.set_engine_kwargs(this.ctx)
        _ray.stream_from_mirror(config)
        this.environment.export(this.phase)
    return this.ctx


async def _make_nodes_ready(this: Initialization) -> None:
    handled = await this.call("on_before_init")
    if handled is not None:
        this.take_over(handled)
        await check_brought(handled, "on_before_init", this.ctx)
    this.environment.export(this.phase)
    this.enter(Phase.PLACEMENT)
    group = await this.placement.ready()
    if this.ctx.handled is None:
        nodes = await this.placement.nodes(group)
        this.enter(Phase.BEFORE_DOWNLOAD)
        await _initialize_nodes(this, nodes)


async def _initialize_nodes(this: Initialization, nodes: list[NodeInfo]) -> None:
    """Initialize every node at once: this one in a thread, the others by an actor each."""
    ctx = this.ctx
    source = ModelSource(*_ray.model_source(ctx.llm_config))
    others = [node for node in nodes if not node.is_local]
    if others:
        from ray import cloudpickle

        config = cloudpickle.dumps(ctx.llm_config)
        instances = await run_in_thread(packed_instances, this.manager, ctx)
        for node in others:
            request = request_for(node, ctx, this.manager.stack, source, config, instances)
            this.others.append(RemoteNode(request, ctx.runtime_env))
    waits = [_logged(node.wait(), node) for node in this.others]
    if len(others) < len(nodes):
        here = initialize_this_node(this.manager, ctx, source, this.enter)
        waits.append(_logged(here, ctx))
    results = {result.node.id: result for result in await _all(waits)}
    for other in this.others:
        assert other.reply is not None
        ctx.trace.extend(other.trace)
        engine_arguments.merge(ctx, other.reply)
    this.recorder.set_nodes({node.id: results[node.id] for node in nodes})


async def _logged(wait: Awaitable[NodeResult], traced: RemoteNode | CallbackCtx) -> NodeResult:
    """Await a node's result, and log who has brought its model, if a callback has."""
    result = await wait
    if result.handled is not None:
        log_take_over(traced.trace, "on_before_download", result.node)
    return result


async def _all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """Await all at once; at the first failure cancel the others."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()
