"""Constructors whose arguments are checked against their annotations."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from rayserve_hooks.core.validation import problems_of
from rayserve_hooks.errors import CallbackConfigError

if typing.TYPE_CHECKING:
    from pydantic import BaseModel

P = ParamSpec("P")
Self = TypeVar("Self")


def checked_arguments(
    init: Callable[Concatenate[Self, P], None],
) -> Callable[Concatenate[Self, P], None]:
    """Check and convert the arguments of a constructor by pydantic, from its annotations.

    Args:
        init: A class's ``__init__``; its annotations must be importable at run time. They are
            read at the first call, so that importing a callback stays cheap.

    Returns:
        A constructor with the same signature, which passes the converted arguments on.

    Raises:
        CallbackConfigError: From the constructor: names each wrong argument, as in
            ``"Warmup(rounds='many'): write a whole number"``.
    """
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        by_position = dict(zip(names, args, strict=False))
        if len(args) > len(names) or by_position.keys() & kwargs.keys():
            init(self, *args, **kwargs)  # Python's own TypeError
        given = {**by_position, **kwargs}
        init(self, **_checked(type(self).__name__, init, given))  # type: ignore[call-arg]

    return checked


def _checked(name: str, init: Callable[..., None], given: dict[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        arguments = arguments_model(init)(**given)
    except ValidationError as error:
        known = sorted(arguments_model(init).model_fields)
        problems = problems_of(error, known, noun="argument")
        raise CallbackConfigError(*(problem.in_call(name) for problem in problems)) from None
    return {field: getattr(arguments, field) for field in arguments.model_fields_set}


# By function and not in the closure of `checked`: a class of a notebook is pickled by value with
# its methods' closures, and a model would have to travel with it.
@functools.cache
def arguments_model(init: Callable[..., None]) -> type[BaseModel]:
    """Return the pydantic model of a constructor's arguments."""
    import pydantic

    hints = typing.get_type_hints(init, include_extras=True)
    fields: dict[str, Any] = {
        name: (
            hints.get(name, Any),
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for name, parameter in list(inspect.signature(init).parameters.items())[1:]
    }
    config = pydantic.ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", protected_namespaces=()
    )
    return pydantic.create_model("Arguments", __config__=config, **fields)
