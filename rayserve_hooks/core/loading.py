"""From what a config names, such as ``"pkg.module:Class"``, to a plugin object."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import getattr_static
from pathlib import Path
from types import ModuleType
from typing import Any

from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.inspection import Unbuilt, hook_problems, is_a, names_of
from rayserve_hooks.core.instances import Instance
from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.validation import is_validation_error, problems_of
from rayserve_hooks.errors import CallbackConfigError, describe, did_you_mean, raise_from

ENTRY_POINT_GROUP = "rayserve_hooks"

Adapt = Callable[[object, Mapping[str, Any]], object | None]
"""Builds the plugin for a class that is written for another interface, from the class and its
constructor arguments; refuses an instance of one, and returns None for everything else."""


def no_adapter(found: object, kwargs: Mapping[str, Any]) -> object | None:
    """Return None: every class is a callback of ours."""
    return None


@contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Turn what other people's code raises, a ``SystemExit`` included, into a config's error."""
    try:
        yield
    except (CallbackConfigError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise_from(CallbackConfigError(f"{text}: {redact(describe(error))}"), masked(error))


def build(
    target: str | type | Instance, kwargs: Mapping[str, Any], adapt: Adapt, construct: bool = True
) -> object:
    """Return the plugin that a config names: an instance, or the module that is one.

    A class is looked at first, and called only if it can be a callback; without ``construct`` an
    `Unbuilt` stands for it.
    """
    if isinstance(target, Instance):
        plugin = target.load()
        adapt(plugin, {})  # refuses an instance of another interface
    else:
        plugin = resolve(target) if isinstance(target, str) else target
        if is_a(plugin, type):
            plugin = adapt(plugin, kwargs) or Unbuilt(plugin)
        elif kwargs:
            raise CallbackConfigError(
                f"kwargs {sorted(kwargs)} given for {type(plugin).__name__} {target!r}, which "
                "takes none; name a class, or drop kwargs"
            )
        if is_a(plugin, Unbuilt):
            raise_problems(hook_problems(plugin))
            if construct:
                plugin = _construct(plugin.cls, kwargs)
            else:
                raise_problems(argument_problems(plugin.cls, kwargs))
    raise_problems(hook_problems(plugin))
    return plugin


def raise_problems(problems: Sequence[str]) -> None:
    """Raise what is wrong with one callback, if anything, as one text."""
    if problems:
        raise CallbackConfigError("; ".join(problems))


def _construct(cls: type, kwargs: Mapping[str, Any]) -> object:
    try:
        return cls(**kwargs)
    except CallbackConfigError as error:  # its text says what to do
        texts = tuple(redact(problem, kwargs) for problem in error.problems)
        if texts == error.problems:
            raise
        raise_from(CallbackConfigError(*texts), None)
    except Exception as error:  # a constructor may refuse with any exception
        if is_validation_error(error):
            known = sorted(getattr_static(cls, "__pydantic_fields__", {}))
            texts = tuple(p.in_call(cls.__name__) for p in problems_of(error, known, "argument"))
            raise_from(CallbackConfigError(*(redact(text, kwargs) for text in texts)), None)
        if isinstance(error, TypeError):  # Python's own, where it is about the arguments
            raise_problems(argument_problems(cls, kwargs))
        reason = redact(describe(error), kwargs)
        refusal = f"{_called(cls)} refused kwargs {sorted(kwargs)}: {reason}"
        raise_from(CallbackConfigError(refusal), masked(error, kwargs))


def argument_problems(cls: type, kwargs: Mapping[str, Any], given: Sequence[str] = ()) -> list[str]:
    """Return which arguments a constructor lacks or does not take, as far as it says so.

    ``given`` are the names of what it is called with besides.
    """
    try:
        parameters = inspect.signature(cls).parameters.values()
    except Exception:  # builtins say nothing; a class may say it in any way
        return []
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    problems = []
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        free = [name for name in by_name if name not in given]
        for name in (name for name in kwargs if name not in free):
            use = f"; use one of {', '.join(free)}" if free else "; drop it"
            problems.append(
                f"{_called(cls)} refused kwargs {sorted(kwargs)}: TypeError: got an unexpected "
                f"keyword argument {name!r}{did_you_mean(name, free) or use}"
            )
    required = [p.name for p in parameters if p.default is p.empty and p.name in by_name]
    missing = [name for name in required if name not in kwargs and name not in given]
    if missing and not problems:
        names = ", ".join(map(repr, missing))
        written = ", ".join(f"{name}: ..." for name in missing)
        problems.append(f"{_called(cls)} lacks {names}; add it, as in kwargs: {{{written}}}")
    return problems


def _called(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}{_signature(cls)}"


def _signature(cls: type) -> str:
    try:
        signature = inspect.signature(cls)
        parameters = signature.parameters.values()
        # A default is anybody's object, whose repr may show anything.
        plain = [
            p if p.default is p.empty or type(p.default) in _PLAIN else p.replace(default=...)
            for p in parameters
        ]
        return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    except Exception:  # builtins say nothing; a class may say it in any way
        return "(...)"


_PLAIN = (str, int, bool, float, type(None))


def resolve(target: str) -> object:
    """Return the class, instance or module that a string names."""
    if ":" in target:
        module_name, _, attribute = target.partition(":")
        return _attribute(_import(module_name, target), attribute, target)
    if target in short_names():
        entry_point = short_names()[target]
        value = entry_point.value
        with explained(f"callback {target!r}: its entry point {value!r} cannot be loaded"):
            return entry_point.load()
    parent, _, attribute = target.rpartition(".")
    if not parent:
        return _import(target, target)
    module = _import(parent, target)
    if "__path__" in vars(module) and _get(module, attribute, target) is _ABSENT:
        with explained(f"callback {target!r}: looking for module {target!r} failed"):
            found = importlib.util.find_spec(target)
        if found is not None:
            return _import(target, target)
    return _attribute(module, attribute, target)


@functools.cache
def short_names() -> dict[str, importlib.metadata.EntryPoint]:
    """Return what is installed under the entry-point group; nothing of it is imported."""
    return {name: entry_points[0] for name, entry_points in installed().items()}


def installed() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return all that is installed under each short name; the first is the one it means."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    # In the order of sys.path, so that the first is the one that an import would find.
    try:
        entry_points = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    except Exception:  # anybody's distribution can be broken in its own way
        entry_points = [entry_point for _, read in _one_by_one() for entry_point in read or ()]
    for entry_point in entry_points:
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def unreadable() -> Iterator[tuple[importlib.metadata.Distribution, Exception]]:
    """Yield the distributions whose entry points cannot be read, each with the reason."""
    for distribution, read in _one_by_one():
        if read is None:
            try:
                _ = distribution.entry_points
            except Exception as error:  # as above
                yield distribution, error


def _one_by_one() -> Iterator[
    tuple[importlib.metadata.Distribution, importlib.metadata.EntryPoints | None]
]:
    """Yield each distribution with its entry points of our group; None if they cannot be read."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name, read = "", None
        with contextlib.suppress(Exception):  # as above
            name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name and name in seen:  # an import finds the first
            continue
        seen.add(name)
        with contextlib.suppress(Exception):
            read = distribution.entry_points.select(group=ENTRY_POINT_GROUP)
        yield distribution, read


def _import(module_name: str, target: str) -> ModuleType:
    with explained(f"callback {target!r}: importing module {module_name!r} failed"):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name
            if missing is None or not f"{module_name}.".startswith(f"{missing}."):
                raise
            known = ", ".join(sorted(short_names())) or "none"
            raise CallbackConfigError(
                f"callback {target!r}: no module named {missing!r} and no such short name"
                f"{did_you_mean(target, short_names())}; write 'pkg.module:Class' of a module that "
                f"can be imported here, or a short name (known: {known}; here is {_here()})"
            ) from error


def _here() -> str:
    """Return where this process imports from, beside what is installed."""
    prefixes = (sys.prefix, sys.base_prefix)
    own = dict.fromkeys(
        path or str(Path.cwd()) for path in sys.path if not path.startswith(prefixes)
    )
    return f"host {socket.gethostname()!r} with {', '.join(map(repr, own)) or 'what is installed'}"


_ABSENT = object()


def _get(found: object, attribute: str, target: str) -> object:
    with explained(f"callback {target!r}: reading {attribute!r} failed"):
        return getattr(found, attribute, _ABSENT)  # of a module it may run any code


def _listed(found: object) -> list[str]:
    try:
        return [name for name in dir(found) if isinstance(name, str)]
    except Exception:  # a module or class may list what it has by code of its own
        return names_of(found)


def _attribute(module: ModuleType, path: str, target: str) -> object:
    found: object = module
    for attribute in path.split("."):
        value = _get(found, attribute, target)
        if value is _ABSENT:
            raise CallbackConfigError(
                f"callback {target!r}: module {module.__name__!r} has no {path!r}"
                f"{did_you_mean(attribute, _listed(found))}; name a class, instance or module "
                f"with at least one of {', '.join(HOOKS)}"
            )
        found = value
    return found
