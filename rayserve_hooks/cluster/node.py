"""One node's part of an initialization, in the replica's process or in an actor on the node.

A node's process imports this module, so nothing here may import torch, vLLM or ``ray.serve.llm``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

from rayserve_hooks.cluster.travel import ModelSource
from rayserve_hooks.context import CallbackCtx, Handled, NodeResult
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import entry_error, step_error
from rayserve_hooks.core.hooks import PHASES
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.core.running import call_hook, time_limit
from rayserve_hooks.core.takeovers import named, taken_over_by
from rayserve_hooks.errors import Phase, describe, raise_from

_ENGINES_OWN = re.compile(
    r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?\Z|\w[\w+.-]+://(?<!file://)", re.IGNORECASE
)


async def initialize_this_node(
    manager: PluginManager, ctx: CallbackCtx, source: ModelSource, on_phase: Callable[[Phase], None]
) -> NodeResult:
    """Run the per-node hook and, unless it brings the model, the default download.

    The result is still without ``custom_data``: a background task may be filling it.
    """
    on_phase(Phase.BEFORE_DOWNLOAD)
    started = time.perf_counter()
    handled = await call_hook(manager, "on_before_download", ctx)
    hook_s = time.perf_counter() - started
    if handled is not None:
        await check_brought(handled, "on_before_download", ctx)
        handled = named(handled, "on_before_download", ctx)
        path = None if handled.model_path is None else str(handled.model_path)
        return NodeResult(ctx.node, path, {}, handled, hook_s, 0.0)
    on_phase(Phase.DOWNLOAD)
    started, start = time.perf_counter(), time.time()
    fetched: list[int] = []
    path = await _download(ctx, source, manager.stack.time_limits.download, fetched.append)
    seconds = time.perf_counter() - started
    if path is None and not fetched:
        start = 0.0  # the engine fetches its model itself
    return NodeResult(ctx.node, path, {}, None, hook_s, seconds, sum(fetched), start)


async def check_brought(handled: Handled, hook: str, ctx: CallbackCtx) -> None:
    """Raise if a callback says that the model is in a folder that this node does not have.

    What the engine can load by itself, a model's id or a URI, is left to it.
    """
    path = handled.model_path
    if path is None or _ENGINES_OWN.match(str(path)):
        return
    if await threads.run_in_thread(os.path.exists, path):
        return
    entry = taken_over_by(ctx.trace, hook, ctx.node.id)
    if entry is not None:
        entry.outcome = "failed"
    detail = (
        f"Handled(model_path={str(path)!r}) names nothing that is there on this node; put the "
        "model there first, or return None to have it downloaded"
    )
    raise entry_error(entry, ctx.node, PHASES[hook], detail)


async def _download(
    ctx: CallbackCtx, source: ModelSource, limit: float | None, fetched: Callable[[int], object]
) -> str | None:
    mode = "local_node_download_model" if ctx.node.is_local else "worker_node_download_model"
    from_hub = mode in recorder_of(ctx).assigned
    if source.mirror is None and not from_hub:
        return None  # the engine fetches the model; what follows takes a while to import
    from rayserve_hooks.cluster.download_stage import download_caller
    from rayserve_hooks.download.model import download_node

    async with time_limit("download", limit, ctx, Phase.DOWNLOAD):
        try:
            return await threads.run_in_thread(
                download_node,
                source.model_id,
                source.mirror,
                getattr(ctx, mode),
                from_hub=from_hub,
                caller=download_caller(source.model_id, ctx.node.id, fetched),
            )
        except Exception as error:
            failure = step_error(ctx, Phase.DOWNLOAD, describe(error), cause=error)
            raise_from(failure, failure.__cause__)
