"""The logger of this package, and what its records say besides their text."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from rayserve_hooks.context import LOGGER_NAME
from rayserve_hooks.core.hooks import PHASES
from rayserve_hooks.errors import Phase
from rayserve_hooks.trace import TraceEntry

logger = logging.getLogger(LOGGER_NAME)

TRACE_VARIABLE = "RAYSERVE_HOOKS_LOG_TRACE"
"""Set to 1 it has the trace of each start logged at INFO, not at DEBUG."""


def trace_is_wanted() -> bool:
    """Return whether the trace of a start that went well is wanted in the log."""
    return os.environ.get(TRACE_VARIABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def fields(
    *,
    callback: str | None = None,
    hook: str | None = None,
    phase: Phase | None = None,
    node: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Return the ``extra`` of a record, without what is None.

    Ray's JSON formatter writes whatever a record has beyond the standard library's attributes
    (``ray._common.formatters``, Ray 2.60), so only plain strings and numbers may be in it. ``node``
    is Ray's node id.
    """
    values = {
        "callback": callback,
        "hook": hook,
        "phase": None if phase is None else phase.value,
        "node": node,
        "seconds": None if seconds is None else round(seconds, 6),
    }
    return {name: value for name, value in values.items() if value is not None}


def call_fields(entry: TraceEntry) -> dict[str, Any]:
    """Return the fields of a record that is about one call, ``seconds`` being how long it took."""
    return fields(
        callback=entry.callback,
        hook=entry.hook,
        phase=PHASES[entry.hook],
        node=entry.node_id,
        seconds=seconds_of(entry),
    )


def seconds_of(entry: TraceEntry) -> float:
    """Return how long a call took or, in whichever process it runs, has been running."""
    return time.time() - entry.start if entry.duration_s is None else entry.duration_s
