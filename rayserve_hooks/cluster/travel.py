"""What travels between the replica and the other nodes' processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rayserve_hooks.context import (
    CallbackCtx,
    DeferredConfig,
    Handled,
    NodeInfo,
    NodeResult,
    ProcessInfo,
)
from rayserve_hooks.core.failures import entry_error
from rayserve_hooks.core.log import call_fields, logger
from rayserve_hooks.core.recorder import Recorder, recorder_of
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import HookError, Phase, describe, raise_from
from rayserve_hooks.trace import Trace, TraceEntry

if TYPE_CHECKING:
    from rayserve_hooks.download.model import Mirror

Setters = dict[str, TraceEntry | None]  # by key of custom_data, the call that set it


@dataclass(frozen=True)
class ModelSource:
    """What the default download needs to know: the engine's model id or path, and a mirror."""

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
    instances: Mapping[str, bytes] = field(default_factory=dict)  # of Ray's callbacks, by name


@dataclass(frozen=True)
class NodeStatus:
    """What a node's process is doing; ``number`` grows with each report."""

    number: int
    phase: Phase | None
    trace: list[TraceEntry]


@dataclass(frozen=True)
class NodeReply:
    """What comes back: the result, and what the node's callbacks did to their copy."""

    result: NodeResult
    custom_data: dict[str, bytes]
    extra_init_kwargs: dict[str, Any]
    trace: list[TraceEntry]

    def unpacked(self) -> NodeResult:
        """Return the result with its ``custom_data`` loaded."""
        trace = Trace(self.trace)
        setters = {key: trace.who_changed(f"custom_data.{key}") for key in self.custom_data}
        custom_data = load_custom_data(self.custom_data, self.result.node, setters)
        return replace(self.result, custom_data=custom_data)


@dataclass(frozen=True)
class CleanUp:
    """What failed in ``on_init_failed`` on a node, and all calls of its process."""

    failures: list[HookError]
    trace: list[TraceEntry]


def dumps(value: object) -> bytes:
    """Pickle a value as Ray does.

    In an author's tests nothing has imported Ray, and the package that Ray has a copy of will do.
    """
    alone = sys.modules.get("ray") is None and importlib.util.find_spec("cloudpickle")
    pickler = importlib.import_module("cloudpickle" if alone else "ray.cloudpickle")
    pickled: bytes = pickler.dumps(value)
    return pickled


def request_for(  # noqa: PLR0917 - each is one thing that travels
    node: NodeInfo,
    ctx: CallbackCtx,
    stack: CallbackStack,
    source: ModelSource,
    config: bytes,
    instances: Mapping[str, bytes] = MappingProxyType({}),
) -> NodeRequest:
    """Return what travels to another node; the counterpart of `context_of`."""
    recorder = recorder_of(ctx)
    fields = {name: value for name, value in recorder.values.items() if name != "custom_data"}
    assigned, packed = frozenset(recorder.assigned), pack_custom_data(ctx)
    setters = {key: ctx.trace.who_changed(f"custom_data.{key}") for key in packed}
    return NodeRequest(
        stack, node, source, config, fields, assigned, packed, setters, dict(instances)
    )


def context_of(
    request: NodeRequest, attempt: int, on_call: Callable[[TraceEntry], None] | None = None
) -> CallbackCtx:
    """Return the context of another node's process; the arguments are those of `Recorder`."""
    ctx = CallbackCtx(
        llm_config=DeferredConfig(functools.partial(pickle.loads, request.config)),
        node=request.node,
        process=ProcessInfo("node"),
        **request.fields,
    )
    # In place, as it was filled: assigning it would refuse a key that is no string.
    ctx.custom_data.update(
        load_custom_data(request.custom_data, request.node, request.custom_data_setters)
    )
    recorder = Recorder(ctx, attempt=attempt, on_call=on_call)
    recorder.assigned.update(request.assigned)
    return ctx


@dataclass(frozen=True)
class EngineRequest:
    """What the engine's processes need: the callbacks that run there, and a copy of the context."""

    stack: CallbackStack
    config: bytes
    fields: dict[str, Any]
    custom_data: dict[str, bytes]
    nodes: dict[str, tuple[NodeResult, dict[str, bytes]]]  # each with its custom_data packed
    handled: Handled | None

    @classmethod
    def loaded(cls, data: bytes) -> EngineRequest:
        """Load what `engine_request_for` has packed."""
        request: EngineRequest = pickle.loads(data)
        return request


def engine_request_for(ctx: CallbackCtx, stack: CallbackStack) -> bytes:
    """Return what travels to the engine's processes; the counterpart of `engine_context_of`.

    A value of ``custom_data`` that does not pickle stays here, with a warning: on a single node
    nothing else would need it to.
    """
    values = recorder_of(ctx).values
    fields = {name: value for name, value in values.items() if name != "custom_data"}
    nodes = {
        node_id: (replace(result, custom_data={}), _pack_what_pickles(result.custom_data))
        for node_id, result in ctx.nodes.items()
    }
    custom_data = _pack_what_pickles(ctx.custom_data)
    for key in (key for key in ctx.custom_data if key not in custom_data):
        setter = ctx.trace.who_changed(f"custom_data.{key}")
        logger.warning(
            "ctx.custom_data[%r], set by callback %r, does not pickle, so that the engine's "
            "processes do not get it; store plain data there and keep the object on the callback",
            key,
            setter and setter.callback,
            extra=call_fields(setter) if setter else {},
        )
    config = dumps(ctx.llm_config)
    return dumps(EngineRequest(stack, config, fields, custom_data, nodes, ctx.handled))


def engine_context_of(
    request: EngineRequest,
    node: NodeInfo,
    process: ProcessInfo,
    on_call: Callable[[TraceEntry], None],
) -> CallbackCtx:
    """Return the context of a process of the engine; the arguments are those of `Recorder`."""
    ctx = CallbackCtx(
        llm_config=DeferredConfig(functools.partial(pickle.loads, request.config)),
        node=node,
        process=process,
        nodes={
            node_id: replace(result, custom_data=_load_what_loads(packed))
            for node_id, (result, packed) in request.nodes.items()
        },
        handled=request.handled,
        **request.fields,
    )
    ctx.custom_data.update(_load_what_loads(request.custom_data))
    Recorder(ctx, on_call=on_call)
    return ctx


def _load_what_loads(packed: Mapping[str, bytes]) -> dict[str, Any]:
    loaded = {}
    for key, data in packed.items():
        try:
            loaded[key] = pickle.loads(data)
        except Exception as error:  # any class can refuse in its own way
            text = "ctx.custom_data[%r] is not here, since it cannot be built again: %s"
            logger.warning(text, key, describe(error))
    return loaded


def _pack_what_pickles(values: Mapping[str, Any]) -> dict[str, bytes]:
    packed = {}
    for key, value in values.items():
        with contextlib.suppress(Exception):  # any class can refuse in its own way
            packed[key] = dumps(value)
    return packed


def load_custom_data(
    packed: Mapping[str, bytes],
    node: NodeInfo,
    setters: Setters,
    phase: Phase = Phase.BEFORE_DOWNLOAD,
) -> dict[str, Any]:
    """Load what `pack_custom_data` has packed; a value that refuses is an error naming it."""
    loaded = {}
    for key, data in packed.items():
        try:
            loaded[key] = pickle.loads(data)
        except BaseException as error:  # any class can refuse in its own way, or exit
            failure = entry_error(
                setters.get(key),
                node,
                phase,
                f"ctx.custom_data[{key!r}] cannot be built again in another process: "
                f"{describe(error)}; store plain data there and keep the object on the callback",
                cause=error,
            )
            raise_from(failure, failure.__cause__)
    return loaded


def pack_custom_data(
    ctx: CallbackCtx, set_before: Setters | None = None, phase: Phase = Phase.BEFORE_DOWNLOAD
) -> dict[str, bytes]:
    """Pickle ``ctx.custom_data`` key by key, so that one that cannot travel is an error naming it.

    ``set_before`` has the setters of what came with the request.
    """
    packed = {}
    for key, value in ctx.custom_data.items():
        try:
            packed[key] = dumps(value)
        except Exception as error:  # any class can refuse in its own way
            here = ctx.trace.who_changed(f"custom_data.{key}")
            failure = entry_error(
                here or (set_before or {}).get(key),
                ctx.node,
                phase,
                f"ctx.custom_data[{key!r}] cannot be sent to another process: {describe(error)}; "
                "store plain data there and keep the object on the callback",
                cause=error,
                known=recorder_of(ctx).secrets_among,
            )
            raise_from(failure, failure.__cause__)
    return packed


def dumps_beside_config(value: object, ctx: CallbackCtx) -> bytes:
    """Pickle a value in which the config may occur; the counterpart of `loads_beside_config`.

    The config travels by itself, so that a node has it once.
    """
    from ray.cloudpickle import CloudPickler

    class Pickler(CloudPickler):
        def persistent_id(self, found: object) -> str | None:
            return "llm_config" if found is ctx.llm_config else None

    with io.BytesIO() as file:
        pickler: Any = Pickler(file)  # type: ignore[no-untyped-call]
        pickler.dump(value)
        return file.getvalue()


def loads_beside_config(data: bytes, ctx: CallbackCtx) -> Any:
    """Load what `dumps_beside_config` has pickled in another process of this initialization."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return ctx.llm_config

    return Unpickler(io.BytesIO(data)).load()
