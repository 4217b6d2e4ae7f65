"""A deployment's callbacks as they travel: parsed once, where a config is read, then frozen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

from rayserve_hooks.core.instances import Dumps, Instance, identity
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import Adapt, build, no_adapter
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import snapshot
from rayserve_hooks.core.validation import Problem, adapter, described, problems_of
from rayserve_hooks.errors import CallbackConfigError, Problems, describe

_KEYS = ("callback", "kwargs", "name", "on_error", "only_on_cluster")

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
        "The callback's name in order, trace and errors.", {"min_length": 1}, default=""
    )
    on_error: Literal["raise", "warn"] | None = described(
        "'warn' logs a failure and goes on, 'raise' ends the initialization.", default=None
    )
    only_on_cluster: bool = described(
        "Whether it can be imported on the cluster only.", {"strict": True}, default=False
    )
    key: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        callback = what = self.callback
        if isinstance(what, Instance):
            default_name, what = what.class_name, what.identity
        elif isinstance(what, type):
            # By identity, not by name: a notebook defines the same class anew with other code.
            default_name, what = what.__name__, identity(what)
        else:
            default_name = callback.replace(":", ".").rpartition(".")[2]
        # Neither what becomes of the config's dicts nor a callback that changes its arguments
        # reaches what travels.
        kwargs, name = snapshot(dict(self.kwargs)), self.name or default_name
        object.__setattr__(self, "kwargs", kwargs)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "key", (name, what, _canonical(kwargs), self.on_error or ""))
        if isinstance(callback, Instance) and kwargs:
            raise CallbackConfigError(
                f"callback {name!r}: kwargs {sorted(kwargs)} given for an instance, which is "
                "already built; pass the class instead, or drop kwargs"
            )

    def create(self, adapt: Adapt = no_adapter) -> object:
        """Return the plugin, or the module that is one."""
        try:
            return build(self.callback, snapshot(self.kwargs), adapt)
        except CallbackConfigError as error:
            raise CallbackConfigError(*map(self._named, error.problems)) from error.__cause__
        except Exception:
            raise
        except BaseException as error:  # a SystemExit would end, or hang, what builds it
            reason = redact(describe(error), self.kwargs)
            raise CallbackConfigError(
                self._named(f"exits where it is built: {reason}; raise an Exception there instead")
            ) from (error if reason == describe(error) else None)

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
            raise CallbackConfigError(
                f"callback {self.name!r} cannot be sent to another process: {describe(error)}; "
                f"{advice}"
            ) from error

    def __repr__(self) -> str:
        # kwargs' values stay out of logs: they may be secrets.
        kwargs = f" kwargs={sorted(self.kwargs)}" if self.kwargs else ""
        return f"<callback {self.name!r}: {self.callback!s}{kwargs}>"


def _canonical(kwargs: Mapping[str, Any]) -> str:
    try:
        return json.dumps(kwargs, sort_keys=True, default=identity)
    except TypeError:  # keys that are no strings
        return repr(sorted((str(name), repr(value)) for name, value in kwargs.items()))


@dataclass(frozen=True)
class CallbackStack:
    """A deployment's callback list: what travels to other processes, where managers are built."""

    entries: tuple[CallbackEntry, ...] = ()
    on_error: str = "raise"  # of an entry that does not say
    time_limits: TimeLimits = field(default_factory=TimeLimits)
    deployment: str = ""  # so that two with the same list share nothing
    adapt: Adapt = no_adapter  # a function that pickles

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
        with problems.collected():
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

    def build(self) -> list[tuple[CallbackEntry, object]]:
        """Return each entry with its plugin, in list order; an error names all that fail."""
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
        """Check that each entry can travel; an error names all that cannot."""
        problems = Problems()
        for entry in self.entries:
            with problems.collected():
                entry.freeze(dumps)
        problems.raise_all()

    def for_deployment(self, name: str) -> CallbackStack:
        """Return the stack of a deployment, without what `DISABLE_VARIABLE` switches off.

        The variable is read in the replica; what travels to the other nodes is the shortened
        list, so that all processes agree.
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


def _parse(item: object, where: str) -> CallbackEntry:
    from pydantic import ValidationError

    if isinstance(item, CallbackEntry):
        return item
    if not isinstance(item, Mapping):
        rest = "an instance, a module, or a mapping with 'callback'"
        return CallbackEntry(_callback(item, where, rest))
    optional = ("callback", "kwargs", "name", "on_error")
    written = {key: item[key] for key in item if key not in optional or item[key] is not None}
    if "callback" in written:
        rest = "an instance or a module"
        written["callback"] = _callback(item["callback"], f"{where}: callback", rest)
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
    if value is None or isinstance(value, bool | int | float | bytes):
        raise CallbackConfigError(
            f"{where} is {value!r}; write a string such as 'pkg.module:Class', a class, {rest}"
        )
    if isinstance(value, ModuleType):
        return value.__name__
    return value if isinstance(value, str | type) else Instance(value)


def _message(problem: Problem, item: Mapping[Any, Any], where: str) -> str:
    if problem.path == "only_on_cluster":
        return _not_elsewhere(item, where)
    if problem.path == "kwargs" and not problem.of_key:  # its value may hold a secret
        kind = type(item["kwargs"]).__name__
        return f"{where}: kwargs is {kind}; write a mapping of argument names"
    if problem.path == "name":
        return f"{where}: name is {item['name']!r}; write a string"
    if not problem.path and not problem.of_key:  # of CallbackEntry itself
        return problem.text
    if problem.text.startswith("has no"):
        return f"{where} names no callback; add 'callback: pkg.module:Class'"
    known = f"; known keys: {', '.join(_KEYS)}" if problem.of_key and not problem.path else ""
    return problem.in_config(where) + known


def _not_elsewhere(item: Mapping[Any, Any], where: str) -> str:
    return (
        f"{where}: only_on_cluster is {item['only_on_cluster']!r} for callback "
        f"{item.get('callback')!r}; write true, and name the callback by a string"
    )
