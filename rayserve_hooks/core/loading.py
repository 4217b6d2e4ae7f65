"""From what a config names, such as ``"pkg.module:Class"``, to a plugin object."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.inspection import hook_problems
from rayserve_hooks.core.instances import Instance
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, describe, did_you_mean

ENTRY_POINT_GROUP = "rayserve_hooks"

Adapt = Callable[[object, Mapping[str, Any]], object | None]
"""Builds the plugin for a class that is written for another interface, from the class and its
constructor arguments; refuses an instance of one, and returns None for everything else."""


def no_adapter(found: object, kwargs: Mapping[str, Any]) -> object | None:
    """Return None: every class is a callback of ours."""
    return None


def build(target: str | type | Instance, kwargs: Mapping[str, Any], adapt: Adapt) -> object:
    """Return the plugin that a config names: an instance, or the module that is one."""
    if isinstance(target, Instance):
        plugin = target.load()
        adapt(plugin, {})  # refuses an instance of another interface
    else:
        plugin = resolve(target) if isinstance(target, str) else target
        if isinstance(plugin, type):
            plugin = _construct(plugin, kwargs, adapt)
        elif kwargs:
            raise CallbackConfigError(
                f"kwargs {sorted(kwargs)} given for {type(plugin).__name__} {target!r}, which "
                "takes none; name a class, or drop kwargs"
            )
    problems = hook_problems(plugin)
    if problems:
        raise CallbackConfigError("; ".join(problems))
    return plugin


def _construct(cls: type, kwargs: Mapping[str, Any], adapt: Adapt) -> object:
    adapted = adapt(cls, kwargs)
    if adapted is not None:
        return adapted
    try:
        return cls(**kwargs)
    except CallbackConfigError as error:  # its text says what to do
        texts = tuple(redact(problem, kwargs) for problem in error.problems)
        if texts == error.problems:
            raise
        raise CallbackConfigError(*texts) from None
    except Exception as error:  # a constructor may refuse with any exception
        reason = redact(describe(error), kwargs)
        raise CallbackConfigError(
            f"{cls.__module__}.{cls.__qualname__}{_signature(cls)} refused kwargs "
            f"{sorted(kwargs)}: {reason}"
        ) from (error if reason == describe(error) else None)


def _signature(cls: type) -> str:
    try:
        signature = inspect.signature(cls)
        return str(signature.replace(return_annotation=inspect.Signature.empty))
    except (TypeError, ValueError):
        return "(...)"


def resolve(target: str) -> object:
    """Return the class, instance or module that a string names."""
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
    has_submodules = hasattr(module, "__path__") and not hasattr(module, attribute)
    if has_submodules and importlib.util.find_spec(target) is not None:
        return _import(target, target)
    return _attribute(module, attribute, target)


@functools.cache
def short_names() -> dict[str, importlib.metadata.EntryPoint]:
    """Return what is installed under the entry-point group; nothing of it is imported."""
    return {ep.name: ep for ep in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _import(module_name: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # importing runs other people's code
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise CallbackConfigError(
                f"callback {target!r}: importing module {module_name!r} failed: {describe(error)}"
            ) from error
        known = ", ".join(sorted(short_names())) or "none"
        raise CallbackConfigError(
            f"callback {target!r}: no module named {missing!r} and no such short name"
            f"{did_you_mean(target, short_names())}; write 'pkg.module:Class' of a module that "
            f"can be imported here, or a short name (known: {known})"
        ) from error


def _attribute(module: ModuleType, path: str, target: str) -> object:
    found: object = module
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise CallbackConfigError(
                f"callback {target!r}: module {module.__name__!r} has no {path!r}"
                f"{did_you_mean(attribute, dir(found))}; name a class, instance or module with "
                f"at least one of {', '.join(HOOKS)}"
            )
        found = getattr(found, attribute)
    return found
