"""From what a config names, such as ``"pkg.module:Class"``, to a plugin object."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.core import instances
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, Problems, describe
from rayserve_hooks.hookspecs import HOOK_PARAMETERS, HOOKS, RayServeLLMCallback

ENTRY_POINT_GROUP = "rayserve_hooks"
ON_ERROR = ("raise", "warn")
_KEYS = ("callback", "kwargs", "name", "on_error", "only_on_cluster")


class CallbackEntry:
    """One item of a callback list: the declarative part, which travels between processes.

    What travels is a string, a class or a module's name with constructor arguments; or, for an
    instance, the bytes it was pickled to when the config was made. The plugin object built from
    it never does.

    Args:
        target: A string, class, module or instance, as `parse_callbacks` accepts them.
        kwargs: Constructor arguments; only for a class.
        name: The callback's name in order, trace and errors; by default the class's, module's or
            entry point's.
        on_error: ``"raise"`` or ``"warn"``; None means what the deployment's config says.
        only_on_cluster: Whether the callback can be imported on the cluster only, for example
            from a ``runtime_env`` package; what is wrong with it is then found there.

    Attributes:
        key: Equal for two entries that ask for the same plugin, in any process.

    Raises:
        CallbackConfigError: The arguments contradict each other.
    """

    def __init__(
        self,
        target: object,
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        on_error: str | None = None,
        only_on_cluster: bool = False,
    ) -> None:
        if isinstance(target, ModuleType):
            target = target.__name__
        self.kwargs = dict(kwargs or {})
        self.name = name or _default_name(target)
        self.on_error = on_error
        self.only_on_cluster = only_on_cluster
        self.target = target if isinstance(target, str | type) else None
        self._instance = None if isinstance(target, str | type) else target
        self._instance_bytes: bytes | None = None
        self.key = (self.name, self._what(), _canonical(self.kwargs), on_error or "")
        if self._instance is not None and self.kwargs:
            raise CallbackConfigError(
                f"callback {self.name!r}: kwargs {sorted(self.kwargs)} given for an instance, "
                "which is already built; pass the class instead, or drop kwargs"
            )

    def _what(self) -> str:
        if self.target is None:
            return _identity(self._instance)
        # By identity, not by name: a notebook defines the same class anew with other code.
        return self.target if isinstance(self.target, str) else _identity(self.target)

    def check(self) -> None:
        """Build the plugin where the config is made, to see that it can be.

        Raises:
            CallbackConfigError: It cannot be imported or built, or is not a callback.
        """
        if not self.only_on_cluster:
            self.create()

    def create(self) -> object:
        """Build the plugin, or import the module that is one.

        Raises:
            CallbackConfigError: It cannot be imported or built, or is not a callback.
        """
        if self.target is None:
            plugin = self._load_instance()
            if _ray.is_ray_callback(type(plugin)):
                raise CallbackConfigError(
                    f"callback {self.name!r} is an instance of a Ray callback, which belongs to "
                    "one config and context; name the class, with its arguments in kwargs"
                )
        else:
            found = self.target if isinstance(self.target, type) else resolve(self.target)
            plugin = self._construct(found) if isinstance(found, type) else found
            if not isinstance(found, type) and self.kwargs:
                raise CallbackConfigError(
                    f"callback {self.name!r}: kwargs {sorted(self.kwargs)} given for "
                    f"{type(found).__name__} {self.target!r}, which takes none; name a class, "
                    "or drop kwargs"
                )
        problems = hook_problems(plugin)
        if problems:
            raise CallbackConfigError(f"callback {self.name!r}: " + "; ".join(problems))
        return plugin

    def freeze(self) -> None:
        """Check that the entry can be sent to another process, and keep an instance's bytes.

        They are kept because the instance may open clients and locks while it runs, and what
        other processes get is the callback as it was configured.

        Raises:
            CallbackConfigError: A value cannot be pickled.
        """
        from ray import cloudpickle

        try:
            if self._instance is not None and self._instance_bytes is None:
                self._instance_bytes = instances.dumps(self._instance)
            cloudpickle.dumps((self.target, self.kwargs))
        except Exception as error:  # every class can refuse in its own way
            raise CallbackConfigError(
                f"callback {self.name!r} cannot be sent to another process: {describe(error)}; "
                "name the class with kwargs instead of an instance, and open clients in its hooks"
            ) from error

    def _load_instance(self) -> object:
        if self._instance is None:
            from ray import cloudpickle

            assert self._instance_bytes is not None
            try:
                self._instance = cloudpickle.loads(self._instance_bytes)
            except Exception as error:  # importing its class runs other people's code
                raise CallbackConfigError(
                    f"callback {self.name!r}: the instance cannot be built again in this "
                    f"process: {describe(error)}; name the class with kwargs instead"
                ) from error
        return self._instance

    def _construct(self, cls: type) -> object:
        if _ray.is_ray_callback(cls):
            return self._adapt(cls)
        try:
            return cls(**self.kwargs)
        except Exception as error:  # a constructor may refuse with any exception
            reason = redact(describe(error), self.kwargs)
            raise CallbackConfigError(
                f"callback {self.name!r}: {cls.__module__}.{cls.__qualname__}"
                f"{_signature(cls)} refused kwargs {sorted(self.kwargs)}: {reason}"
            ) from (error if reason == describe(error) else None)

    def _adapt(self, cls: type) -> object:
        """Wrap a class written for Ray's own slot."""
        from rayserve_hooks.cluster.ray_callback import RayCallback

        if _ray.is_hooks_callback(cls):
            raise CallbackConfigError(
                f"callback {self.name!r}: HooksCallback runs this list and cannot be in it; list "
                "the callbacks themselves"
            )
        try:
            return RayCallback(cls, self.kwargs)
        except CallbackConfigError as error:
            raise CallbackConfigError(f"callback {self.name!r}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        self.freeze()
        return {**self.__dict__, "_instance": None}

    def __repr__(self) -> str:
        # kwargs' values stay out of logs: they may be secrets.
        what = f"instance of {self.name}" if self.target is None else self.target
        kwargs = f" kwargs={sorted(self.kwargs)}" if self.kwargs else ""
        return f"<callback {self.name!r}: {what!s}{kwargs}>"


_PROCESS = uuid.uuid4().hex


def _identity(value: object) -> str:
    """Name an object for as long as it lives, in all processes."""
    return f"{_PROCESS}:{os.getpid()}:{id(value)}"


def _canonical(kwargs: Mapping[str, Any]) -> str:
    try:
        return json.dumps(kwargs, sort_keys=True, default=_identity)
    except TypeError:  # keys that are no strings
        return repr(sorted((str(name), repr(value)) for name, value in kwargs.items()))


def parse_callbacks(value: object, where: str = "callbacks") -> tuple[CallbackEntry, ...]:
    """Turn a config's callback list into entries.

    Args:
        value: One callback or a list of them. Each is ``"pkg.module:Class"``,
            ``"pkg.module.Class"``, ``"pkg.module"``, a short name of the entry-point group
            ``rayserve_hooks``, a class, an instance, a module, or a mapping with ``callback``
            and, optional, ``kwargs``, ``name``, ``on_error`` and ``only_on_cluster``.
        where: The config field, for messages.

    Raises:
        CallbackConfigError: An item is malformed, or two have the same name. What is wrong with
            the callbacks themselves is then reported with it.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    problems = Problems()
    entries: list[CallbackEntry] = []
    for index, item in enumerate(items):
        with problems.collected():
            entries.append(_parse(item, f"{where}[{index}]"))
    names = [entry.name for entry in entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        with problems.collected():
            raise CallbackConfigError(
                f"{where} has more than one callback named {name!r}; give each its own name: "
                "{callback: ..., name: ...}"
            )
    if problems:
        for entry in entries:
            with problems.collected():
                entry.check()
    problems.raise_all()
    return tuple(entries)


def _parse(item: object, where: str) -> CallbackEntry:
    if isinstance(item, CallbackEntry):
        return item
    if _is_no_callback(item):
        raise CallbackConfigError(
            f"{where} is {item!r}; write a string such as 'pkg.module:Class', a class, an "
            "instance, a module, or a mapping with 'callback'"
        )
    if not isinstance(item, Mapping):
        return CallbackEntry(item)
    unknown = sorted(set(item) - set(_KEYS), key=str)
    if unknown:
        raise CallbackConfigError(
            f"{where} has unknown key {unknown[0]!r}{_did_you_mean(unknown[0], _KEYS)}; "
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
    return CallbackEntry(item["callback"], kwargs, name, on_error, elsewhere)


def _is_no_callback(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | bytes)


def resolve(target: str) -> object:
    """Find the class, instance or module that a string names.

    Raises:
        CallbackConfigError: Nothing of that name can be imported. An error raised inside the
            module is its cause.
    """
    if ":" in target:
        module_name, _, attribute = target.partition(":")
        return _attribute(_import(module_name, target), attribute, target)
    if target in short_names():
        try:
            return short_names()[target].load()
        except Exception as error:  # importing runs other people's code
            raise CallbackConfigError(
                f"callback {target!r}: its entry point {short_names()[target].value!r} cannot "
                f"be loaded: {describe(error)}"
            ) from error
    parent, _, attribute = target.rpartition(".")
    if not parent:
        return _import(target, target)
    module = _import(parent, target)
    if hasattr(module, attribute):
        return getattr(module, attribute)
    if hasattr(module, "__path__") and importlib.util.find_spec(target) is not None:
        return _import(target, target)
    return _attribute(module, attribute, target)


@functools.cache
def short_names() -> dict[str, importlib.metadata.EntryPoint]:
    """List what is installed under the entry-point group; nothing of it is imported."""
    return {ep.name: ep for ep in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _import(module_name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failed(target, module_name, error) from error
        known = ", ".join(sorted(short_names())) or "none"
        raise CallbackConfigError(
            f"callback {target!r}: no module named {error.name!r} and no such short name"
            f"{_did_you_mean(target, short_names())}; write 'pkg.module:Class' of a module that "
            f"can be imported here, or a short name (known: {known})"
        ) from error
    except Exception as error:  # importing runs other people's code
        raise _import_failed(target, module_name, error) from error


def _import_failed(target: str, module_name: str, error: Exception) -> CallbackConfigError:
    return CallbackConfigError(
        f"callback {target!r}: importing module {module_name!r} failed: {describe(error)}"
    )


def _attribute(module: ModuleType, path: str, target: str) -> object:
    found: object = module
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise CallbackConfigError(
                f"callback {target!r}: module {module.__name__!r} has no {path!r}"
                f"{_did_you_mean(attribute, dir(found))}; name a class, instance or module with "
                f"at least one of {', '.join(HOOKS)}"
            )
        found = getattr(found, attribute)
    return found


def hook_problems(plugin: object) -> list[str]:
    """Say what keeps ``plugin`` from being a callback; empty when nothing does."""
    problems: list[str] = []
    hooks = 0
    for name in dir(plugin):
        if name.startswith("_") or is_protocol_stub(plugin, name):
            continue
        static = inspect.getattr_static(plugin, name)
        spec = getattr(static, "rayserve_hooks_impl", None) or {}
        hook = spec.get("specname") or name
        if hook in HOOKS:
            hooks += 1
            problems.extend(_signature_problems(plugin, name, spec))
        elif spec or (name.startswith("on_") and callable(static)):
            close = difflib.get_close_matches(hook, HOOKS, n=1, cutoff=0.85)
            if close:
                problems.append(f"method {name!r} is not a hook; did you mean {close[0]!r}?")
            elif spec:
                problems.append(f"{name!r} is marked as a hook; use one of {', '.join(HOOKS)}")
    if not hooks and not problems:
        problems.append(
            f"{type(plugin).__name__} has no hook; define at least one of {', '.join(HOOKS)}"
        )
    return problems


def is_protocol_stub(plugin: object, name: str) -> bool:
    """Tell whether a method is `RayServeLLMCallback`'s own empty one, inherited."""
    stub = vars(RayServeLLMCallback).get(name)
    return stub is not None and inspect.getattr_static(plugin, name, None) is stub


def _signature_problems(plugin: object, name: str, spec: Mapping[str, Any]) -> list[str]:
    method = getattr(plugin, name)
    function = getattr(method, "__func__", method)
    if not inspect.isfunction(function):
        kind = type(function).__name__
        return [f"{name!r} is named after a hook, but is a {kind}; define a method of that name"]
    hook = spec.get("specname") or name
    known = HOOK_PARAMETERS[hook]
    arguments = ", ".join([*(["self"] if inspect.ismethod(method) else []), *known])
    wanted = f"write 'def {name}({arguments})'"
    parameters = inspect.signature(method).parameters
    problems = []
    if "ctx" not in parameters:
        problems.append(f"{name}() has no parameter 'ctx'; {wanted}")
    for parameter in parameters.values():
        if parameter.name not in known:
            problems.append(f"{name}() has unknown parameter {parameter.name!r}; {wanted}")
        elif parameter.default is not inspect.Parameter.empty:
            # pluggy leaves a parameter with a default at its default.
            problems.append(
                f"{name}() gives {parameter.name!r} a default and would never get it; {wanted}"
            )
        elif parameter.kind not in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.POSITIONAL_ONLY,
        ):
            problems.append(
                f"{name}() takes {parameter.name!r} by keyword only, which pluggy cannot; {wanted}"
            )
    if spec.get("hookwrapper"):
        problems.append(f"{name}() is an old-style hookwrapper; use wrapper=True")
    if spec.get("wrapper") and not inspect.isgeneratorfunction(method):
        problems.append(f"wrapper {name}() must be a 'def' with one 'yield'")
    return problems


def _default_name(target: object) -> str:
    if isinstance(target, type):
        return target.__name__
    if isinstance(target, str):
        return target.replace(":", ".").rpartition(".")[2]
    return type(target).__name__


def _signature(cls: type) -> str:
    try:
        signature = inspect.signature(cls)
        return str(signature.replace(return_annotation=inspect.Signature.empty))
    except (TypeError, ValueError):
        return "(...)"


def _did_you_mean(word: object, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
