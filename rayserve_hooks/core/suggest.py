"""What somebody has meant who misspelt a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean '...'?"``, or nothing if no known name is like ``word``."""
    close = difflib.get_close_matches(str(word), map(str, known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
