"""What travels between the replica and the other nodes' processes."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rayserve_hooks.context import CallbackCtx, DeferredConfig, NodeInfo, NodeResult
from rayserve_hooks.core.recorder import Recorder, recorder_of
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.download.model import Mirror
from rayserve_hooks.errors import HookError, Phase, describe
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
    assigned: frozenset[str]
    custom_data: dict[str, bytes]
    custom_data_setters: Setters


@dataclass(frozen=True)
class NodeStatus:
    """What a node's process is doing.

    Attributes:
        number: Grows by one with each report.
        phase: `Phase.BEFORE_DOWNLOAD` or `Phase.DOWNLOAD`.
        calls: By place in the node's trace, the calls that are new or have ended since the last
            status.
    """

    number: int
    phase: Phase
    calls: dict[int, TraceEntry]


@dataclass(frozen=True)
class NodeReply:
    """What comes back: the result, and what the node's callbacks did to their copy."""

    result: NodeResult
    custom_data: dict[str, bytes]
    extra_init_kwargs: dict[str, Any]
    trace: list[TraceEntry]

    def unpacked(self) -> NodeResult:
        """Return the result with its ``custom_data`` loaded."""
        return replace(self.result, custom_data=load_custom_data(self.custom_data))


@dataclass(frozen=True)
class CleanUp:
    """What ``on_init_failed`` did on a node.

    Attributes:
        failures: What failed in it.
        trace: The calls of its process.
    """

    failures: list[HookError]
    trace: list[TraceEntry]


def request_for(
    node: NodeInfo, ctx: CallbackCtx, stack: CallbackStack, source: ModelSource, config: bytes
) -> NodeRequest:
    """Return what travels to another node; the counterpart of `context_of`.

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
    return NodeRequest(
        stack,
        node,
        source,
        config,
        fields,
        frozenset(recorder_of(ctx).assigned),
        pack_custom_data(ctx),
        _setters(ctx),
    )


def context_of(
    request: NodeRequest, attempt: int, on_call: Callable[[TraceEntry], None] | None = None
) -> CallbackCtx:
    """Return the context of another node's process.

    Args:
        request: What has travelled here.
        attempt: How often the node's process was started, for the trace.
        on_call: Called with the trace entry of each call before the call starts.
    """
    ctx = CallbackCtx(
        llm_config=DeferredConfig(functools.partial(pickle.loads, request.config)),
        node=request.node,
        custom_data=load_custom_data(request.custom_data),
        **request.fields,
    )
    recorder = Recorder(ctx, role="node", attempt=attempt, on_call=on_call)
    recorder.assigned.update(request.assigned)
    return ctx


def load_custom_data(packed: dict[str, bytes]) -> dict[str, Any]:
    return {key: pickle.loads(data) for key, data in packed.items()}


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
                phase=Phase.BEFORE_DOWNLOAD,
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
