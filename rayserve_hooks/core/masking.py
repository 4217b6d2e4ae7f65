"""Keep the values of secrets out of traces, logs and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TypeVar

from rayserve_hooks.core.secret_texts import (
    MASK,
    given_away,
    masked_at,
    names_place,
    names_secret,
    occurrences,
    queries,
)

T = TypeVar("T")

_LONGEST = 80
_LONGEST_READ = 20 * _LONGEST
_SHORTEST_SECRET = 6  # replacing a shorter one would only garble the text
_SHORTEST_LINE = 12
_LONGEST_LOOKED_INTO = 20_000
_MOST_VALUES = 100_000  # that are looked at for secrets

_URL_BEFORE = re.compile(r"(?:://|%3A%2F%2F)\Z", re.IGNORECASE)
_PLAIN = (int, bool, float, complex, type(None))
_DEEPEST = 8  # what is deeper is beyond _LONGEST, or holds itself


def is_secret(key: object) -> bool:
    """Return whether a key looks like that of a secret, such as ``hf_token`` or ``apiKey``.

    ``env_vars`` is one: people put all their credentials there.
    """
    return names_secret(key) or (isinstance(key, str) and key == "env_vars")


def shown(value: object, secret: bool = False, depth: int = 0) -> str:
    """Format a value for people, without secrets.

    Strings are cut short; of an object that is no plain data only the class is named, since its
    own repr may show anything. A ``SecretStr`` of pydantic is masked wherever it is.
    """
    if secret or _is_masked(value):
        return MASK
    if depth > _DEEPEST:
        text = "..."
    elif isinstance(value, Mapping):
        items = (
            f"{shown(key, depth=depth + 1)}: {shown(item, is_secret(key), depth + 1)}"
            for key, item in _first(value.items())
        )
        text = "{" + ", ".join(items) + "}"
    elif isinstance(value, list | tuple | set | frozenset):
        text = "[" + ", ".join(shown(item, depth=depth + 1) for item in _first(value)) + "]"
    elif isinstance(value, str):
        cut = value[:_LONGEST_READ]
        text = repr(masked_at(cut, [*given_away(cut), *queries(cut)]))
    # Of a subclass the repr may be anybody's.
    elif type(value) in _PLAIN or isinstance(value, PurePath):
        text = repr(value)
    elif isinstance(value, enum.Enum):
        text = f"<{type(value).__name__}.{value.name}: {shown(value.value, depth=depth + 1)}>"
    elif type(value).__name__ == "PlacementGroup":  # told apart by their ids alone
        text = f"<PlacementGroup {value.id.hex()}>"  # type: ignore[attr-defined]
    else:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _first(items: Iterable[T]) -> Iterable[T]:
    """Return as many as can be shown: each takes a character."""
    return itertools.islice(items, _LONGEST)


def _is_masked(value: object) -> bool:
    # By name: pydantic need not be imported, and clients have methods named get_secret_value.
    return any(
        base.__module__.startswith("pydantic.") and base.__name__.lstrip("_").startswith("Secret")
        for base in type(value).__mro__
    )


def redact(text: str, *values: object) -> str:
    """Mask the secrets in a text made by others: what it names as one, and those that are known.

    Known are those among ``values`` and in this process's environment. Of ``env_vars`` and the
    environment these are the ones whose own names say so: most are paths and numbers, which the
    text of an error needs.
    """
    return Masker(*values).text(text)


class Masker:
    """Masks secrets in texts; those among ``values`` and in the environment are known to it.

    They are looked for under keys that name secrets, in plain containers, dataclasses and
    pydantic's models and secrets, and inside of other strings, as in a URL's password.
    """

    def __init__(self, *values: object) -> None:
        found = {*_secrets(values), *_secrets([dict(os.environ)])}
        self._known = sorted(found, key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        if not text:
            return text
        spans = [*given_away(text), *queries(text), *occurrences(text, self._known)]
        return masked_at(text, spans)

    def source(self, text: str) -> str:
        """Return source code without secrets; in it ``token=token`` shows none."""
        spans = [*given_away(text, quoted=True), *occurrences(text, self._known)]
        return masked_at(text, spans)


def _secrets(values: Iterable[object]) -> Iterator[str]:
    """Yield the secrets among values, as far as one failure can afford to look for them."""
    waiting = deque((value, False) for value in values)
    seen: set[int] = set()
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        value, secret = waiting.popleft()
        text = _text_of(value)
        if text is not None:
            yield from _in_text(text, secret or _is_masked(value))
        elif type(value) not in _PLAIN and id(value) not in seen:
            seen.add(id(value))
            # One look at a time, or a long list would take all.
            waiting.extend(itertools.islice(_items(value, secret), _MOST_VALUES))


def _text_of(value: object) -> str | None:
    with contextlib.suppress(Exception):  # a value of any class can have code of its own
        if _is_masked(value):
            value = value.get_secret_value()  # type: ignore[attr-defined]
        if isinstance(value, bytes | bytearray):
            return bytes(value).decode("utf-8", "backslashreplace")
        if isinstance(value, str):
            return str(value)
    return None


def _items(value: object, secret: bool) -> Iterator[tuple[object, bool]]:
    """Yield what a container holds, each with whether it is a secret."""
    with contextlib.suppress(Exception):  # as above
        if isinstance(value, Mapping):
            yield from ((item, secret or _holds_secret(key, item)) for key, item in value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            names = getattr(value, "_fields", ()) if isinstance(value, tuple) else ()
            for name, item in itertools.zip_longest(names, value):
                yield item, secret or _holds_secret(name, item)
        elif dataclasses.is_dataclass(value) or hasattr(type(value), "__pydantic_fields__"):
            names = [*getattr(type(value), "__dataclass_fields__", ())]
            slots = {name: object.__getattribute__(value, name) for name in names}
            fields = {**slots, **getattr(value, "__dict__", {})}
            for name, item in fields.items():
                yield item, secret or _holds_secret(name, item)


def _holds_secret(name: object, value: object) -> bool:
    return names_secret(name) and not names_place(name, value)


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
