"""`CallbackCtx`, the state of one node initialization, and the values it holds."""

from __future__ import annotations

import difflib
import enum
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from rayserve_hooks.core import threads as aio
from rayserve_hooks.trace import Trace, TraceEntry, changes_between, snapshot

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup


class NodeModelDownloadable(enum.Enum):
    """What a node downloads; the names are Ray's.

    Source: ``ray.llm._internal.common.utils.download_utils.NodeModelDownloadable``, Ray 2.60.
    """

    MODEL_AND_TOKENIZER = "MODEL_AND_TOKENIZER"
    TOKENIZER_ONLY = "TOKENIZER_ONLY"
    EXCLUDE_SAFETENSORS = "EXCLUDE_SAFETENSORS"
    NONE = "NONE"

    @classmethod
    def parse(cls, value: DownloadMode) -> NodeModelDownloadable:
        """Accept a member, its name, or the member of Ray's enum with the same name.

        Raises:
            ValueError: ``value`` is none of these.
        """
        if isinstance(value, cls):
            return value
        name = value.name if isinstance(value, enum.Enum) else value
        if isinstance(name, str) and name in cls.__members__:
            return cls[name]
        raise ValueError(
            f"{value!r} is not a download mode; use one of {', '.join(sorted(cls.__members__))}"
        )


DownloadMode = NodeModelDownloadable | str | enum.Enum
"""What may be assigned as a download mode: our enum, its plain name, or Ray's enum."""


@dataclass(frozen=True)
class Handled:
    """A hook's result that says "done, skip the rest".

    Args:
        model_path: The model's folder, or an id the engine can load; None leaves the engine's
            model as configured.
        reason: Why, for the log and the trace.

    Raises:
        TypeError: ``model_path`` or ``reason`` has another type.
    """

    model_path: str | os.PathLike[str] | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.model_path, os.PathLike):
            object.__setattr__(self, "model_path", os.fspath(self.model_path))
        if not isinstance(self.model_path, str | None):
            raise TypeError(
                f"Handled(model_path=...) takes a path or None, got {self.model_path!r}"
            )
        if self.model_path == "":
            raise ValueError("Handled(model_path='') names no folder; give a path or None")
        if not isinstance(self.reason, str):
            raise TypeError(f"Handled(reason=...) takes a string, got {self.reason!r}")


@dataclass(frozen=True)
class NodeInfo:
    """A node of the Ray cluster, as one initialization sees it.

    Args:
        id: Ray's node id, in hex.
        address: The node's IP address.
        is_local: Whether it is the replica's own node.
    """

    id: str
    address: str
    is_local: bool

    def __str__(self) -> str:
        return f"{self.id} ({self.address})"


@dataclass(frozen=True)
class NodeResult:
    """What the initialization of one node left behind.

    Args:
        node: The node.
        model_path: Where the node has the model; None when nothing was downloaded or brought.
        custom_data: ``ctx.custom_data`` of that node after its hooks.
        handled: The result that replaced the default download, if a callback returned one.
        hook_s: Seconds in ``on_before_download``, all callbacks together.
        download_s: Seconds in the default download, 0.0 when there was none.
    """

    node: NodeInfo
    model_path: str | None
    custom_data: Mapping[str, Any] = field(repr=False)
    handled: Handled | None
    hook_s: float
    download_s: float


@dataclass(frozen=True)
class BackgroundTask:
    """What a callback started with ``ctx.run_in_background``.

    Attributes:
        entry: Its line in the trace, with the callback and hook that started it.
        call: The running function.
    """

    entry: TraceEntry
    call: aio.ThreadCall[Any]


T = TypeVar("T")
Get = TypeVar("Get")
Set = TypeVar("Set")


class _Field(Generic[Get, Set]):
    """A read/write field: ``parse`` checks what is assigned, and its errors name the callback."""

    def __init__(self, parse: Callable[[Set], Get]) -> None:
        self._parse = parse

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, ctx: None, owner: type) -> _Field[Get, Set]: ...
    @overload
    def __get__(self, ctx: CallbackCtx, owner: type) -> Get: ...
    def __get__(self, ctx: CallbackCtx | None, owner: type) -> Get | _Field[Get, Set]:
        if ctx is None:
            return self
        return ctx._values[self._name]  # type: ignore[no-any-return]

    def __set__(self, ctx: CallbackCtx, value: Set) -> None:
        try:
            ctx._values[self._name] = self._parse(value)
            if ctx._running is not None:
                ctx._assigned.add(self._name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{ctx._who()}cannot set ctx.{self._name}: {error}") from None


def _parse_dict(value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is not a dict; assign a dict with string keys")
    wrong = [key for key in value if not isinstance(key, str)]
    if wrong:
        raise TypeError(f"key {wrong[0]!r} is not a string; use string keys")
    return value


def _parse_placement_group(value: PlacementGroup | None) -> PlacementGroup | None:
    # Ray is not imported for this check: whoever has a placement group has imported it.
    if value is not None and not (hasattr(value, "id") and hasattr(value, "bundle_specs")):
        raise TypeError(
            f"{value!r} is not a placement group; assign what ray.util.placement_group() returns"
        )
    return value


class CallbackCtx:
    """The state of one node initialization; hooks read and change it.

    Every assignment is checked at once. On the replica's own node all hooks share one context;
    each other node gets a copy.

    Attributes:
        llm_config: The deployment's config. Read-only: assigning it raises.
        local_node_download_model: What the replica's own node downloads.
        worker_node_download_model: What every other node of the placement group downloads.
        placement_group: The Ray placement group whose nodes are initialized. None until a
            callback sets it or, after ``on_before_init``, the default one is created; inside a
            Serve replica it is Serve's from the start.
        runtime_env: The runtime environment of the per-node tasks and the engine's workers.
        extra_init_kwargs: Merged into the engine's keyword arguments before the engine starts.
        custom_data: The callbacks' own shared state.
        handled: What a callback returned from ``on_before_init`` to take over the initialization;
            None if none did. What ended ``on_before_download`` is in ``nodes``. Read-only.
        node: The node this call runs on. Read-only.
        nodes: By node id, what each node's initialization left; empty before the downloads.
            Read-only.
        trace: Who ran, where, how long, and what each one changed. Read-only.
    """

    __slots__ = (
        "_assigned",
        "_attempt",
        "_background",
        "_before",
        "_config_loader",
        "_conflicts",
        "_handled",
        "_node",
        "_nodes",
        "_on_call",
        "_role",
        "_running",
        "_trace",
        "_values",
    )

    local_node_download_model = _Field[NodeModelDownloadable, DownloadMode](
        NodeModelDownloadable.parse
    )
    worker_node_download_model = _Field[NodeModelDownloadable, DownloadMode](
        NodeModelDownloadable.parse
    )
    placement_group = _Field["PlacementGroup | None", "PlacementGroup | None"](
        _parse_placement_group
    )
    runtime_env = _Field[dict[str, Any], dict[str, Any]](_parse_dict)
    extra_init_kwargs = _Field[dict[str, Any], dict[str, Any]](_parse_dict)
    custom_data = _Field[dict[str, Any], dict[str, Any]](_parse_dict)

    def __init__(
        self,
        *,
        llm_config: LLMConfig | Callable[[], LLMConfig],
        node: NodeInfo,
        role: str = "driver",
        attempt: int = 1,
        on_call: Callable[[TraceEntry], None] | None = None,
        **fields: Any,
    ) -> None:
        """Make the context of one process.

        Args:
            llm_config: The config, or a function that loads it at the first use.
            node: The node of this process.
            role: ``"replica"``, ``"node"`` or ``"driver"``, for the trace.
            attempt: How often Ray has started this node's task, for the trace.
            on_call: Told of each call of a callback before it starts.
            **fields: Initial values of the read/write fields.

        Raises:
            TypeError, ValueError: A value does not fit its field.
            AttributeError: An unknown field.
        """
        set_slot = object.__setattr__
        set_slot(self, "_config_loader", llm_config)
        set_slot(self, "_handled", None)
        set_slot(self, "_node", node)
        set_slot(self, "_nodes", {})
        set_slot(self, "_role", role)
        set_slot(self, "_attempt", attempt)
        set_slot(self, "_on_call", on_call)
        set_slot(self, "_background", [])
        set_slot(self, "_assigned", set())
        set_slot(self, "_running", None)
        set_slot(self, "_trace", Trace())
        set_slot(self, "_conflicts", {})
        set_slot(
            self,
            "_values",
            {
                "local_node_download_model": NodeModelDownloadable.MODEL_AND_TOKENIZER,
                "worker_node_download_model": NodeModelDownloadable.MODEL_AND_TOKENIZER,
                "placement_group": None,
                "runtime_env": {},
                "extra_init_kwargs": {},
                "custom_data": {},
            },
        )
        for name, value in fields.items():
            setattr(self, name, value)
        set_slot(self, "_before", snapshot(self._values))

    @property
    def llm_config(self) -> LLMConfig:
        if callable(self._config_loader):
            object.__setattr__(self, "_config_loader", self._config_loader())
        return self._config_loader  # type: ignore[no-any-return]

    @property
    def handled(self) -> Handled | None:
        return self._handled  # type: ignore[no-any-return]

    @property
    def node(self) -> NodeInfo:
        return self._node  # type: ignore[no-any-return]

    @property
    def nodes(self) -> Mapping[str, NodeResult]:
        return MappingProxyType(self._nodes)

    @property
    def trace(self) -> Trace:
        return self._trace  # type: ignore[no-any-return]

    @overload
    def run_in_background(
        self, fn: Callable[..., Coroutine[Any, Any, T]], *args: Any
    ) -> Future[T]: ...
    @overload
    def run_in_background(self, fn: Callable[..., T], *args: Any) -> Future[T]: ...
    def run_in_background(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start ``fn(*args)`` beside the rest of the hooks and the download of this node.

        The node is ready, and ``on_after_init`` runs, when all that was started so has ended.
        What is started in ``on_after_init`` ends before the engine is built. A failure ends the
        initialization with a ``HookError`` of the callback that started it; with
        ``on_error: warn`` it is logged. When the initialization fails elsewhere an ``async def``
        function is cancelled; a thread cannot be stopped.

        Args:
            fn: A function, which runs in a thread of its own, or an ``async def`` function.
            *args: Its arguments.

        Returns:
            The result to come; nobody needs to wait for it.

        Raises:
            RuntimeError: No hook is running.
        """
        running = self._running
        if running is None:
            raise RuntimeError("ctx.run_in_background() works in hooks only; call it from a hook")
        name = getattr(fn, "__name__", type(fn).__name__)
        entry = self._entry(running.callback, running.hook, background=name)

        def run() -> Any:
            outcome = "failed"
            try:
                result = fn(*args)
                if inspect.isawaitable(result):
                    result = aio.run_coroutine(result)
                outcome = "returned"
                return result
            finally:
                entry.finish(outcome)

        call = aio.start_in_thread(run)
        self._background.append(BackgroundTask(entry, call))
        return call.future

    def __setattr__(self, name: str, value: object) -> None:
        if name in _READ_WRITE:
            object.__setattr__(self, name, value)
            return
        if name in _READ_ONLY:
            raise AttributeError(
                f"{self._who()}ctx.{name} is read-only; change one of {', '.join(_READ_WRITE)}"
            )
        raise AttributeError(self._unknown_field(name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickle and copy probe for their own names
            raise AttributeError(name)
        raise AttributeError(self._unknown_field(name))

    def __repr__(self) -> str:
        # Values of dicts stay out: env_vars and engine arguments may hold secrets.
        fields = ", ".join(
            f"{name}={sorted(map(str, value)) if isinstance(value, dict) else value}"
            for name, value in self._values.items()
        )
        return f"CallbackCtx(node={self.node}, {fields}, nodes={sorted(self._nodes)})"

    def _who(self) -> str:
        return f"callback {self._running.callback!r}: " if self._running else ""

    def _unknown_field(self, name: str) -> str:
        known = (*_READ_WRITE, *_READ_ONLY)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
        return f"{self._who()}CallbackCtx has no field {name!r}; {hint}"

    # Below is the side of the manager, which brackets each call of a callback so that errors, the
    # trace and conflicts can name who is running, and of the initialization.

    def _begin(self, callback: str, hook: str) -> tuple[TraceEntry, TraceEntry | None]:
        outer = self._running
        if outer is not None:  # a hook call inside a callback: charge it with its own changes
            self._note_changes(outer)
        entry = self._entry(callback, hook)
        if self._on_call is not None:
            self._on_call(entry)
        object.__setattr__(self, "_running", entry)
        return entry, outer

    def _entry(self, callback: str, hook: str, background: str = "") -> TraceEntry:
        entry = TraceEntry(
            callback,
            hook,
            self._role,
            self._node.id,
            background=background,
            attempt=self._attempt,
        )
        self._trace.add(entry)
        return entry

    def _end(self, entry: TraceEntry, outer: TraceEntry | None, outcome: str) -> None:
        self._note_changes(entry)
        object.__setattr__(self, "_running", outer)
        entry.finish(outcome)

    def _note_changes(self, entry: TraceEntry) -> None:
        """Charge ``entry`` with what differs from the last look."""
        try:
            if self._values == self._before:
                return
        except Exception:  # noqa: S110 - suppress() would cost more than all the rest
            pass  # an array's == has no truth value: look closer
        changes = changes_between(self._before, self._values)
        entry.changes = (*entry.changes, *changes)
        object.__setattr__(self, "_before", snapshot(self._values))
        for path in (change.path for change in changes):
            earlier = self._conflicts.get(path, entry.callback)
            if earlier != entry.callback and not path.startswith("custom_data"):
                self._trace.warn_of_conflict(path, earlier, entry.callback)
            self._conflicts[path] = entry.callback

    def _take_over(self, handled: Handled | None) -> None:
        object.__setattr__(self, "_handled", handled)

    def _adopt(self, **values: Any) -> None:
        """Set fields on behalf of the initialization itself, not of a callback."""
        for name, value in values.items():
            setattr(self, name, value)
        object.__setattr__(self, "_before", snapshot(self._values))


_READ_WRITE = tuple(name for name, value in vars(CallbackCtx).items() if isinstance(value, _Field))
_READ_ONLY = tuple(
    name
    for name, value in vars(CallbackCtx).items()
    if isinstance(value, property) and not name.startswith("_")
)
