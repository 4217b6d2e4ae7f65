"""From pydantic's errors to messages that name the value and say what to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from rayserve_hooks.core.masking import is_secret, redact, shown
from rayserve_hooks.core.secret_texts import MASK
from rayserve_hooks.errors import did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

T = TypeVar("T")

_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_KEY = "[key]"  # pydantic's end of a location where the key of a mapping is wrong
_WRITE = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "mapping": "a mapping",
    "path": "a path",
    "sequence": "a list",
    "string": "a string",
    "tuple": "a list",
}
_LIMITS = {
    "finite_number": "write a finite number",
    "greater_than": "write more than {gt:g}",
    "greater_than_equal": "write at least {ge:g}",
    "less_than": "write less than {lt:g}",
    "less_than_equal": "write at most {le:g}",
    "string_too_short": "write at least {min_length} characters",
    "too_short": "give at least {min_length} items",
    "too_long": "give at most {max_length} items",
}


def described(description: str, rules: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return a field of a dataclass that `adapter` reads, with what pydantic has to know of it."""
    return dataclasses.field(metadata={"description": description, **(rules or {})}, **options)


# Of dataclasses of the standard library: the schema is built where values are parsed, and not in
# each process that imports the class.
def adapter(cls: type[T]) -> TypeAdapter[T]:
    """Return pydantic's view of a dataclass that is written as a mapping."""
    from pydantic import TypeAdapter

    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


_adapters: dict[type, TypeAdapter[Any]] = {}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input, in our words."""

    path: str  # written like Python: "local" or "bundles[0]['CPU']"
    value: str  # formatted without secrets; empty where the text shows it
    text: str  # what to write; of an unknown or missing key, what is wrong with it
    of_key: bool = False  # it is about a key of the mapping at ``path``, not about a value

    def in_call(self, name: str) -> str:
        """Return the message for an argument, such as ``"Policy(local='X'): write a path"``."""
        if self.of_key:
            return f"{name}({self.path}) {self.text}" if self.path else f"{name} {self.text}"
        return f"{name}({self.path}={self.value or '...'}): {self.text}"

    def in_config(self, where: str) -> str:
        """Return the message for a config, such as ``"time_limits: total is 0; write ..."``."""
        where = f"{where}: {self.path}" if self.path else where
        if self.of_key or not self.value:
            return f"{where} {self.text}"
        return f"{where} is {self.value}; {self.text}"


def is_validation_error(error: BaseException) -> TypeGuard[ValidationError]:
    """Return whether an error is pydantic's, which is not imported to find out."""
    return type(error).__module__ == "pydantic_core._pydantic_core" and hasattr(error, "errors")


def problems_of(
    error: ValidationError, known: Collection[str], noun: str = "key"
) -> Iterator[Problem]:
    """Yield what pydantic reports, in our words; ``known`` are the names at the top level."""
    for details in error.errors(include_url=False):
        *outer, last = details["loc"] or [""]
        if details["type"] in ("extra_forbidden", "invalid_key", "unexpected_keyword_argument"):
            choices = f"; use one of {', '.join(known)}" if known else "; drop it"
            advice = did_you_mean(last, known) or choices
            yield Problem(_written(outer), "", f"has unknown {noun} {str(last)!r}{advice}", True)
        elif details["type"] in _MISSING:
            yield Problem(_written(outer), "", f"has no {noun} {last!r}; add it", True)
        elif last == _KEY:
            text = f"has key {outer[-1]!r}; {_advice(details)}"
            yield Problem(_written(outer[:-1]), "", text, True)
        else:
            value = shown(details["input"], any(map(is_secret, details["loc"])))
            text = _advice(details)
            if value == MASK:
                text = redact(text, {"secret": details["input"]})
            yield Problem(_written([*outer, last]), "" if text.startswith(value) else value, text)


def _written(path: Sequence[str | int]) -> str:
    return "".join(str(key) if index == 0 else f"[{key!r}]" for index, key in enumerate(path))


def _advice(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"use one of {', '.join(sorted(choices))}"
    if kind in _LIMITS:
        return _LIMITS[kind].format_map(context)
    if kind == "is_instance_of":  # of an abstract class
        kind = f"{context['class'].lower()}_type"
    written = _WRITE.get(kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_str"))
    if written == "a list" and type(details["input"]) is str:
        return "write a list, even of one item"
    if written:
        return f"write {written}"
    raised = context.get("error")
    if isinstance(raised, Exception):
        return str(raised)  # of a validator of ours
    return details["msg"][:1].lower() + details["msg"][1:]
