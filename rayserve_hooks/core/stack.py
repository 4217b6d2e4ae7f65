"""A deployment's callbacks as they travel: parsed once, where a config is read, then frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from rayserve_hooks.core.instances import Dumps, Instance, identity
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import Adapt, build, no_adapter
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.recorder import snapshot
from rayserve_hooks.core.suggest import did_you_mean
from rayserve_hooks.errors import CallbackConfigError, Problems, describe

ON_ERROR = ("raise", "warn")
_KEYS = ("callback", "kwargs", "name", "on_error", "only_on_cluster")

DISABLE_VARIABLE = "RAYSERVE_HOOKS_DISABLE"
"""Environment variable: names of callbacks to leave out, separated by commas."""


@dataclass(frozen=True)
class CallbackEntry:
    """One item of a callback list: the declarative part, which travels between processes.

    The plugin object built from it never does.

    Args:
        target: What names the callback; see `CallbackStack.parse`.
        kwargs: Constructor arguments; only for a class.
        name: The callback's name in order, trace and errors.
        on_error: ``"raise"`` or ``"warn"``; None means what the deployment's config says.
        only_on_cluster: Whether the callback can be imported on the cluster only, for example
            from a ``runtime_env`` package; what is wrong with it is then found there.
        key: Equal for two entries that ask for the same plugin, in any process.
    """

    target: str | type | Instance
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    on_error: str | None = None
    only_on_cluster: bool = False
    key: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Neither what becomes of the config's dicts nor a callback that changes its arguments
        # reaches what travels.
        object.__setattr__(self, "kwargs", snapshot(dict(self.kwargs)))
        if not self.name:
            object.__setattr__(self, "name", _default_name(self.target))
        # A class by identity, not by name: a notebook defines the same one anew with other code.
        what = self.target
        if isinstance(what, Instance):
            what = what.identity
        elif isinstance(what, type):
            what = identity(what)
        key = (self.name, what, _canonical(self.kwargs), self.on_error or "")
        object.__setattr__(self, "key", key)
        if isinstance(self.target, Instance) and self.kwargs:
            raise CallbackConfigError(
                f"callback {self.name!r}: kwargs {sorted(self.kwargs)} given for an instance, "
                "which is already built; pass the class instead, or drop kwargs"
            )

    def create(self, adapt: Adapt = no_adapter) -> object:
        """Build the plugin, or import the module that is one.

        Raises:
            CallbackConfigError: It cannot be imported or built, or is not a callback.
        """
        try:
            return build(self.target, snapshot(self.kwargs), adapt)
        except CallbackConfigError as error:
            texts = (self._named(problem) for problem in error.problems)
            raise CallbackConfigError(*texts) from error.__cause__

    def _named(self, problem: str) -> str:
        if problem.startswith("callback "):
            return problem
        return f"callback {self.name!r}{' ' if problem.startswith('is ') else ': '}{problem}"

    def freeze(self, dumps: Dumps) -> None:
        """Check that the entry can be sent to another process, and keep an instance's bytes.

        Args:
            dumps: Pickles a value as it will be for its journey.

        Raises:
            CallbackConfigError: A value cannot be pickled.
        """
        instance = isinstance(self.target, Instance)
        try:
            if isinstance(self.target, Instance):
                self.target.freeze(dumps)
            dumps((self.target, self.kwargs))
        except Exception as error:  # every class can refuse in its own way
            advice = "give plain values as kwargs, and open clients in the hooks"
            if instance:
                advice = (
                    "name the class with kwargs and open such things in its hooks, or leave them "
                    "out in __getstate__"
                )
            raise CallbackConfigError(
                f"callback {self.name!r} cannot be sent to another process: {describe(error)}; "
                f"{advice}"
            ) from error

    def __repr__(self) -> str:
        # kwargs' values stay out of logs: they may be secrets.
        kwargs = f" kwargs={sorted(self.kwargs)}" if self.kwargs else ""
        return f"<callback {self.name!r}: {self.target!s}{kwargs}>"


def _canonical(kwargs: Mapping[str, Any]) -> str:
    try:
        return json.dumps(kwargs, sort_keys=True, default=identity)
    except TypeError:  # keys that are no strings
        return repr(sorted((str(name), repr(value)) for name, value in kwargs.items()))


def _default_name(target: str | type | Instance) -> str:
    if isinstance(target, str):
        return target.replace(":", ".").rpartition(".")[2]
    return target.class_name if isinstance(target, Instance) else target.__name__


@dataclass(frozen=True)
class CallbackStack:
    """A deployment's callback list: what travels to other processes, where managers are built.

    Args:
        entries: The callbacks, in list order.
        on_error: What an entry that does not say does when it fails.
        time_limits: How long the steps of an initialization may take.
        deployment: Name of the deployment, so that two with the same list share nothing.
        adapt: Builds the plugins of classes that are written for another interface; a function
            that pickles.
    """

    entries: tuple[CallbackEntry, ...] = ()
    on_error: str = "raise"
    time_limits: TimeLimits = field(default_factory=TimeLimits)
    deployment: str = ""
    adapt: Adapt = no_adapter

    @classmethod
    def parse(
        cls,
        callbacks: object,
        time_limits: object = None,
        *,
        on_error: str = "raise",
        adapt: Adapt = no_adapter,
    ) -> CallbackStack:
        """Read a config's callback list and limits.

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
        limits = TimeLimits()
        with problems.collected():
            limits = TimeLimits.parse({} if time_limits is None else time_limits)
        stack = cls(entries, on_error, limits, adapt=adapt)
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

    def build(self) -> list[tuple[CallbackEntry, object]]:
        """Build the plugin of each entry, in list order.

        Raises:
            CallbackConfigError: Some cannot be imported or built, or are no callbacks; names all.
        """
        problems = Problems()
        plugins: list[tuple[CallbackEntry, object]] = []
        for entry in self.entries:
            with problems.collected():
                plugins.append((entry, entry.create(self.adapt)))
        problems.raise_all()
        return plugins

    def here(self) -> CallbackStack:
        """Return the stack without the callbacks that can be imported on the cluster only."""
        entries = tuple(entry for entry in self.entries if not entry.only_on_cluster)
        return self if entries == self.entries else replace(self, entries=entries)

    def freeze(self, dumps: Dumps) -> None:
        """Check that every entry can travel; see `CallbackEntry.freeze`.

        Raises:
            CallbackConfigError: Some cannot; names all.
        """
        problems = Problems()
        for entry in self.entries:
            with problems.collected():
                entry.freeze(dumps)
        problems.raise_all()

    def for_deployment(self, name: str) -> CallbackStack:
        """Return the stack of a deployment, without what `DISABLE_VARIABLE` switches off.

        The variable is read in the replica; what travels to the other nodes is the shortened
        list, so that all processes agree.

        Args:
            name: The deployment's name.

        Raises:
            CallbackConfigError: The variable names a callback that is not in the list.
        """
        named = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
        unknown = sorted(named - {entry.name for entry in self.entries})
        if unknown:
            known = ", ".join(sorted(entry.name for entry in self.entries)) or "none"
            raise CallbackConfigError(
                f"{DISABLE_VARIABLE} names {unknown[0]!r}, which is no callback of this "
                f"deployment; use names of its callbacks (known: {known})"
            )
        for switched_off in sorted(named):
            logger.warning("callback %r is switched off by %s", switched_off, DISABLE_VARIABLE)
        entries = tuple(entry for entry in self.entries if entry.name not in named)
        return replace(self, entries=entries, deployment=name)


def _parse_entries(value: object, problems: Problems) -> tuple[CallbackEntry, ...]:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    entries: list[CallbackEntry] = []
    for index, item in enumerate(items):
        with problems.collected():
            entries.append(_parse(item, f"callbacks[{index}]"))
    names = [entry.name for entry in entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        with problems.collected():
            raise CallbackConfigError(
                f"callbacks has more than one callback named {name!r}; give each its own name: "
                "{callback: ..., name: ...}"
            )
    return tuple(entries)


def _target(value: object) -> str | type | Instance:
    if isinstance(value, ModuleType):
        return value.__name__
    return value if isinstance(value, str | type) else Instance(value)


def _parse(item: object, where: str) -> CallbackEntry:
    if isinstance(item, CallbackEntry):
        return item
    if _is_no_callback(item):
        raise CallbackConfigError(
            f"{where} is {item!r}; write a string such as 'pkg.module:Class', a class, an "
            "instance, a module, or a mapping with 'callback'"
        )
    if not isinstance(item, Mapping):
        return CallbackEntry(_target(item))
    unknown = sorted(set(item) - set(_KEYS), key=str)
    if unknown:
        raise CallbackConfigError(
            f"{where} has unknown key {unknown[0]!r}{did_you_mean(unknown[0], _KEYS)}; "
            f"known keys: {', '.join(_KEYS)}"
        )
    if item.get("callback") is None:
        raise CallbackConfigError(f"{where} names no callback; add 'callback: pkg.module:Class'")
    if _is_no_callback(item["callback"]):
        raise CallbackConfigError(
            f"{where}: callback is {item['callback']!r}; write a string such as "
            "'pkg.module:Class', a class, an instance or a module"
        )
    name = item.get("name")
    if name is not None and not (isinstance(name, str) and name):
        raise CallbackConfigError(f"{where}: name is {name!r}; write a string")
    kwargs = item.get("kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise CallbackConfigError(
            f"{where}: kwargs is {type(kwargs).__name__}; write a mapping of argument names"
        )
    on_error = item.get("on_error")
    if on_error is not None and on_error not in ON_ERROR:
        raise CallbackConfigError(
            f"{where}: on_error is {on_error!r}; use one of {', '.join(ON_ERROR)}"
        )
    elsewhere = item.get("only_on_cluster", False)
    if not isinstance(elsewhere, bool) or (elsewhere and not isinstance(item["callback"], str)):
        raise CallbackConfigError(
            f"{where}: only_on_cluster is {elsewhere!r} for callback {item['callback']!r}; write "
            "true, and name the callback by a string"
        )
    return CallbackEntry(_target(item["callback"]), kwargs, name or "", on_error, elsewhere)


def _is_no_callback(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | bytes)
