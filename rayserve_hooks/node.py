"""One node's part of an initialization, in the replica's process or as a Ray task.

A task's worker process imports this module, so nothing here may import torch, vLLM or
``ray.serve.llm``.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import Any

from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeModelDownloadable, NodeResult
from rayserve_hooks.download import Mirror, download_node
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.manager import CallbackStack, PluginManager, get_plugin_manager
from rayserve_hooks.trace import TraceEntry

Setters = dict[str, tuple[str, str]]
"""By key of ``custom_data``: the callback and hook that set it."""


@dataclass(frozen=True)
class ModelSource:
    """What the default download needs to know of the deployment's config.

    Args:
        model_id: The engine's model id or path.
        mirror: The bucket the model is in, if any.
    """

    model_id: str
    mirror: Mirror | None


@dataclass(frozen=True)
class NodeRequest:
    """What travels to another node: the callback list and a copy of the context's fields."""

    stack: CallbackStack
    node: NodeInfo
    source: ModelSource
    config: bytes
    fields: dict[str, Any]
    custom_data: dict[str, bytes]
    custom_data_setters: Setters


@dataclass(frozen=True)
class NodeReply:
    """What comes back: the result, and what the node's callbacks did to their copy."""

    result: NodeResult
    custom_data: dict[str, bytes]
    extra_init_kwargs: dict[str, Any]
    trace: list[TraceEntry]


def initialize_this_node(
    manager: PluginManager, ctx: CallbackCtx, source: ModelSource
) -> NodeResult:
    """Run the per-node hook and, unless it brings the model, the default download.

    Raises:
        HookError: A callback or the download failed.
    """
    started = time.perf_counter()
    handled = manager.hook.on_before_download(ctx=ctx)
    hook_s = time.perf_counter() - started
    if handled is not None:
        path = None if handled.model_path is None else str(handled.model_path)
        return NodeResult(ctx.node, path, dict(ctx.custom_data), handled, hook_s, 0.0)
    started = time.perf_counter()
    try:
        path = download_node(source.model_id, source.mirror, download_mode_here(ctx))
    except Exception as error:
        raise HookError(
            callback=None, hook=None, node=str(ctx.node), phase="download", detail=describe(error)
        ) from error
    download_s = time.perf_counter() - started
    return NodeResult(ctx.node, path, dict(ctx.custom_data), None, hook_s, download_s)


def download_mode_here(ctx: CallbackCtx) -> NodeModelDownloadable:
    """Pick the download mode that counts on the context's node."""
    if ctx.node.is_local:
        return ctx.local_node_download_model
    return ctx.worker_node_download_model


def run_node_task(request: NodeRequest) -> NodeReply:
    """Initialize the node of this Ray task; the counterpart of `request_for`."""
    from ray import cloudpickle

    ctx = CallbackCtx(
        llm_config=functools.partial(cloudpickle.loads, request.config),
        node=request.node,
        role="node",
        custom_data={key: cloudpickle.loads(data) for key, data in request.custom_data.items()},
        **request.fields,
    )
    result = initialize_this_node(get_plugin_manager(request.stack), ctx, request.source)
    # custom_data goes back key by key, so that one that cannot travel is an error naming it.
    bare = replace(result, custom_data={})
    return NodeReply(
        bare,
        pack_custom_data(ctx, request.custom_data_setters),
        ctx.extra_init_kwargs,
        list(ctx.trace),
    )


def request_for(
    node: NodeInfo, ctx: CallbackCtx, stack: CallbackStack, source: ModelSource, config: bytes
) -> NodeRequest:
    """Build what travels to another node.

    Raises:
        HookError: A value in ``ctx.custom_data`` cannot be pickled.
    """
    fields = {
        "local_node_download_model": ctx.local_node_download_model,
        "worker_node_download_model": ctx.worker_node_download_model,
        "placement_group": ctx.placement_group,
        "runtime_env": ctx.runtime_env,
        "extra_init_kwargs": ctx.extra_init_kwargs,
    }
    return NodeRequest(stack, node, source, config, fields, pack_custom_data(ctx), _setters(ctx))


def unpack(reply: NodeReply) -> NodeResult:
    """Give a node's result with its ``custom_data`` loaded."""
    from ray import cloudpickle

    custom_data = {key: cloudpickle.loads(data) for key, data in reply.custom_data.items()}
    return replace(reply.result, custom_data=custom_data)


def pack_custom_data(ctx: CallbackCtx, set_earlier: Setters | None = None) -> dict[str, bytes]:
    """Pickle ``ctx.custom_data`` key by key.

    Args:
        ctx: The context.
        set_earlier: Who set the keys that came with the request.

    Raises:
        HookError: A value cannot be pickled; names its key and the callback that set it.
    """
    from ray import cloudpickle

    packed = {}
    for key, value in ctx.custom_data.items():
        try:
            packed[key] = cloudpickle.dumps(value)
        except Exception as error:  # any class can refuse in its own way
            setters = {**(set_earlier or {}), **_setters(ctx)}
            callback, hook = setters.get(key, (None, None))
            raise HookError(
                callback=callback,
                hook=hook,
                node=str(ctx.node),
                phase="before download",
                detail=f"ctx.custom_data[{key!r}] cannot be sent to another process: "
                f"{describe(error)}; store plain data there and keep the object on the callback",
            ) from error
    return packed


def _setters(ctx: CallbackCtx) -> Setters:
    found = {}
    for key in ctx.custom_data:
        entry = ctx.trace.who_changed(f"custom_data.{key}")
        if entry is not None:
            found[key] = (entry.callback, entry.hook)
    return found
