"""What somebody has meant who misspelt a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: object, known: Iterable[object], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like ``word``, or None if none is like it."""
    close = difflib.get_close_matches(str(word), map(str, known), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(word: object, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean '...'?"``, or nothing if no known name is like ``word``."""
    close = closest(word, known, cutoff=cutoff)
    return f"; did you mean {close!r}?" if close else ""
