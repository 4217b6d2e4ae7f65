"""Which hooks a callback has, and what is wrong with them; nothing of the callback runs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import pluggy

from rayserve_hooks.core import _pluggy
from rayserve_hooks.core.hooks import HOOK_PARAMETERS, HOOKS, is_inherited_spec
from rayserve_hooks.errors import did_you_mean
from rayserve_hooks.hookspecs import PROJECT

T = TypeVar("T")


def is_a(found: object, kind: type[T] | tuple[type[T], ...]) -> TypeGuard[T]:
    """Return what ``isinstance`` does without ``__class__``, which a proxy answers with code."""
    return issubclass(type(found), kind)


@dataclass(frozen=True, eq=False)
class HookFunction:
    """A hook of a callback, and what ``@hookimpl`` says of it."""

    attribute: str
    hook: str  # not the attribute's name where ``specname`` says so
    function: Callable[..., Any]  # bound to the callback
    options: pluggy.HookimplOpts


@dataclass(frozen=True, eq=False)
class Unbuilt:
    """Stands for an instance of a class that is looked at before anything of it is called."""

    cls: type

    @property
    def may_set_hooks(self) -> bool:
        """Whether a method of the class names a hook, which its constructor may then set."""
        functions = (value for cls in self.cls.__mro__ for value in vars(cls).values())
        codes = (f.__code__ for f in functions if is_a(f, types.FunctionType))
        return any(not {*code.co_names, *_strings(code)}.isdisjoint(HOOKS) for code in codes)


def _strings(code: types.CodeType) -> Iterator[str]:
    return (constant for constant in code.co_consts if type(constant) is str)


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
    for attribute in names_of(callback):
        options = options_of(callback, attribute)
        found = None if options is None else _static_function(callback, attribute)
        if options is not None and found is not None:
            hook = options.get("specname") or attribute
            options = {**_pluggy.UNDECORATED, **options}
            yield HookFunction(attribute, hook, found[1], options)


def names_of(owner: object) -> list[str]:
    """Return what ``dir()`` would, without asking ``__dir__`` or, for slots, ``__getattr__``."""
    inherited = (name for cls in _class_of(owner).__mro__ for name in vars(cls))
    return sorted({*_own(owner), *inherited})


def _class_of(owner: object) -> type:
    if is_a(owner, Unbuilt):
        return owner.cls
    return owner if is_a(owner, type) else type(owner)


def _static(owner: object, name: str) -> Any:
    return inspect.getattr_static(owner.cls if is_a(owner, Unbuilt) else owner, name, None)


def _own(owner: object) -> Mapping[str, object]:
    if is_a(owner, Unbuilt):
        return {}
    try:
        found: Mapping[str, object] = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return found


def _static_function(owner: object, name: str) -> tuple[object, Callable[..., Any]] | None:
    """Find a function without running a property, a ``cached_property`` or ``__getattr__``.

    Return what holds it, and the function bound as ``getattr`` would bind it.
    """
    found = _static(owner, name)
    if is_a(found, types.MemberDescriptorType):  # a slot; reading one runs no code
        try:
            found = found.__get__(owner, type(owner))
        except (AttributeError, TypeError):  # it is not set, or the owner is the class
            return None
    elif is_a(found, (staticmethod, classmethod)) or _is_method(owner, name, found):
        return found, found.__get__(owner, _class_of(owner))
    return (found, found) if issubclass(type(found), _ROUTINES) else None


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
    has_methods = not is_a(owner, (type, types.ModuleType))
    return has_methods and is_a(found, types.FunctionType) and name not in _own(owner)


def hook_problems(callback: object) -> list[str]:
    """Return what keeps ``callback`` from being a callback; empty when nothing does."""
    hooks = {function.attribute: function for function in hook_functions(callback)}
    problems = signature_problems(callback, hooks)
    is_callback = bool(problems)
    for name in names_of(callback):
        static = _static(callback, name)
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
        if is_a(callback, Unbuilt) and callback.may_set_hooks:
            return problems
        kind = _class_of(callback).__name__
        problems.append(f"{kind} has no hook; define at least one of {', '.join(HOOKS)}")
    return problems


def signature_problems(callback: object, hooks: Mapping[str, HookFunction]) -> list[str]:
    """Return why ``hooks`` of a callback, by attribute, could not be called."""
    problems: list[str] = []
    for name in names_of(callback):
        found = hooks.get(name)
        if found and found.hook in HOOKS:
            problems.extend(_problems_of(found))
        elif not found and name in HOOKS:
            static = _static(callback, name)
            # Of what is not built a slot, or a default, says nothing of what will be there.
            if not is_inherited_spec(static) and not is_a(callback, Unbuilt):
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
