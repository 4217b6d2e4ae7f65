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


@dataclass(frozen=True, eq=False)
class HookFunction:
    """A hook of a callback, and what ``@hookimpl`` says of it."""

    attribute: str
    hook: str  # not the attribute's name where ``specname`` says so
    function: Callable[..., Any]  # bound to the callback
    options: pluggy.HookimplOpts


OptionsOf = Callable[[object, str], pluggy.HookimplOpts | None]
"""Returns what is said of an attribute of a callback as a hook; None if it is none."""


def hook_options(
    callback: object, attribute: str, project: str = PROJECT
) -> pluggy.HookimplOpts | None:
    """Return the options of a method named after a hook, or marked as one for ``project``."""
    found = _static_function(callback, attribute)
    if found is None or is_inherited_spec(found[0]):
        return None
    holder, function = found
    # A marker above @staticmethod or @classmethod is on these, one below on the function.
    for marked in (holder, getattr(function, "__func__", function)):
        options = _pluggy.impl_options(marked, project)
        if options is not None:
            return options
    return _pluggy.UNDECORATED if attribute in HOOKS else None


def hook_functions(
    callback: object, options_of: OptionsOf = hook_options
) -> Iterator[HookFunction]:
    """Yield a callback's hooks."""
    for attribute in _names(callback):
        options = options_of(callback, attribute)
        found = None if options is None else _static_function(callback, attribute)
        if options is not None and found is not None:
            hook = options.get("specname") or attribute
            options = {**_pluggy.UNDECORATED, **options}
            yield HookFunction(attribute, hook, found[1], options)


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


def _is(found: object, *types: type) -> bool:
    """Return ``isinstance`` without asking ``__class__``, which a proxy answers with code."""
    return issubclass(type(found), types)


def _static_function(owner: object, name: str) -> tuple[object, Callable[..., Any]] | None:
    """Find a function without running a property, a ``cached_property`` or ``__getattr__``.

    Return what holds it, and the function bound as ``getattr`` would bind it.
    """
    found = inspect.getattr_static(owner, name, None)
    if _is(found, types.MemberDescriptorType):  # a slot; reading one runs no code
        try:
            found = found.__get__(owner, type(owner))
        except (AttributeError, TypeError):  # it is not set, or the owner is the class
            return None
    elif _is(found, staticmethod, classmethod) or _is_method(owner, name, found):
        cls = owner if _is(owner, type) else type(owner)
        return found, found.__get__(owner, cls)
    return (found, found) if _is(found, *_ROUTINES) else None


_ROUTINES = (
    types.BuiltinFunctionType,
    types.FunctionType,
    types.MethodType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)


def _is_method(owner: object, name: str, found: object) -> bool:
    has_methods = not _is(owner, type, types.ModuleType)
    return has_methods and _is(found, types.FunctionType) and name not in _own(owner)


def hook_problems(callback: object) -> list[str]:
    """Return what keeps ``callback`` from being a callback; empty when nothing does."""
    hooks = {function.attribute: function for function in hook_functions(callback)}
    problems = signature_problems(callback, hooks)
    is_callback = bool(problems)
    for name in _names(callback):
        static = inspect.getattr_static(callback, name, None)
        if name.startswith("_") or is_inherited_spec(static):
            continue
        found = hooks.get(name)
        hook = found.hook if found else name
        if hook in HOOKS or (found and found.options["optionalhook"]):
            is_callback = True
        elif found or (name.startswith("on_") and callable(static)):
            hint = did_you_mean(hook, HOOKS, cutoff=0.85)
            if hint:
                problems.append(f"method {name!r} is not a hook{hint}")
            elif found:
                problems.append(f"{name!r} is marked as a hook; use one of {', '.join(HOOKS)}")
    if not is_callback and not problems:
        problems.append(f"{type(callback).__name__} has no hook; define at least one of {', '.join(HOOKS)}")
    return problems


def signature_problems(callback: object, hooks: Mapping[str, HookFunction]) -> list[str]:
    """Return why ``hooks`` of a callback, by attribute, could not be called."""
    problems: list[str] = []
    for name in _names(callback):
        found = hooks.get(name)
        if found and found.hook in HOOKS:
            problems.extend(_problems_of(found))
        elif not found and name in HOOKS:
            static = inspect.getattr_static(callback, name, None)
            if not is_inherited_spec(static):
                problems.append(_no_method(name, static))
    return problems


def _no_method(name: str, found: object) -> str:
    kind = type(found).__name__
    return f"{name!r} is named after a hook, but is a {kind}; define a method of that name"


def _problems_of(hook: HookFunction) -> list[str]:
    name, function = hook.attribute, hook.function
    unbound = getattr(function, "__func__", function)
    if not inspect.isfunction(unbound):
        return [_no_method(name, unbound)]
    known = HOOK_PARAMETERS[hook.hook]
    arguments = ", ".join([*(["self"] if inspect.ismethod(function) else []), *known])
    wanted = f"write 'def {name}({arguments})'"
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # such as of a method without any parameter
        return [f"{name}() takes nothing, or says wrongly what it takes; {wanted}"]
    problems = []
    if "ctx" not in parameters:
        problems.append(f"{name}() has no parameter 'ctx'; {wanted}")
    for parameter in parameters.values():
        if parameter.name not in known:
            problem = f"has unknown parameter {parameter.name!r}"
        elif parameter.default is not parameter.empty:
            problem = f"gives {parameter.name!r} a default, but is always called with it"
        elif parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            problem = f"takes {parameter.name!r} by keyword only, which pluggy cannot"
        else:
            continue
        problems.append(f"{name}() {problem}; {wanted}")
    return [*problems, *_option_problems(hook)]


def _option_problems(hook: HookFunction) -> list[str]:
    name, function, options = hook.attribute, hook.function, hook.options
    problems = []
    if options["tryfirst"] and options["trylast"]:
        problems.append(f"{name}() is marked tryfirst and trylast; keep one of them")
    if options["hookwrapper"]:
        problems.append(f"{name}() is an old-style hookwrapper; use wrapper=True")
    elif options["wrapper"]:
        if not inspect.isgeneratorfunction(function):
            problems.append(f"wrapper {name}() must be a 'def' with one 'yield'")
    elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        kind = "an async generator" if inspect.isasyncgenfunction(function) else "a generator"
        problems.append(
            f"{name}() is {kind}, of which nothing would run; drop its 'yield', or make it a "
            "'def' under @hookimpl(wrapper=True)"
        )
    return problems
