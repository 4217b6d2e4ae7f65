"""`CallbackCtx`, the state of one start of a replica, and the values it holds."""

from __future__ import annotations

import copy
import enum
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from rayserve_hooks.errors import did_you_mean
from rayserve_hooks.trace import Trace

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup
    from vllm.engine.protocol import EngineClient


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
            f"{_shown(value)} is not a download mode; use one of "
            f"{', '.join(sorted(cls.__members__))}"
        )


def _shown(value: object) -> str:
    """Return the repr of a plain value; that of another object may show anything."""
    inner = [value.value] if isinstance(value, enum.Enum) else [value]
    if type(value) in (list, tuple):
        inner = list(value)  # type: ignore[call-overload]
    plain = all(type(item) in (str, int, bool, float, type(None)) for item in inner)
    return repr(value) if plain else f"a {type(value).__name__}"


DownloadMode = (
    NodeModelDownloadable
    | Literal["MODEL_AND_TOKENIZER", "TOKENIZER_ONLY", "EXCLUDE_SAFETENSORS", "NONE"]
    | enum.Enum
)
"""What may be assigned as a download mode: our enum, its plain name, or Ray's enum."""


@dataclass(frozen=True)
class Handled:
    """A hook's result that says "done, skip the rest".

    Args:
        model_path: The model's folder, which must be there, or an id the engine can load; None
            leaves the engine's model as configured.
        reason: Why, for the log and the trace.

    Attributes:
        callback: Name of the callback that has returned it, in ``ctx.handled`` and
            ``ctx.nodes``; empty before.
        skipped: Names of the callbacks of which a hook did not run because of it, likewise.

    Raises:
        TypeError: ``model_path`` or ``reason`` has another type.
        ValueError: ``model_path`` is empty.
    """

    model_path: str | os.PathLike[str] | None = None
    reason: str = ""
    callback: str = field(default="", init=False, compare=False)
    skipped: tuple[str, ...] = field(default=(), init=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.model_path, os.PathLike):
            # Absolute, so that it is no model's id.
            path = os.path.abspath(os.fspath(self.model_path))  # noqa: PTH100 - of any path class
            object.__setattr__(self, "model_path", path)
        if not isinstance(self.model_path, str | None):
            raise TypeError(
                f"Handled(model_path=...) takes a path or None, got {self.model_path!r}"
            )
        if self.model_path == "":
            raise ValueError("Handled(model_path='') names no folder; give a path or None")
        if not isinstance(self.reason, str):
            raise TypeError(f"Handled(reason=...) takes a string, got {self.reason!r}")

    def returned_by(self, callback: str, skipped: Sequence[str]) -> Handled:
        """Return a copy that says whose result it is, and whom it skips."""
        named = copy.copy(self)
        object.__setattr__(named, "callback", callback)
        object.__setattr__(named, "skipped", tuple(skipped))
        return named


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
class ProcessInfo:
    """A process in which hooks run.

    Args:
        role: ``"driver"`` (where an app is built, or an initialization outside of Ray Serve),
            ``"replica"``, ``"node"`` (the process of another node), ``"engine config"`` (the task
            that makes the engine's config on a GPU), ``"engine core"`` or ``"worker"``.
        rank: Of a worker its rank, of the engine core of a data-parallel engine its number; else
            None.
        pid: The process id on its node; by default this process's.
    """

    role: str = "driver"
    rank: int | None = None
    pid: int = field(default_factory=os.getpid)

    def __str__(self) -> str:
        return self.role if self.rank is None else f"{self.role} {self.rank}"


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
        download_bytes: What it fetched from an object store, without what was there already.
        download_start: When it began, in seconds since the epoch; 0.0 when there was none.
    """

    node: NodeInfo
    model_path: str | None
    custom_data: Mapping[str, Any] = field(repr=False)
    handled: Handled | None
    hook_s: float
    download_s: float
    download_bytes: int = 0
    download_start: float = 0.0


@dataclass(frozen=True)
class DeferredConfig:
    """A config that ``load`` returns when a callback first touches ``ctx.llm_config``.

    That imports Ray's ``LLMConfig``, which takes seconds; most node processes never need it.
    """

    load: Callable[[], LLMConfig]


LOGGER_NAME = "ray.serve.rayserve_hooks"
"""A child of Ray Serve's logger ``ray.serve``: in a replica that one alone is set up to write INFO
records, to the replica's own log file and to its output."""


class ContextLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records say, besides their text, who logs them.

    Serve's JSON logs show these fields: ``callback``, ``hook``, ``phase``, ``node`` and
    ``seconds``, as far as there is one. An ``extra`` of one's own is added to them.

    Args:
        callback: The callback's name, which is the last part of the logger's.
        fields: Called for the fields of each record.
    """

    def __init__(self, callback: str = "", fields: Callable[[], Mapping[str, Any]] = dict) -> None:
        super().__init__(logging.getLogger(f"{LOGGER_NAME}.{callback}".rstrip(".")), None)
        self._fields = fields

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the fields to a record's ``extra``, as `logging.LoggerAdapter` has it."""
        return msg, {**kwargs, "extra": {**self._fields(), **(kwargs.get("extra") or {})}}


@dataclass(slots=True)
class CtxState:
    """What is behind a `CallbackCtx`; besides it only `rayserve_hooks.core.recorder` uses it."""

    llm_config: Any
    node: NodeInfo
    process: ProcessInfo
    nodes: dict[str, NodeResult]
    handled: Handled | None
    engine: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    recorder: Any = None  # of core, which the contract does not know


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
        return ctx._state.values[self._name]  # type: ignore[no-any-return] # noqa: SLF001 - its own

    def __set__(self, ctx: CallbackCtx, value: Set) -> None:
        state = ctx._state  # noqa: SLF001 - a field is a part of its context
        try:
            state.values[self._name] = self._parse(value)
        except (TypeError, ValueError) as error:
            raise type(error)(_blamed(state, f"cannot set ctx.{self._name}: {error}")) from None
        if state.recorder is not None:
            state.recorder.note_assignment(self._name)


class _ConfigureField(_Field[Mapping[str, Any], Mapping[str, Any]]):
    """A field that counts in ``on_configure`` only; in later hooks all of it is read-only."""

    @overload
    def __get__(self, ctx: None, owner: type) -> _ConfigureField: ...
    @overload
    def __get__(self, ctx: CallbackCtx, owner: type) -> dict[str, Any]: ...
    def __get__(self, ctx: CallbackCtx | None, owner: type) -> dict[str, Any] | _ConfigureField:
        if ctx is None:
            return self
        state = ctx._state  # noqa: SLF001 - a field is a part of its context
        value: dict[str, Any] = state.values[self._name]
        return value if self._counts(state) else _fixed(value, self._too_late(state))

    def __set__(self, ctx: CallbackCtx, value: Mapping[str, Any]) -> None:
        state = ctx._state  # noqa: SLF001 - as above
        if not self._counts(state):
            raise AttributeError(self._too_late(state))
        super().__set__(ctx, value)

    @staticmethod
    def _counts(state: CtxState) -> bool:
        running = state.recorder and state.recorder.running
        return not running or running.hook == "on_configure"

    def _too_late(self, state: CtxState) -> str:
        return _blamed(
            state,
            f"ctx.{self._name} counts in on_configure only, before Serve reserves anything; set it "
            f"there, or set {self._name} of the LLMConfig",
        )


def _blamed(state: CtxState, text: str) -> str:
    """Return an error's text with the name of the callback that is running, if one is."""
    running = state.recorder and state.recorder.running
    return f"callback {running.callback!r}: {text}" if running else text


def _parse_dict(value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} is not a dict; assign a dict with string keys")
    wrong = [key for key in value if not isinstance(key, str)]
    if wrong:
        raise TypeError(f"key {wrong[0]!r} is not a string; use string keys")
    return value


class _Fixed:
    """Refuses each change of a container with an AttributeError that says why."""

    why = ""

    def refuse(self, *_: object, **__: object) -> Any:
        raise AttributeError(self.why)

    __setitem__ = __delitem__ = clear = pop = refuse


class _FixedDict(_Fixed, dict[Any, Any]):
    popitem = setdefault = update = __ior__ = _Fixed.refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class _FixedList(_Fixed, list[Any]):
    append = extend = insert = remove = reverse = sort = _Fixed.refuse
    __iadd__ = __imul__ = _Fixed.refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _fixed(value: Any, why: str) -> Any:
    """Return a copy of dicts and lists, and of those in them, that refuses each change."""
    made: Any
    if isinstance(value, dict):
        made = _FixedDict({key: _fixed(item, why) for key, item in value.items()})
    elif isinstance(value, list):
        made = _FixedList(_fixed(item, why) for item in value)
    else:
        return value
    made.why = why
    return made


def _parse_placement_group(value: PlacementGroup | None) -> PlacementGroup | None:
    # Ray is not imported for this check: whoever has a placement group has imported it.
    if value is not None and not (hasattr(value, "id") and hasattr(value, "bundle_specs")):
        raise TypeError(
            f"{value!r} is not a placement group; assign what ray.util.placement_group() returns"
        )
    return value


class CallbackCtx:
    """The state of one start of a replica; hooks read and change it.

    Every assignment is checked at once. On the replica's own node all hooks share one context;
    each other node gets a copy. ``CallbackCtx(llm_config=config)`` makes one for a test, without
    Ray; ``config`` may be a stand-in.

    Args:
        llm_config: The deployment's config; all other arguments are optional and set the field of
            their name.

    Attributes:
        llm_config: The deployment's config. Read-only: assigning it raises.
        local_node_download_model: What the replica's own node downloads.
        worker_node_download_model: What every other node of the placement group downloads.
        placement_group: The Ray placement group whose nodes are initialized. None until a
            callback sets it or, after ``on_before_init``, the default one is created; inside a
            Serve replica it is Serve's from the start.
        placement_group_config: The bundles and the strategy that Serve reserves for a replica, as
            the ``LLMConfig`` has them. It counts in ``on_configure``; later it is read-only.
        runtime_env: The runtime environment of the replica (as ``on_configure`` leaves it), of the
            node processes and of the engine's workers.
        extra_init_kwargs: Merged into the engine's keyword arguments before the engine starts.
        custom_data: The callbacks' own shared state.
        handled: What a callback returned from ``on_before_init`` to take over the initialization,
            with that callback's name and whom it skips; None if none did. What ended
            ``on_before_download`` is in ``nodes``. Read-only.
        process: The process this call runs in: its role, its rank where it has one, its id.
            Read-only.
        node: The node this call runs on. Read-only.
        nodes: By node id, what each node's initialization left; empty before the downloads.
            Read-only.
        engine: vLLM's client of the engine, in ``on_engine_ready`` and ``on_shutdown``; earlier it
            raises a ``RuntimeError``. Read-only.
        log: The logger of the callback that runs, named after it. In a replica its records are in
            the replica's log, on another node in that of the worker process. Read-only.
        trace: Who ran, where, how long, and what each one changed. Read-only.

    Raises:
        TypeError, ValueError: A value does not fit its field.
    """

    local_node_download_model = _Field[NodeModelDownloadable, DownloadMode](
        NodeModelDownloadable.parse
    )
    worker_node_download_model = _Field[NodeModelDownloadable, DownloadMode](
        NodeModelDownloadable.parse
    )
    placement_group = _Field["PlacementGroup | None", "PlacementGroup | None"](
        _parse_placement_group
    )
    placement_group_config = _ConfigureField(_parse_dict)
    runtime_env = _Field[dict[str, Any], dict[str, Any]](_parse_dict)
    extra_init_kwargs = _Field[dict[str, Any], dict[str, Any]](_parse_dict)
    custom_data = _Field[dict[str, Any], dict[str, Any]](_parse_dict)

    def __init__(
        self,
        *,
        llm_config: Any,
        node: NodeInfo | None = None,
        process: ProcessInfo | None = None,
        local_node_download_model: DownloadMode = NodeModelDownloadable.MODEL_AND_TOKENIZER,
        worker_node_download_model: DownloadMode = NodeModelDownloadable.MODEL_AND_TOKENIZER,
        placement_group: PlacementGroup | None = None,
        placement_group_config: dict[str, Any] | None = None,
        runtime_env: dict[str, Any] | None = None,
        extra_init_kwargs: dict[str, Any] | None = None,
        custom_data: dict[str, Any] | None = None,
        nodes: Mapping[str, NodeResult] | None = None,
        handled: Handled | None = None,
        engine: EngineClient | None = None,
    ) -> None:
        node = node or NodeInfo("local", "127.0.0.1", is_local=True)
        process = process or ProcessInfo()
        state = CtxState(llm_config, node, process, dict(nodes or {}), handled, engine)
        object.__setattr__(self, "_state", state)
        self.local_node_download_model = local_node_download_model
        self.worker_node_download_model = worker_node_download_model
        self.placement_group = placement_group
        self.placement_group_config = (
            {} if placement_group_config is None else placement_group_config
        )
        self.runtime_env = {} if runtime_env is None else runtime_env
        self.extra_init_kwargs = {} if extra_init_kwargs is None else extra_init_kwargs
        self.custom_data = {} if custom_data is None else custom_data

    if TYPE_CHECKING:
        _state: CtxState  # set past __setattr__, which type checkers do not see

    @property
    def llm_config(self) -> LLMConfig:
        """The deployment's config; on another node it is loaded at the first access."""
        state = self._state
        if isinstance(state.llm_config, DeferredConfig):
            state.llm_config = state.llm_config.load()
        return state.llm_config  # type: ignore[no-any-return]

    @property
    def handled(self) -> Handled | None:
        """What a callback has returned from ``on_before_init`` to take over; None if none has."""
        return self._state.handled

    @property
    def node(self) -> NodeInfo:
        """The node this call runs on."""
        return self._state.node

    @property
    def process(self) -> ProcessInfo:
        """The process this call runs in."""
        return self._state.process

    @property
    def engine(self) -> EngineClient:
        """VLLM's client of the engine; only from ``on_engine_ready`` on."""
        if self._state.engine is None:
            text = "ctx.engine is there once the engine is up; use it in on_engine_ready"
            raise RuntimeError(_blamed(self._state, text))
        return self._state.engine  # type: ignore[no-any-return]

    @property
    def nodes(self) -> Mapping[str, NodeResult]:
        """By node id, what each node's initialization left; empty before the downloads."""
        return MappingProxyType(self._state.nodes)

    @property
    def log(self) -> ContextLogger:
        """The logger of the callback that runs, named after it."""
        recorder = self._state.recorder
        return ContextLogger() if recorder is None else recorder.log()

    @property
    def trace(self) -> Trace:
        """Who ran, where, how long, and what each call changed."""
        return self._state.trace

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
            The result to come; awaiting it is optional.

        Raises:
            RuntimeError: No hook is running.
        """
        recorder = self._state.recorder
        if recorder is None or recorder.running is None:
            raise RuntimeError("ctx.run_in_background() works in hooks only; call it from a hook")
        return recorder.run_in_background(fn, *args)  # type: ignore[no-any-return]

    # Hidden from type checkers, for which a name that is not declared must not exist.
    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: object) -> None:
            if name in _READ_WRITE:
                object.__setattr__(self, name, value)
                return
            text = _unknown_field(name)
            if name in _READ_ONLY:
                text = f"ctx.{name} is read-only; change one of {', '.join(_READ_WRITE)}"
            raise AttributeError(_blamed(self._state, text))

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # pickle and copy probe for their own names
                raise AttributeError(name)
            raise AttributeError(_blamed(self._state, _unknown_field(name)))

    def __repr__(self) -> str:
        # Values of dicts stay out: env_vars and engine arguments may hold secrets.
        fields = ", ".join(
            f"{name}={sorted(map(str, value)) if isinstance(value, dict) else value}"
            for name, value in self._state.values.items()
        )
        return f"CallbackCtx(node={self.node}, {fields}, nodes={sorted(self.nodes)})"


def _unknown_field(name: str) -> str:
    known = (*_READ_WRITE, *_READ_ONLY)
    hint = did_you_mean(name, known) or f"; use one of {', '.join(known)}"
    return f"CallbackCtx has no field {name!r}{hint}"


_READ_WRITE = tuple(name for name, value in vars(CallbackCtx).items() if isinstance(value, _Field))
_READ_ONLY = tuple(name for name, value in vars(CallbackCtx).items() if isinstance(value, property))
