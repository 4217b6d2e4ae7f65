"""A callback that is configured as an instance, and how it travels."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, describe, raise_from

T = TypeVar("T")

Dumps = Callable[[Any], bytes]
"""Pickles a value; what it returns, ``pickle.loads`` reads."""


class ByObject(Generic[T]):
    """A value for each object, for as long as that lives; two that are equal have two."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[int, tuple[weakref.ref[Any], T]] = {}

    def of(self, owner: object) -> T:
        """Return an object's value, made at the first call.

        Raises:
            TypeError: The object takes no weak reference.
        """
        place = id(owner)
        reference, value = self._values.get(place, (None, None))
        if reference is not None and reference() is owner:
            return value  # type: ignore[return-value]
        made = weakref.ref(owner, functools.partial(self._forget, place)), self._make()
        self._values[place] = made
        return made[1]

    def _forget(self, place: int, reference: weakref.ref[Any]) -> None:
        if place in self._values and self._values[place][0] is reference:
            del self._values[place]


_PROCESS = os.urandom(16).hex()
_numbers = itertools.count()
# The pid, too: a forked process goes on with the same numbers.
_names = ByObject(lambda: f"{_PROCESS}:{os.getpid()}:{next(_numbers)}")


def identity(value: object) -> str:
    """Return a name of an object, which no other ever has: in any process, or after it is gone."""
    try:
        return _names.of(value)
    except TypeError:  # its place is its name, while whoever asked holds it
        return f"{_PROCESS}:{os.getpid()}:at {id(value)}"


class Instance:
    """An instance of a callback: the object here, its bytes in every other process.

    The bytes are made where the config is made, because the instance may open clients and locks
    while it runs, and what other processes get is the callback as it was configured.
    """

    def __init__(self, instance: object) -> None:
        self.class_name = type(instance).__name__
        self.identity = identity(instance)
        self._instance: object | None = instance
        self._pickled: bytes | None = None

    @property
    def cls(self) -> type:
        """The instance's class, in the process where it was configured."""
        return type(self._instance)

    def freeze(self, dumps: Dumps) -> None:
        """Pickle the instance, once; if one attribute refuses, raise a `TypeError` naming it."""
        if self._pickled is None:
            try:
                self._pickled = dumps(self._instance)
            except Exception as error:  # any class can refuse in its own way
                refusal = attribute_refusal(self._instance, dumps)
                if refusal:
                    raise TypeError(refusal) from error
                raise

    def load(self) -> object:
        """Return the instance; in another process than it was configured in, a copy of it."""
        if self._instance is None:
            assert self._pickled is not None
            try:
                # Ray has brought these bytes from the process that made the config.
                self._instance = pickle.loads(self._pickled)
            except Exception as error:  # importing its class runs other people's code
                problem = (
                    "the instance cannot be built again in this process: "
                    f"{redact(describe(error))}; name the class with kwargs instead"
                )
                raise_from(CallbackConfigError(problem), masked(error))
        return self._instance

    def __getstate__(self) -> dict[str, Any]:
        self.freeze(pickle.dumps)  # where no config has done it
        return {**self.__dict__, "_instance": None}

    def __repr__(self) -> str:
        return f"instance of {self.class_name}"


def attribute_refusal(instance: object, dumps: Dumps, owner: str = "") -> str | None:
    """Return which attribute of an object does not pickle, and why; None if all do.

    ``owner`` is the attribute that the object itself is, with a dot.
    """
    for name, value in _attributes(instance):
        try:
            dumps(value)
        except Exception as reason:  # any value can refuse in its own way
            return f"its attribute {owner + name!r}, a {type(value).__name__}: {reason}"
    return None


def class_refusal(cls: type, dumps: Dumps) -> str | None:
    """Return why a class that no other process has, such as one of a notebook, cannot be sent."""
    try:
        dumps(cls)
    except Exception as error:  # any value of it can refuse in its own way
        for name, value in vars(cls).items():
            try:
                dumps(value)
            except Exception as refusal:  # as above
                kind = type(value).__name__
                return (
                    f"its class is in {cls.__module__!r}, which is another module there, and does "
                    f"not pickle for its attribute {name!r}, a {kind}: {redact(str(refusal))}"
                )
        reason = redact(str(error))
        return f"its class is in {cls.__module__!r}, which is another module there: {reason}"
    return None


def _attributes(instance: object) -> Iterator[tuple[str, object]]:
    """Yield what pickling takes of an instance: its attributes, or what ``__getstate__`` leaves."""
    # Of a frozen dataclass with slots __getstate__ returns a list without names.
    state = _mappings(instance.__getstate__()) or _mappings(object.__getstate__(instance))
    for name, value in (item for part in state for item in part.items()):
        if name in _PYDANTIC and isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _mappings(state: object) -> list[Mapping[str, object]]:
    parts = state if isinstance(state, tuple) else (state,)  # a tuple where there are slots
    return [part for part in parts if isinstance(part, Mapping)]


_PYDANTIC = ("__dict__", "__pydantic_extra__", "__pydantic_private__")
"""Where the state of a pydantic model has its attributes."""
