"""Constructors whose arguments are checked against their annotations."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from rayserve_hooks.core.validation import problems_of
from rayserve_hooks.errors import CallbackConfigError, raise_from

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
        from pydantic import ValidationError

        by_position = dict(zip(names, args, strict=False))
        if len(args) > len(names) or by_position.keys() & kwargs.keys():
            init(self, *args, **kwargs)  # Python's own TypeError
        model = arguments_model(init)
        try:
            arguments = model(**{**by_position, **kwargs})
        except ValidationError as error:
            problems = problems_of(error, sorted(model.model_fields), noun="argument")
            texts = (problem.in_call(type(self).__name__) for problem in problems)
            raise_from(CallbackConfigError(*texts), None)
        given = {name: getattr(arguments, name) for name in arguments.model_fields_set}
        init(self, **given)  # type: ignore[call-arg]

    return checked


# By function and not in the closure of `checked`: a class of a notebook is pickled by value with
# its methods' closures, and a model would have to travel with it.
@functools.cache
def arguments_model(init: Callable[..., None]) -> type[BaseModel]:
    """Return the pydantic model of a constructor's arguments."""
    import pydantic

    hints = typing.get_type_hints(init, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    config = pydantic.ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", protected_namespaces=()
    )
    return pydantic.create_model("Arguments", __config__=config, **fields)
