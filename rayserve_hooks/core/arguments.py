"""Constructors whose arguments are checked against their annotations."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar, Union

from rayserve_hooks.core.validation import refused_call

P = ParamSpec("P")
Self = TypeVar("Self")


def checked_arguments(
    init: Callable[Concatenate[Self, P], None],
) -> Callable[Concatenate[Self, P], None]:
    """Check the arguments of a constructor by pydantic, from its annotations.

    Whatever is wrong is reported together, in one error that names each argument and says what to
    write. A callback list is built where the config is made, so that is where it is seen.

    What an annotation of pydantic accepts is accepted, with one difference: a string, a number,
    a boolean or bytes must be one already. ``"1"`` is no number, ``1`` is no boolean, and a string
    is no list of letters. What YAML cannot write is converted: a list to a tuple or a set, a
    whole number to a float, a string to a path or a member of an enum. Other rules, such as
    ``Annotated[int, Field(ge=1)]`` or a validator that raises ``ValueError`` with a message of
    its own, are pydantic's.

    Annotations are read at the first call, so importing a callback stays cheap; the names in them
    must be importable then, and not under ``if TYPE_CHECKING`` alone.

    Args:
        init: A class's ``__init__``.

    Returns:
        A constructor with the same signature. It passes the checked and converted arguments on.

    Raises:
        CallbackConfigError: From the constructor, with one problem for each wrong argument.
        TypeError: From the constructor, if its annotations cannot be read.

    Example:
        >>> class Warmup:
        ...     @checked_arguments
        ...     def __init__(self, prompts: Sequence[str], rounds: int = 1) -> None:
        ...         self.prompts = prompts
        ...         self.rounds = rounds
        >>> Warmup("Hello", rounds="2")
        Traceback (most recent call last):
        rayserve_hooks.errors.CallbackConfigError: 2 problems:
        - Warmup(prompts='Hello'): write a list, even of one item
        - Warmup(rounds='2'): write a whole number
    """

    @functools.wraps(init)
    def checked(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        # A subclass that calls this constructor from its own is not what the arguments were
        # written for.
        inherited = type(self).__init__ is checked
        name = type(self).__name__ if inherited else init.__qualname__.split(".")[-2]
        positional, by_name = _checked(name, init, args, kwargs)
        init(self, *positional, **by_name)

    return checked


def _checked(
    name: str, init: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from pydantic import ValidationError

    try:
        return _validator(init)(*args, **kwargs)
    except ValidationError as error:
        by_kind: dict[object, list[str]] = {}
        for parameter in _parameters(init):
            by_kind.setdefault(parameter.kind, []).append(parameter.name)
        positional = [*by_kind.get(_POSITIONAL_ONLY, ()), *by_kind.get(_POSITIONAL_OR_KEYWORD, ())]
        known = [*by_kind.get(_POSITIONAL_OR_KEYWORD, ()), *by_kind.get(_KEYWORD_ONLY, ())]
        for variable in by_kind.get(_VAR_POSITIONAL, ()):
            positional += [f"{variable}[{index}]" for index in range(len(args) - len(positional))]
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        raise refused_call(name, error, given, sorted(known), positional) from None


_POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
_POSITIONAL_OR_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL


def _parameters(init: Callable[..., None]) -> list[inspect.Parameter]:
    return list(inspect.signature(init).parameters.values())[1:]


# By function and not in the closure of `checked`: a class of a notebook is pickled by value with
# its methods' closures, and a validator would have to travel with it.
@functools.cache
def _validator(
    init: Callable[..., None],
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    import pydantic

    try:
        hints = typing.get_type_hints(init, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"the arguments of {init.__qualname__}() cannot be checked: {error}; define or import "
            f"the name in module {init.__module__!r}, and not under TYPE_CHECKING alone"
        ) from error

    # Not `init` itself: a ValidationError from its body would look like one of its arguments.
    def collect(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    collect.__annotations__ = {name: _strict(hint) for name, hint in hints.items()}
    collect.__signature__ = inspect.Signature(_parameters(init))  # type: ignore[attr-defined]
    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    return pydantic.validate_call(config=config)(collect)


def _strict(hint: Any) -> Any:
    """Return the annotation with its scalars strict.

    Not pydantic's strict mode: that refuses a list for a tuple and a string for a path too, which
    YAML cannot write.
    """
    from pydantic import Strict

    if isinstance(hint, type) and hint in (bool, bytes, float, int, str):
        return Annotated[hint, Strict()]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    inner = tuple(map(_strict, arguments))
    if origin in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007 - of a tuple
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and inner:
        return origin[inner]  # type: ignore[index]
    return hint
