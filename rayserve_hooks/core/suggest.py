"""The likely meaning of a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """Return the end of a message about an unknown name, such as ``"; did you mean 'kwargs'?"``.

    Args:
        word: What was written. A key of a YAML mapping need not be a string.
        known: The names there are.
        cutoff: How alike the two must be, from 0 to 1.

    Returns:
        The hint with the closest name; an empty string if none is close.
    """
    close = difflib.get_close_matches(str(word), [str(name) for name in known], 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
