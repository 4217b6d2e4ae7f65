"""A deployment's callbacks as they travel: parsed once, where a config is read, then frozen."""

from __future__ import annotations

import functools
import os
import re
import shlex
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import (
    BuiltinFunctionType,
    FunctionType,
    GeneratorType,
    GenericAlias,
    MethodType,
    ModuleType,
    UnionType,
)
from typing import Any, Literal

from rayserve_hooks.core.instances import ByObject, Dumps, Instance, class_refusal, identity
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import Adapt, build, explained, no_adapter
from rayserve_hooks.core.log import fields, logger
from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.core.masking import publish, redact, shown
from rayserve_hooks.core.recorder import snapshot
from rayserve_hooks.core.validation import Problem, adapter, described, problems_of
from rayserve_hooks.errors import CallbackConfigError, Problems, describe, raise_from
from rayserve_hooks.trace import TraceEntry

_KEYS = ("callback", "kwargs", "name", "on_error", "only_on_cluster")

_INSTANCE = "<instance of"
_ELSEWHERE = re.compile(r"__(mp_)?main__(?=[.:]|$)")

DISABLE_VARIABLE = "RAYSERVE_HOOKS_DISABLE"
"""Environment variable: names of callbacks to leave out, separated by commas."""


@dataclass(frozen=True)
class CallbackEntry:
    """One item of a callback list: the declarative part, which travels between processes.

    The plugin object built from it never does. ``key`` is equal for two entries that ask for the
    same plugin, in any process.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's name for its settings

    callback: Any = field(
        metadata={
            "description": "'pkg.module:Class', 'pkg.module' or a short name.",
            "json_schema_extra": {"type": "string"},
        }
    )
    kwargs: Mapping[str, Any] = described(
        "Arguments of the class's constructor.", default_factory=dict
    )
    name: str = described(
        "The callback's name in order, trace and errors.",
        {"min_length": 1, "strict": True},
        default="",
    )
    on_error: Literal["raise", "warn"] | None = described(
        "'warn' logs a failure and goes on, 'raise' ends the initialization.", default=None
    )
    only_on_cluster: bool = described(
        "Whether it can be imported on the cluster only.", {"strict": True}, default=False
    )
    key: tuple[object, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        callback = what = self.callback
        if isinstance(what, Instance):
            default_name, what = what.class_name, what.identity
        elif isinstance(what, type):
            # By identity, not by name: a notebook defines the same class anew with other code.
            default_name, what = what.__name__, identity(what)
        else:
            default_name = callback.replace(":", ".").rpartition(".")[2]
        name = self.name or default_name
        object.__setattr__(self, "name", name)
        if isinstance(callback, str) and callback.startswith(_INSTANCE):
            raise CallbackConfigError(
                f"callback {name!r} was an instance, which no file can hold; name the class with "
                "kwargs"
            )
        if isinstance(callback, str) and _ELSEWHERE.match(callback):
            raise CallbackConfigError(
                f"callback {callback!r}: in every other process {callback[:8]!r} is another "
                "module; pass the class itself, or name it in a module of its own"
            )
        if not isinstance(self.kwargs, Mapping) or not all(
            isinstance(key, str) for key in self.kwargs
        ):
            raise CallbackConfigError(
                f"callback {name!r}: kwargs is no mapping with strings as keys; write one of "
                "argument names"
            )
        try:
            # Neither what becomes of the config's dicts nor a callback that changes its arguments
            # reaches what travels.
            kwargs = snapshot(dict(self.kwargs))
            key = (name, what, _canonical(kwargs), self.on_error or "")
        except RecursionError:
            raise CallbackConfigError(
                f"callback {name!r}: kwargs hold themselves, or are nested too deep; give plain "
                "values"
            ) from None
        object.__setattr__(self, "kwargs", kwargs)
        object.__setattr__(self, "key", key)
        if isinstance(callback, Instance) and kwargs:
            raise CallbackConfigError(
                f"callback {name!r}: kwargs {sorted(kwargs)} given for an instance, which is "
                "already built; pass the class instead, or drop kwargs"
            )

    def create(self, adapt: Adapt = no_adapter, construct: bool = True) -> object:
        """Return the plugin, or the module that is one; see `build`."""
        try:
            return build(self.callback, snapshot(self.kwargs), adapt, construct)
        except CallbackConfigError as error:
            raise_from(CallbackConfigError(*map(self._named, error.problems)), error.__cause__)
        except Exception:
            raise
        except BaseException as error:  # a SystemExit would end, or hang, what builds it
            reason = redact(describe(error), self.kwargs)
            problem = f"exits where it is built: {reason}; raise an Exception there instead"
            raise_from(CallbackConfigError(self._named(problem)), masked(error, self.kwargs))

    def _named(self, problem: str) -> str:
        if problem.startswith("callback "):
            return problem
        return f"callback {self.name!r}{' ' if problem.startswith('is ') else ': '}{problem}"

    def freeze(self, dumps: Dumps) -> None:
        """Check that ``dumps`` can pickle the entry, and keep an instance's bytes."""
        advice = "give plain values as kwargs, and open clients in the hooks"
        try:
            if isinstance(self.callback, Instance):
                advice = (
                    "name the class with kwargs and open such things in its hooks, or leave them "
                    "out in __getstate__"
                )
                self.callback.freeze(dumps)
            dumps((self.callback, self.kwargs))
        except Exception as error:  # every class can refuse in its own way
            reason = describe(error)
            if isinstance(self.callback, type | Instance):
                cls = self.callback if isinstance(self.callback, type) else self.callback.cls
                refusal = class_refusal(cls, dumps)
                if refusal:
                    reason, advice = refusal, "define the class in a module that replicas have"
            reason = redact(reason, self.kwargs)
            problem = f"callback {self.name!r} cannot be sent to another process: {reason}"
            raise_from(CallbackConfigError(f"{problem}; {advice}"), masked(error, self.kwargs))

    def written(self, as_text: bool) -> dict[str, Any]:
        """Return the item of a config's list that makes this entry.

        Args:
            as_text: For a file, where a class is named. An instance is only described there, and
                refused by whoever reads it.
        """
        callback = self.callback
        if isinstance(callback, Instance) and as_text:
            callback = f"{_INSTANCE} {callback.class_name}>"
        elif isinstance(callback, type) and as_text:
            callback = f"{callback.__module__}:{callback.__qualname__}"
        written = {"callback": callback, "name": self.name}
        optional = {
            "kwargs": dict(self.kwargs),
            "on_error": self.on_error,
            "only_on_cluster": self.only_on_cluster,
        }
        return written | {key: value for key, value in optional.items() if value}

    def __repr__(self) -> str:
        # kwargs' values stay out of logs: they may be secrets.
        kwargs = f" kwargs={sorted(self.kwargs)}" if self.kwargs else ""
        callback = self.callback if isinstance(self.callback, str) else _what(self.callback)
        return f"<callback {self.name!r}: {callback}{kwargs}>"


def _canonical(value: Any) -> object:
    """Return what is equal and has the same hash for equal plain values of equal types alone."""
    kind = type(value)
    if kind is dict:
        items = ((_canonical(key), _canonical(value[key])) for key in value)
        return kind.__name__, frozenset(items)
    if kind in (list, tuple):
        return kind.__name__, tuple(map(_canonical, value))
    if kind in (set, frozenset):
        return kind.__name__, frozenset(map(_canonical, value))
    # The text: True is 1, 0.0 is -0.0, and a nan equals nothing.
    plain = kind in (str, bytes, int, bool, float, complex, type(None))
    return kind.__name__, repr(value) if plain else identity(value)


class Kept:
    """What lives in this process as long as a config does: the managers of its stack.

    It is neither compared nor sent, and a deep copy of a stack has its own.
    """

    def __init__(self) -> None:
        self.managers: dict[object, object] = {}

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


_kept = ByObject(Kept)


def kept_by(config: object) -> Kept:
    """Return what lives as long as a config whose stack is read anew each time."""
    try:
        return _kept.of(config)
    except TypeError:  # such as a dict
        return Kept()


@dataclass(frozen=True)
class Configured:
    """What ``on_configure`` leaves for each replica, besides what Serve deploys with.

    Args:
        trace: The calls, with what each one changed.
        custom_data: ``ctx.custom_data``, pickled key by key.
        callbacks: Those of the stack that could be built where the app was.
    """

    trace: tuple[TraceEntry, ...]
    custom_data: Mapping[str, bytes]
    callbacks: tuple[str, ...]


@dataclass(frozen=True)
class CallbackStack:
    """A deployment's callback list: what travels to other processes, where managers are built."""

    entries: tuple[CallbackEntry, ...] = ()
    on_error: str = "raise"  # of an entry that does not say
    time_limits: TimeLimits = field(default_factory=TimeLimits)
    deployment: str = ""  # so that two with the same list share nothing
    adapt: Adapt = no_adapter  # a function that pickles
    configured: Configured | None = field(default=None, compare=False, repr=False)
    kept: Kept = field(default_factory=Kept, compare=False, repr=False)  # all made of it share it

    @classmethod
    def parse(
        cls,
        callbacks: object,
        time_limits: object = None,
        *,
        on_error: str = "raise",
        adapt: Adapt = no_adapter,
    ) -> CallbackStack:
        """Return the stack of a config's callback list and limits.

        Args:
            callbacks: One callback or a list of them. Each is ``"pkg.module:Class"``,
                ``"pkg.module.Class"``, ``"pkg.module"``, a short name of the entry-point group
                ``rayserve_hooks``, a class, an instance, a module, or a mapping with ``callback``
                and, optional, ``kwargs``, ``name``, ``on_error`` and ``only_on_cluster``.
            time_limits: A mapping from steps to seconds; see `TimeLimits`.
            on_error: What an entry that does not say does when it fails.
            adapt: Builds the plugins of classes that are written for another interface.

        Raises:
            CallbackConfigError: An item is malformed, two have the same name, or a limit is
                wrong. What is wrong with the callbacks themselves is then reported with it.
        """
        problems = Problems()
        entries = _parse_entries(callbacks, problems)
        stack = cls(entries, on_error, adapt=adapt)
        with problems.collected(), explained("time_limits cannot be read"):
            limits = TimeLimits.parse({} if time_limits is None else time_limits)
            stack = replace(stack, time_limits=limits)
        if problems:
            with problems.collected():
                stack.here().build()
        problems.raise_all()
        return stack

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two stacks that can share a manager, in any process."""
        entries = (entry.key for entry in self.entries)
        return (self.deployment, self.on_error, self.time_limits, *entries)

    def build(self, construct: bool = True) -> list[tuple[CallbackEntry, object]]:
        """Return each entry with its plugin, in list order; an error names all that fail.

        Without ``construct`` classes are looked at, but not called.
        """
        problems = Problems()
        plugins: list[tuple[CallbackEntry, object]] = []
        for entry in self.entries:
            with problems.collected():
                plugins.append((entry, entry.create(self.adapt, construct)))
        problems.raise_all()
        return plugins

    def way_without(self, name: str | None) -> str:
        """Return how a start goes without one callback, once; nothing where it cannot.

        The variable keeps what it switches off already.
        """
        known = {entry.name for entry in self.entries}
        if name not in known or "," in name or name != name.strip():
            return ""
        off = [text.strip() for text in os.environ.get(DISABLE_VARIABLE, "").split(",")]
        names = ",".join([*filter(None, off), name])
        return f"set {DISABLE_VARIABLE}={shlex.quote(names)} to start once without it"

    def here(self) -> CallbackStack:
        """Return the stack without the callbacks that can be imported on the cluster only."""
        entries = tuple(entry for entry in self.entries if not entry.only_on_cluster)
        return self if entries == self.entries else replace(self, entries=entries)

    def freeze(self, dumps: Dumps) -> None:
        """Check that each entry can travel; an error names all that cannot."""
        problems = Problems()
        for entry in self.entries:
            with problems.collected():
                entry.freeze(dumps)
        problems.raise_all()

    def for_deployment(
        self, name: str, environment: Mapping[str, str] = os.environ
    ) -> CallbackStack:
        """Return the stack of a deployment, without what `DISABLE_VARIABLE` switches off.

        The variable is read in the replica, and where an app is built from what the replica's
        ``environment`` is going to be; what travels to the other nodes is the shortened list, so
        that all processes agree.
        """
        named = {name.strip() for name in environment.get(DISABLE_VARIABLE, "").split(",")} - {""}
        unknown = sorted(named - {entry.name for entry in self.entries})
        if unknown:
            known = ", ".join(sorted(entry.name for entry in self.entries)) or "none"
            raise CallbackConfigError(
                f"{DISABLE_VARIABLE} names {unknown[0]!r}, which is no callback of this "
                f"deployment; use names of its callbacks (known: {known})"
            )
        for switched_off in sorted(named):
            text, extra = "callback %r is switched off by %s", fields(callback=switched_off)
            logger.warning(text, switched_off, DISABLE_VARIABLE, extra=extra)
        entries = tuple(entry for entry in self.entries if entry.name not in named)
        return replace(self, entries=entries, deployment=name)


def _parse_entries(value: object, problems: Problems) -> tuple[CallbackEntry, ...]:
    entries: list[CallbackEntry] = []
    items: Iterable[object] = [value]
    if issubclass(type(value), list | tuple):
        with explained("callbacks cannot be read"):
            items = tuple(typing.cast("Iterable[object]", value))
    for index, item in enumerate(items):
        where = f"callbacks[{index}]"
        # A value of any class can have code of its own wherever one looks at it.
        with problems.collected(), explained(f"{where} cannot be read"):
            entries.append(_parse(item, where))
    names = [entry.name for entry in entries]
    publish(*names)
    for name in sorted({name for name in names if names.count(name) > 1}):
        with problems.collected():
            raise CallbackConfigError(
                f"callbacks has more than one callback named {name!r}; give each its own name: "
                "{callback: ..., name: ...}"
            )
    return tuple(entries)


def _parse(item: object, where: str) -> CallbackEntry:
    from pydantic import ValidationError

    if type(item) is CallbackEntry:
        return item
    if not issubclass(type(item), Mapping):
        rest = "an instance, a module, or a mapping with 'callback'"
        return CallbackEntry(_callback(item, where, rest))
    item = typing.cast("Mapping[Any, Any]", item)
    optional = ("callback", "kwargs", "name", "on_error")
    written = {key: item[key] for key in item if key not in optional or item[key] is not None}
    if "callback" in written:
        rest = "an instance or a module"
        written["callback"] = _callback(item["callback"], f"{where}: callback", rest)
    kwargs = written.get("kwargs", {})
    if not issubclass(type(kwargs), Mapping):  # pydantic would ask it for its class
        raise CallbackConfigError(
            f"{where}: kwargs is {type(kwargs).__name__}; write a mapping of argument names"
        )
    try:
        entry = adapter(CallbackEntry).validate_python(written)
    except ValidationError as error:
        problems = list(problems_of(error, _KEYS))
        if len(problems) > 1:  # a misspelt 'callback' is one problem, not two
            problems = [problem for problem in problems if not problem.text.startswith("has no")]
        raise CallbackConfigError(*(_message(p, item, where) for p in problems)) from None
    if entry.only_on_cluster and not isinstance(entry.callback, str):
        raise CallbackConfigError(_not_elsewhere(item, where))
    return entry


def _callback(value: object, where: str, rest: str) -> str | type | Instance:
    kind = type(value)  # not isinstance(), for which a proxy runs code
    origin = getattr(value, "__origin__", None) if issubclass(kind, _ALIASES) else None
    if isinstance(origin, type):
        raise CallbackConfigError(
            f"{where} is a parametrized {origin.__name__}, which is no class; write "
            f"{origin.__name__} itself"
        )
    if value is None or issubclass(kind, _NO_CALLBACKS):
        raise CallbackConfigError(
            f"{where} is {_what(value)}; write a string such as 'pkg.module:Class', a class, {rest}"
        )
    if issubclass(kind, ModuleType):
        return typing.cast("ModuleType", value).__name__
    if issubclass(kind, str | type | Instance):  # an Instance is what dumping a config leaves
        return typing.cast("str | type | Instance", value)
    return Instance(value)


_ALIASES = (GenericAlias, UnionType, type(typing.Sequence[int]))
_NO_CALLBACKS = (
    *_ALIASES,
    *(bool, int, float, complex, bytes, bytearray, list, tuple, set, frozenset, range),
    *(FunctionType, BuiltinFunctionType, MethodType, functools.partial, GeneratorType),
)


def _what(value: object) -> str:
    """Return what names a value in an error: its own text only where it is plain."""
    if isinstance(value, type):
        return f"<class '{value.__module__}.{value.__qualname__}'>"
    if isinstance(value, Instance):
        return repr(value)
    text = shown(value)
    return f"a {type(value).__name__}" if text.startswith("<") else text


def _message(problem: Problem, item: Mapping[Any, Any], where: str) -> str:
    if problem.path == "only_on_cluster":
        return _not_elsewhere(item, where)
    if problem.path == "name":
        return f"{where}: name is {_what(item['name'])}; write a string"
    if not problem.path and not problem.of_key:  # of CallbackEntry itself
        return problem.text
    if problem.text.startswith("has no"):
        return f"{where} names no callback; add 'callback: pkg.module:Class'"
    known = f"; known keys: {', '.join(_KEYS)}" if problem.of_key and not problem.path else ""
    return problem.in_config(where) + known


def _not_elsewhere(item: Mapping[Any, Any], where: str) -> str:
    return (
        f"{where}: only_on_cluster is {_what(item['only_on_cluster'])} for callback "
        f"{_what(item.get('callback'))}; write true, and name the callback by a string"
    )
