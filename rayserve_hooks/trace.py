"""What ran, where, how long, and which fields each call changed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from rayserve_hooks.context import NodeInfo

# A child of Ray Serve's logger: in a replica only that one is set up to write INFO lines, to the
# replica's own log file and to its output (ray.serve._private.logging_utils, Ray 2.60).
LOGGER_NAME = "ray.serve.rayserve_hooks"
logger = logging.getLogger(LOGGER_NAME)


@dataclass(slots=True)
class TraceEntry:
    """One call of one callback in one hook.

    Attributes:
        callback: The callback's name.
        hook: The hook's name.
        role: The process it ran in: ``"replica"``, ``"node"`` (a Ray task on another node) or
            ``"driver"`` (an initialization outside of Ray Serve).
        node_id: Ray's id of the node.
        pid: The process id on that node.
        start: When it started, in seconds since the epoch.
        duration_s: How long it took; None while it runs.
        outcome: ``"running"``, ``"returned"``, ``"handled"``, ``"failed"``, ``"warned"`` (failed
            with ``on_error: warn``) or ``"interrupted"`` (ended by a ``KeyboardInterrupt``,
            ``SystemExit`` or cancellation).
        changes: The fields it changed, as ``"field"`` or ``"field.key"``. Never their values.
    """

    callback: str
    hook: str
    role: str
    node_id: str
    pid: int = field(default_factory=os.getpid)
    start: float = field(default_factory=time.time)
    duration_s: float | None = None
    outcome: str = "running"
    changes: tuple[str, ...] = ()
    _started: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    def finish(self, outcome: str) -> None:
        self.duration_s = time.perf_counter() - self._started
        self.outcome = outcome


class Trace(Sequence[TraceEntry]):
    """The calls of one initialization, in the order in which they started, node after node."""

    def __init__(self) -> None:
        self._entries: list[TraceEntry] = []

    @overload
    def __getitem__(self, index: int) -> TraceEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[TraceEntry]: ...
    def __getitem__(self, index: int | slice) -> TraceEntry | list[TraceEntry]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[TraceEntry]:
        return iter(self._entries)

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} calls>\n{self.table()}"

    def start(self, callback: str, hook: str, role: str, node: NodeInfo) -> TraceEntry:
        entry = TraceEntry(callback, hook, role, node.id)
        self._entries.append(entry)
        return entry

    def extend(self, entries: Sequence[TraceEntry]) -> None:
        self._entries.extend(entries)

    def who_changed(self, path: str) -> TraceEntry | None:
        """Find the last call that changed ``path``, such as ``"custom_data.key"``, or in it."""
        for entry in reversed(self._entries):
            if any(change == path or change.startswith(f"{path}.") for change in entry.changes):
                return entry
        return None

    def warn_of_conflict(self, path: str, earlier: str, later: str) -> None:
        logger.warning(
            "callbacks %r and %r both set ctx.%s; %r ran last and has the last word",
            earlier,
            later,
            path,
            later,
        )

    def table(self) -> str:
        """Format the calls for people, one a line."""
        return format_table(
            ("hook", "callback", "process", "pid", "node", "ms", "outcome", "changed"),
            [
                (
                    entry.hook,
                    entry.callback,
                    entry.role,
                    str(entry.pid),
                    entry.node_id[:8],
                    "" if entry.duration_s is None else f"{entry.duration_s * 1000:.1f}",
                    entry.outcome,
                    ", ".join(entry.changes),
                )
                for entry in self._entries
            ],
        )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, with two blanks between them."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def snapshot(value: Any) -> Any:
    """Copy plain containers, and nothing in them, so that a later change in place shows."""
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return [snapshot(item) for item in value]
    return value


def changed_paths(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """List where two snapshots differ, as dotted paths through dicts, in ``after``'s order."""
    paths: list[str] = []
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        # A dict that comes or goes whole counts as its keys, so that paths can be compared.
        if old is _ABSENT and isinstance(new, dict) and new:
            old = {}
        if new is _ABSENT and isinstance(old, dict) and old:
            new = {}
        if isinstance(old, dict) and isinstance(new, dict):
            paths.extend(f"{key}.{path}" for path in changed_paths(old, new))
        elif not _same(old, new):
            paths.append(str(key))
    return tuple(paths)


_ABSENT = object()


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    try:
        return bool(old == new)
    except Exception:  # a value whose == cannot be a truth value, such as an array
        return False
