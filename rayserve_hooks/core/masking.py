"""Keep the values of secrets out of traces, logs and errors."""

from __future__ import annotations

import enum
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import TypeVar

from rayserve_hooks.core.known_secrets import is_pydantic_secret, secrets_among
from rayserve_hooks.core.secret_texts import (
    MASK,
    Span,
    given_away,
    masked_at,
    names_secret,
    occurrences,
    queries,
)

T = TypeVar("T")

_LONGEST = 80
_LONGEST_READ = 20 * _LONGEST

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
    if secret or is_pydantic_secret(type(value)):
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


_public: set[str] = set()


def publish(*names: str) -> None:
    """Keep names in texts that we ourselves write in the clear, such as those of callbacks.

    A variable like ``AUTH_MODULE`` may have a word for its value that is one, or a part of one.
    """
    _public.update(filter(None, names))


def redact(text: str, *values: object) -> str:
    """Mask the secrets in a text made by others: what it names as one, and those that are known.

    Known are those among ``values`` and in this process's environment. Of ``env_vars`` and the
    environment these are the ones whose own names say so: most are paths and numbers, which the
    text of an error needs.
    """
    return Masker(*values).text(text)


class Masker:
    """Masks secrets in texts; those among ``values`` and in the environment are known to it.

    They are looked for under keys and attributes that name secrets, in containers and objects of
    any class, and inside of other strings, as in a URL's password.
    """

    def __init__(self, *values: object) -> None:
        found = {*secrets_among(values), *secrets_among([dict(os.environ)])}
        self._known = sorted(found, key=len, reverse=True)
        names = "|".join(map(re.escape, sorted(_public, key=len, reverse=True)))
        self._names = re.compile(rf"(?<!\w)(?:{names})(?!\w)" if names else r"(?!)")

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        if not text:
            return text
        return masked_at(text, [*given_away(text), *queries(text), *self._found(text)])

    def source(self, text: str) -> str:
        """Return source code without secrets; in it ``token=token`` shows none."""
        return masked_at(text, [*given_away(text, quoted=True), *self._found(text)])

    def _found(self, text: str) -> Iterator[Span]:
        """Yield where a known secret is, unless that is a part of a name that is public."""
        names: list[Span] | None = None
        for start, end in occurrences(text, self._known):
            if names is None:
                names = [match.span() for match in self._names.finditer(text)]
            if not any(first <= start and end <= last for first, last in names):
                yield start, end
