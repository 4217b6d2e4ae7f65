"""The secrets among values: what is held under a name that tells, found without running code.

Values are anybody's objects, so only what Python itself stores is read: items of its containers,
instance attributes, slots, class attributes, closures and defaults. No property, no
``__getattr__``, no ``items`` and no ``__str__`` of a value's class is called.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import itertools
import re
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from rayserve_hooks.core.secret_texts import given_away, names_place, names_secret

_SHORTEST_SECRET = 6  # replacing a shorter one would only garble the text
_SHORTEST_LINE = 12
_LONGEST_LOOKED_INTO = 20_000
_MOST_TEXT = 1_000_000  # of all values together, in which secrets are looked for
_MOST_VALUES = 100_000
_MOST_ITEMS = 10_000  # of one container, or a long one would take all
# A client of a library, but not what that holds: such as a model of its service, which has the
# names of secrets without any.
_MOST_FOREIGN = 1

_URL_BEFORE = re.compile(r"(?:://|%3A%2F%2F)\Z", re.IGNORECASE)
_PLAIN = (str, bytes, int, bool, float, complex, type(None))  # and nothing more
_LEAVES = (
    *(PurePath, property, types.BuiltinFunctionType, types.CodeType, types.FrameType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType),
    *(types.TracebackType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
)
_ITERABLES: tuple[type[Any], ...] = (list, tuple, set, frozenset, deque)
_DATA: tuple[type[Any], ...] = (*_ITERABLES, dict, types.MappingProxyType, types.SimpleNamespace)
_WRAPPERS: tuple[type[Any], ...] = (staticmethod, classmethod, types.MethodType, functools.partial)
_OF_EXCEPTIONS = [vars(BaseException)[name] for name in ("args", "__cause__", "__context__")]
_MARKS_OF_DATA = ("__dataclass_fields__", "__pydantic_fields__", "__attrs_attrs__")

_Held = Iterator[tuple[object, object]]


def secrets_among(among: Iterable[object]) -> Iterator[str]:
    """Yield the secrets among values, as far as one failure can afford to look for them.

    Objects are looked into, and what those hold, as long as they are data, or of a package that
    one of the values is of, or of their items; into others, such as a library's client, not far.
    """
    values: list[Any] = list(among)
    mappings = (dict.copy(value).values() for value in values if issubclass(type(value), dict))
    homes = set(map(_package, itertools.chain(values, *mappings))) - {"builtins"}
    waiting = deque((value, False, 0) for value in values)
    seen: set[int] = set()
    left = _MOST_TEXT
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        value, secret, foreign = waiting.popleft()
        text, kind = _text_of(value), type(value)
        if text is not None and (secret or left > 0):
            left -= min(len(text), _LONGEST_LOOKED_INTO)
            yield from _in_text(text, secret)
        if kind in _PLAIN or issubclass(kind, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        farther = foreign + (not (_is_data(kind) or _package(value) in homes))
        if farther <= _MOST_FOREIGN:
            # What holds a value says nothing of its class, nor of the choices of an enum.
            inherited = is_pydantic_secret(kind) or (secret and not issubclass(kind, enum.Enum))
            for name, item in itertools.islice(_held(value), _MOST_ITEMS):
                if item is kind:
                    waiting.append((item, False, foreign))
                else:
                    named = names_secret(name) and not names_place(name, item)
                    waiting.append((item, named or inherited, farther))


def _package(value: Any) -> str:
    """Return the package of an object's class, of a class, a function or a module."""
    kind = type(value)
    if issubclass(kind, types.ModuleType):
        name = _vars_of(value).get("__name__")
    elif kind is types.FunctionType:
        name = value.__module__
    else:
        name = _static(value if issubclass(kind, type) else kind, "__module__")
    return name.partition(".")[0] if type(name) is str else ""


def is_pydantic_secret(kind: type) -> bool:
    """Return whether a class is one of pydantic's for secrets, or derived from one.

    By name: pydantic need not be imported, and clients have methods named get_secret_value.
    """
    return any(
        _name(base).lstrip("_").startswith("Secret") and _package(base) == "pydantic"
        for base in _mro(kind)
    )


def _text_of(value: Any) -> str | None:
    kind = type(value)
    if issubclass(kind, bytes):
        return bytes.decode(value, "utf-8", "backslashreplace")
    if issubclass(kind, bytearray):
        return bytearray.decode(value, "utf-8", "backslashreplace")
    if issubclass(kind, str) and not issubclass(kind, enum.Enum):
        return str.__str__(value)
    return None


def _held(value: Any) -> _Held:
    """Yield what a value holds, each with its name, if it has one."""
    kind = type(value)
    if issubclass(kind, type):
        yield from _of_class(value)
    elif issubclass(kind, enum.Enum):
        stored = _vars_of(value)
        yield stored.get("_name_"), stored.get("_value_")
    elif issubclass(kind, types.FunctionType):
        yield from _of_function(value)
    elif issubclass(kind, types.MappingProxyType):
        yield from ((None, item) for item in gc.get_referents(value))  # its dictionary
    else:
        if issubclass(kind, BaseException):
            yield from ((None, getter.__get__(value)) for getter in _OF_EXCEPTIONS)
        yield from _items(value)
        # A module that a value holds is the code of others.
        attributes = [*_vars_of(value).items(), *_slots(value)]
        yield from ((n, item) for n, item in attributes if type(item) is not types.ModuleType)
        yield None, kind


def _items(value: Any) -> _Held:
    kind = type(value)
    if issubclass(kind, dict):
        items_now = dict.copy(value)  # another thread may change it
        yield from items_now.items()
        if "value" in items_now:  # an item of a container's environment
            yield items_now.get("name", items_now.get("key")), items_now["value"]
    for iterable in _ITERABLES:
        if issubclass(kind, iterable):
            items: list[object] = []
            with contextlib.suppress(RuntimeError):  # as above
                items.extend(itertools.islice(iterable.__iter__(value), _MOST_ITEMS))
            names = _static(kind, "_fields")  # of a named tuple
            names = names[: len(items)] if type(names) is tuple else ()
            yield from itertools.zip_longest(names, items)


def _slots(value: object) -> _Held:
    for base in _mro(type(value)):
        for name, slot in _vars(base).items():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(Exception):  # it is not set, or of a type written in C
                    yield name, slot.__get__(value)


def _of_class(cls: type) -> _Held:
    for base in _mro(cls):
        for name, item in _vars(base).items():
            if not name.startswith("__"):  # of Python and of those who describe fields
                yield name, item


def _of_function(function: types.FunctionType) -> _Held:
    """Yield what a function has around it, and its parameters' defaults."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # it is empty
            yield name, cell.cell_contents
    for name in code.co_names:
        found = function.__globals__.get(name)
        if type(found) in _PLAIN or issubclass(type(found), (*_ITERABLES, dict)):
            yield name, found
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(positional[len(positional) - len(defaults) :], defaults, strict=False)
    yield from (function.__kwdefaults__ or {}).items()


def _vars_of(value: object) -> dict[str, object]:
    """Return an object's ``__dict__``, as it is stored."""
    found = _static(type(value), "__dict__")
    if type(found) in (types.GetSetDescriptorType, types.MemberDescriptorType):
        with contextlib.suppress(Exception):  # as above
            return dict.copy(found.__get__(value))
    return {}


def _is_data(kind: type) -> bool:
    if issubclass(kind, _DATA + _WRAPPERS) or is_pydantic_secret(kind):
        return True
    return any(mark in _vars(base) for base in _mro(kind) for mark in _MARKS_OF_DATA)


def _static(kind: type, name: str) -> Any:
    """Return a class's attribute as it is stored; None if there is none."""
    for base in _mro(kind):
        if name in _vars(base):
            return _vars(base)[name]
    return None


# Of `type` itself: a metaclass can answer for its class.
_name: Callable[[type], str] = type.__dict__["__name__"].__get__
_mro: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_vars: Callable[[type], types.MappingProxyType[str, Any]] = type.__dict__["__dict__"].__get__


def _in_text(text: str, secret: bool) -> Iterator[str]:
    """Yield a secret, also its lines, or the secrets that a plain text shows."""
    # A key of many lines is often written in one, in JSON and in variables.
    unescaped = text.replace("\\n", "\n").strip()
    if secret and len(unescaped) >= _SHORTEST_SECRET:
        yield unescaped
        yield from (
            line.strip() for line in unescaped.splitlines()[1:] if len(line) >= _SHORTEST_LINE
        )
    for start, end in given_away(text[:_LONGEST_LOOKED_INTO]):
        found = text[start:end].replace("\\n", "\n").strip()
        # Of a URL's user and password also the password.
        for part in {found, found.partition(":")[2] if _URL_BEFORE.search(text[:start]) else found}:
            if len(part) >= _SHORTEST_SECRET:
                yield part
