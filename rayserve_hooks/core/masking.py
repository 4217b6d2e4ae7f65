"""Keep the values of secrets out of traces, logs and errors."""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

T = TypeVar("T")

MASK = "***"
_LONGEST = 80
_SHORTEST_SECRET = 6  # replacing a shorter one would only garble the text

_SECRET_KEY = re.compile(
    r"passw|passphrase|secret|credential|bearer"
    r"|(?:api|access|account|encryption|private|signing|storage)_?keys?(?:$|[^a-z0-9])"
    r"|token(?:$|[^a-z0-9s])"  # but no tokenizer, and no max_num_batched_tokens
    r"|(?:^|[^a-z0-9])(?:auth|authorization|cookie|pass|pwd|sas|signature)(?:$|[^a-z0-9])"
)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
_PLAIN = (int, bool, float, complex, type(None))
_DEEPEST = 8  # what is deeper is beyond _LONGEST, or holds itself


def is_secret(key: object) -> bool:
    """Return whether a key looks like that of a secret, such as ``hf_token`` or ``apiKey``.

    ``env_vars`` is one: people put all their credentials there.
    """
    return _names_secret(key) or (isinstance(key, str) and key == "env_vars")


def _names_secret(key: object) -> bool:
    # Of other keys no text is asked for, which may be anybody's code.
    return isinstance(key, str) and bool(_SECRET_KEY.search(_CAMEL_CASE.sub("_", key).lower()))


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
        text = repr(_USER_IN_URL.sub(MASK, value))
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


def redact(text: str, values: Mapping[str, Any]) -> str:
    """Mask the secrets among ``values`` wherever they occur in a text made by others.

    Of ``env_vars`` only those whose own names say so: most are paths and numbers, which the text
    of an error needs.
    """
    for secret in sorted(_secrets(values), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return _USER_IN_URL.sub(MASK, text)


def _secrets(value: object, secret: bool = False) -> Iterable[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, secret or _names_secret(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _secrets(item, secret)
    elif _is_masked(value):
        yield from _secrets(value.get_secret_value(), secret=True)  # type: ignore[attr-defined]
    elif secret and isinstance(value, str) and len(value) >= _SHORTEST_SECRET:
        yield value
