"""From pydantic's errors to messages that name the value and say what to write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayserve_hooks.core.masking import MASK, is_secret, redact, shown
from rayserve_hooks.core.suggest import did_you_mean
from rayserve_hooks.errors import CallbackConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_Path = tuple[Hashable, ...]

_KEY = "[key]"  # the end of a location where the key of a mapping is wrong
_UNKNOWN = ("extra_forbidden", "invalid_key", "unexpected_keyword_argument")
_MISSING = (
    "missing",
    "missing_argument",
    "missing_keyword_only_argument",
    "missing_positional_only_argument",
)
_TYPES = {
    "bool": "true or false",
    "bytes": "bytes",
    "dataclass": "a mapping",
    "decimal": "a number",
    "dict": "a mapping",
    "float": "a number",
    "frozen_set": "a list",
    "int": "a whole number",
    "iterable": "a list",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping",
    "none": "null",
    "path": "a path",
    "sequence": "a list",
    "set": "a list",
    "string": "a string",
    "tuple": "a list",
}
# "int_type" for an object, "int_parsing" for a string that is no number, and so on.
_TYPE_ERROR = re.compile(
    r"(\w+?)_(?:type|parsing|parsing_size|from_float|attributes_type|exact_type|sub_type|unicode"
    r"|required|str)"
)
_ABSTRACT = {"Mapping": "a mapping", "PathLike": "a path", "Sequence": "a list"}
_CONSTRAINTS = {
    "callable_type": "pass a function",
    "finite_number": "write a finite number",
    "greater_than": "write more than {gt}",
    "greater_than_equal": "write at least {ge}",
    "is_instance_of": "pass an instance of {class}",
    "is_subclass_of": "pass a subclass of {class}",
    "less_than": "write less than {lt}",
    "less_than_equal": "write at most {le}",
    "multiple_argument_values": "given by position and by name; keep one of them",
    "multiple_of": "write a multiple of {multiple_of}",
    "string_pattern_mismatch": "write a string that matches {pattern!r}",
    "string_too_long": "write at most {max_length} characters",
    "string_too_short": "write at least {min_length} characters",
    "too_long": "give at most {max_length} items",
    "too_short": "give at least {min_length} items",
}
# What may be written, as pydantic lists it: "'PACK', 'SPREAD' or 'STRICT_PACK'".
_CHOICE = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|<[^>]*>|[^\s,'"]+""")
_NOT_THERE = object()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input, in our words.

    Attributes:
        path: Where, written like Python: ``"local"`` or ``"bundles[0]['CPU']"``; empty for the
            whole input.
        value: The input there, formatted without secrets; empty where ``text`` shows it already
            or is about the whole input.
        text: What to write. Of a problem with a key, what is wrong with it too.
        of_key: Whether a key is unknown, missing or of the wrong type: ``path`` is then that of
            the mapping, and ``text`` starts with a verb.
    """

    path: str
    value: str
    text: str
    of_key: bool = False

    def in_call(self, name: str) -> str:
        """Return the message for an argument, such as ``"Policy(local='X'): write a path"``.

        Args:
            name: The class or function that was called.
        """
        if self.of_key:
            return f"{name}({self.path}) {self.text}" if self.path else f"{name} {self.text}"
        argument = f"{self.path}={self.value or '...'}" if self.path else "..."
        return f"{name}({argument}): {self.text}"

    def in_config(self, where: str) -> str:
        """Return the message for a config, such as ``"time_limits: total is 0; write seconds"``.

        Args:
            where: The config's field, such as ``"callbacks[0]"``.
        """
        if self.path:
            where = f"{where}: {self.path}"
        if self.of_key:
            return f"{where} {self.text}"
        return f"{where} is {self.value}; {self.text}" if self.value else f"{where}: {self.text}"


def refused_call(
    name: str,
    error: ValidationError,
    given: Mapping[str, object],
    known: Collection[str] = (),
    positional: Sequence[str] = (),
) -> CallbackConfigError:
    """Return the error for a call whose arguments pydantic refused.

    Args:
        name: The class or function that was called.
        error: What pydantic raised.
        given: The arguments by name.
        known: The names of all arguments, in the order in which a message lists them.
        positional: The names of positional arguments, where pydantic has their numbers only.
    """
    problems = problems_of(error, given, known, positional, noun="argument")
    return CallbackConfigError(*(problem.in_call(name) for problem in problems))


def problems_of(
    error: ValidationError,
    given: object,
    known: Collection[str] = (),
    positional: Sequence[str] = (),
    noun: str = "key",
) -> list[Problem]:
    """Return what a ``ValidationError`` reports, one problem for each place of the input.

    They are in the order of the input's keys; what is missing there comes last.

    Args:
        error: What pydantic raised.
        given: The input that was validated. It tells keys from the labels that pydantic puts
            into its locations for the members of a union.
        known: The names at the top level, in the order in which a message lists them.
        positional: The names of positional arguments, where pydantic has their numbers only.
        noun: What a name at the top level is called.
    """
    found: dict[tuple[bool, _Path], list[Problem]] = {}
    for details in error.errors(include_url=False):
        path = _path_of(details, given, positional)
        problem = (
            _surplus(details, positional)
            or _problem_with_key(details, path, known, noun)
            or _problem_with_value(details, path, given)
        )
        found.setdefault((problem.of_key, path), []).append(problem)
    # A union reports every member; the one with an error deeper inside is what was meant.
    outer = {path[:length] for _, path in found for length in range(len(path))}
    order = list(given) if isinstance(given, Mapping) else []
    problems = (
        _merged(of_one_place)
        for (of_key, path), of_one_place in sorted(
            found.items(), key=lambda item: _position(item[0][1], order)
        )
        if of_key or path not in outer
    )
    return list(dict.fromkeys(problems))


def _position(path: _Path, order: list[Hashable]) -> int:
    return order.index(path[0]) if path and path[0] in order else len(order)


def _merged(problems: Sequence[Problem]) -> Problem:
    """Return one problem for what the members of a union say: "write a string or a list"."""
    texts = list(dict.fromkeys(problem.text for problem in problems))
    if all(text.startswith("write ") for text in texts):
        texts[1:] = [text.removeprefix("write ") for text in texts[1:]]
    return dataclasses.replace(problems[0], text=" or ".join(texts))


def _path_of(details: ErrorDetails, given: object, positional: Sequence[str]) -> _Path:
    """Return the keys that lead to an error, without the labels of a union's members."""
    location: list[str | int] = [part for part in details["loc"] if part != _KEY]
    if location and isinstance(location[0], int) and location[0] < len(positional):
        location[0] = positional[location[0]]
    keys: list[Hashable] = []
    value = given
    for index, part in enumerate(location):
        key, inner = _step(value, part)
        is_missing = details["type"] in _MISSING and index == len(location) - 1
        if inner is not _NOT_THERE or index == 0 or is_missing or isinstance(part, int):
            keys.append(key)
            value = inner
        elif value is _NOT_THERE and part.isidentifier():  # `given` does not reach so far
            keys.append(key)
    return tuple(keys)


def _step(value: object, part: str | int) -> tuple[Hashable, object]:
    """Return the key that a part of a location means, and what is there."""
    if isinstance(value, Mapping):
        # Of a key that is neither a string nor a whole number a location has the repr.
        same = () if part in value else (key for key in value if repr(key) == part)
        key = next(iter(same), part)
        return key, value.get(key, _NOT_THERE)
    if isinstance(part, int) and isinstance(value, Sequence) and part < len(value):
        return part, value[part]
    return part, _NOT_THERE


def _written(path: _Path) -> str:
    if not path:
        return ""
    first = path[0] if isinstance(path[0], str) else f"[{shown(path[0])}]"
    return first + "".join(f"[{shown(key)}]" for key in path[1:])


def _surplus(details: ErrorDetails, positional: Sequence[str]) -> Problem | None:
    if details["type"] != "unexpected_positional_argument":
        return None
    count = len(positional)
    most = f"at most {count}" if count else "no"
    text = f"takes {most} positional argument{'s' * (count != 1)}; drop the rest"
    return Problem("", "", text, of_key=True)


def _problem_with_key(
    details: ErrorDetails, path: _Path, known: Collection[str], noun: str
) -> Problem | None:
    if not path:
        return None
    if len(path) > 1:
        known, noun = (), "key"
    name = f"{noun} {shown(path[-1])}"
    if details["type"] in _UNKNOWN:
        advice = f"; use one of {', '.join(known)}" if known else "; drop it"
        text = f"has unknown {name}{did_you_mean(path[-1], known) or advice}"
    elif details["type"] in _MISSING:
        text = f"has no {name}; add it"
    elif details["loc"][-1] == _KEY:
        text = f"has {name}; {_our_text(details) or _their_text(details)}"
    else:
        return None
    return Problem(_written(path[:-1]), "", text, of_key=True)


def _problem_with_value(details: ErrorDetails, path: _Path, given: object) -> Problem:
    value = shown(details["input"], any(map(is_secret, path)))
    text = _our_text(details)
    if text == "write a list" and isinstance(details["input"], str):
        text = "write a list, even of one item"
    if not text:
        secret = {"secret": details["input"]} if value == MASK else {}
        text = redact(_their_text(details), {"given": given, **secret})
        if not path or text.startswith(value):
            value = ""
    return Problem(_written(path), value, text)


def _our_text(details: ErrorDetails) -> str:
    """Return what to write by pydantic's type of error; an empty string if it is none of ours."""
    kind = details["type"]
    context = details.get("ctx", {})
    if kind in ("enum", "literal_error"):
        listed = (c for c in _CHOICE.findall(context["expected"]) if c != "or")
        choices = sorted(c[1:-1] if c[0] in "'\"" else c for c in listed)
        return f"use one of {', '.join(choices)}"
    if context.get("class") in _ABSTRACT:
        return f"write {_ABSTRACT[context['class']]}"
    if kind in _CONSTRAINTS:
        numbers = {
            name: int(number) if isinstance(number, float) and number.is_integer() else number
            for name, number in context.items()
        }
        return re.sub(r"\b1 (\w+)s$", r"1 \1", _CONSTRAINTS[kind].format_map(numbers))
    match = _TYPE_ERROR.fullmatch(kind)
    return f"write {_TYPES[match[1]]}" if match and match[1] in _TYPES else ""


def _their_text(details: ErrorDetails) -> str:
    """Return the message of the validator that refused the input, or else pydantic's own."""
    raised = details.get("ctx", {}).get("error")
    if isinstance(raised, Exception) and str(raised):
        return str(raised)
    message = details["msg"].rstrip(" ,.")
    return message[:1].lower() + message[1:]
