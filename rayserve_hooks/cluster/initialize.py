"""The node-initialization path: from a config to nodes on which the engine can start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rayserve_hooks.cluster import engine_arguments
from rayserve_hooks.cluster.node import check_brought, initialize_this_node
from rayserve_hooks.cluster.ray_callback import packed_instances
from rayserve_hooks.cluster.remote_node import RemoteNode
from rayserve_hooks.cluster.supervision import Initialization
from rayserve_hooks.cluster.travel import ModelSource, dumps, request_for
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


async def initialize(
    config: LLMConfig, stack: CallbackStack, placement_group: PlacementGroup | None
) -> CallbackCtx:
    """Initialize all nodes of a deployment with a given stack; see `initialize_node`."""
    return await run(Initialization(config, stack, placement_group))


async def run(this: Initialization) -> CallbackCtx:
    """Go the whole path, on whichever platform."""
    async with this.supervised():
        await prepare(this)
    return this.ctx


async def prepare(this: Initialization) -> None:
    """Initialize all nodes; `Initialization.supervised` cleans up after a failure."""
    this.log_start()
    async with this.within_total():
        await run_in_thread(this.take_up_configured)
        await with_background(this.manager, this.ctx, _make_nodes_ready(this))
        this.recorder.set_own_custom_data()
        this.enter(Phase.ENGINE_ARGUMENTS)
        engine_arguments.set_model_path(this.ctx, this.platform)
        engine_arguments.set_engine_kwargs(this.ctx, this.platform)
        this.enter(Phase.AFTER_INIT)
        await with_background(this.manager, this.ctx, this.call("on_after_init"))
        this.enter(Phase.ENGINE_ARGUMENTS)
        engine_arguments.set_engine_kwargs(this.ctx, this.platform)
        this.platform.stream_from_mirror(this.ctx.llm_config)
        this.environment.export(this.phase)
        this.enter(Phase.BEFORE_ENGINE_INIT)
        await this.processes.prepare()
    this.log_summary()
    this.prepared.set()


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
    source = ModelSource(*this.platform.model_source(ctx.llm_config))
    others = [node for node in nodes if not node.is_local]
    if others:
        config = dumps(ctx.llm_config)
        instances = await run_in_thread(packed_instances, this.manager, ctx)
        for node in others:
            request = request_for(node, ctx, this.manager.stack, source, config, instances)
            this.others.append(RemoteNode(request, ctx.runtime_env, this.platform))
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
