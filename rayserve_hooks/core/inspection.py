"""Which hooks a callback has, and what is wrong with them; nothing of the callback runs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from rayserve_hooks.core import _pluggy
from rayserve_hooks.core.hooks import HOOK_PARAMETERS, HOOKS, is_inherited_spec
from rayserve_hooks.errors import did_you_mean
from rayserve_hooks.hookspecs import PROJECT


@dataclass(frozen=True)
class HookFunction:
    """A hook of a callback, and what ``@hookimpl`` says of it."""

    attribute: str
    hook: str  # not the attribute's name where ``specname`` says so
    function: Callable[..., Any]  # bound to the callback
    options: pluggy.HookimplOpts


def hook_functions(callback: object, project: str = PROJECT) -> Iterator[HookFunction]:
    """Yield a callback's hooks: methods named after one, or marked as one for ``project``."""
    for attribute in _names(callback):
        found = _static_function(callback, attribute)
        if found is None or is_inherited_spec(found[0]):
            continue
        holder, function = found
        options = _options(holder, function, project)
        if options is None and attribute in HOOKS:
            options = _pluggy.UNDECORATED
        if options is not None:
            yield HookFunction(attribute, options.get("specname") or attribute, function, options)


def _names(owner: object) -> list[str]:
    """Return what ``dir()`` would, without asking ``__dir__`` or, for slots, ``__getattr__``."""
    classes = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
    return sorted({*_own(owner), *(name for cls in classes for name in vars(cls))})


def _own(owner: object) -> Mapping[str, object]:
    try:
        found: Mapping[str, object] = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return found


def _options(holder: object, function: object, project: str) -> pluggy.HookimplOpts | None:
    # A marker above @staticmethod or @classmethod is on these, one below on the function.
    marked = (holder, getattr(function, "__func__", function))
    return next(filter(None, (_pluggy.impl_options(mark, project) for mark in marked)), None)


def _static_function(owner: object, name: str) -> tuple[object, Callable[..., Any]] | None:
    """Find a function without running a property, a ``cached_property`` or ``__getattr__``.

    Return what holds it, and the function bound as ``getattr`` would bind it.
    """
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, types.MemberDescriptorType):  # a slot; reading one runs no code
        try:
            found = found.__get__(owner, type(owner))
        except (AttributeError, TypeError):  # it is not set, or the owner is the class
            return None
    elif isinstance(found, staticmethod | classmethod) or _is_method(owner, name, found):
        cls = owner if isinstance(owner, type) else type(owner)
        return found, found.__get__(owner, cls)
    return (found, found) if inspect.isroutine(found) else None


def _is_method(owner: object, name: str, found: object) -> bool:
    has_methods = not isinstance(owner, type | types.ModuleType)
    return has_methods and inspect.isfunction(found) and name not in _own(owner)


def hook_problems(callback: object) -> list[str]:
    """Return what keeps ``callback`` from being a callback; empty when nothing does."""
    problems: list[str] = []
    hooks = {function.attribute: function for function in hook_functions(callback)}
    named = False
    for name in _names(callback):
        static = inspect.getattr_static(callback, name, None)
        if name.startswith("_") or is_inherited_spec(static):
            continue
        hook = hooks[name].hook if name in hooks else name
        if hook in HOOKS:
            named = True
            if name in hooks:
                problems.extend(_signature_problems(hooks[name]))
            else:
                problems.append(_no_method(name, static))
        elif name in hooks or (name.startswith("on_") and callable(static)):
            hint = did_you_mean(hook, HOOKS, cutoff=0.85)
            if hint:
                problems.append(f"method {name!r} is not a hook{hint}")
            elif name in hooks:
                problems.append(f"{name!r} is marked as a hook; use one of {', '.join(HOOKS)}")
    if not named and not problems:
        kind = type(callback).__name__
        problems.append(f"{kind} has no hook; define at least one of {', '.join(HOOKS)}")
    return problems


def _no_method(name: str, found: object) -> str:
    kind = type(found).__name__
    return f"{name!r} is named after a hook, but is a {kind}; define a method of that name"


def _signature_problems(hook: HookFunction) -> list[str]:
    name, function = hook.attribute, hook.function
    unbound = getattr(function, "__func__", function)
    if not inspect.isfunction(unbound):
        return [_no_method(name, unbound)]
    known = HOOK_PARAMETERS[hook.hook]
    arguments = ", ".join([*(["self"] if inspect.ismethod(function) else []), *known])
    wanted = f"write 'def {name}({arguments})'"
    parameters = inspect.signature(function).parameters
    problems = []
    if "ctx" not in parameters:
        problems.append(f"{name}() has no parameter 'ctx'; {wanted}")
    for parameter in parameters.values():
        if parameter.name not in known:
            problem = f"has unknown parameter {parameter.name!r}"
        elif parameter.default is not parameter.empty:
            # pluggy leaves a parameter with a default at its default.
            problem = f"gives {parameter.name!r} a default and would never get it"
        elif parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            problem = f"takes {parameter.name!r} by keyword only, which pluggy cannot"
        else:
            continue
        problems.append(f"{name}() {problem}; {wanted}")
    if hook.options.get("hookwrapper"):
        problems.append(f"{name}() is an old-style hookwrapper; use wrapper=True")
    if hook.options.get("wrapper") and not inspect.isgeneratorfunction(function):
        problems.append(f"wrapper {name}() must be a 'def' with one 'yield'")
    return problems
