"""What ran, where, how long, and which fields each call changed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

ABSENT = "<absent>"
"""What a `Change` shows in place of a key that is not there."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a call changed. Secrets are masked, so that a trace can be logged as it is.

    Attributes:
        path: The field, as ``"field"``, or the key of a dict field, as ``"field.key.key"``.
            A dict or list that is too large to be compared is one value.
        before: The value before the call, formatted; `ABSENT` for a new key.
        after: The value after it, formatted; `ABSENT` for a deleted key.
    """

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


@dataclass(slots=True)
class TraceEntry:
    """One call of one callback in one hook, or one that was skipped.

    Attributes:
        callback: The callback's name.
        hook: The hook's name.
        role: The kind of process it ran in; see `rayserve_hooks.context.ProcessInfo`.
        node_id: Ray's id of the node.
        pid: The process id on that node.
        start: When it started, in seconds since the epoch.
        duration_s: How long it took; None while it runs.
        outcome: ``"running"``, ``"returned"``, ``"handled"``, ``"failed"``, ``"warned"`` (failed
            with ``on_error: warn``), ``"timed out"``, ``"interrupted"`` (ended by a
            cancellation, or with its process) or ``"skipped"`` (not called, because another
            callback had taken over).
        changes: What it changed, from what to what.
        reason: What a ``Handled`` gave as its reason, secrets masked; of a skipped call, who had
            taken over.
        background: Name of the function it had given to ``ctx.run_in_background``, if the call
            is that one; empty for the hook's own call.
        attempt: 1, or 2 where the process of another node was killed and started again.
        rank: The process's rank, where it has one.
    """

    callback: str
    hook: str
    role: str
    node_id: str
    pid: int = field(default_factory=os.getpid)
    start: float = field(default_factory=time.time)
    duration_s: float | None = None
    outcome: str = "running"
    changes: tuple[Change, ...] = ()
    reason: str = ""
    background: str = ""
    attempt: int = 1
    rank: int | None = None
    _started: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    @property
    def process(self) -> str:
        """The process it ran in, with its rank if it has one, such as ``"worker 1"``."""
        return self.role if self.rank is None else f"{self.role} {self.rank}"

    @property
    def changed(self) -> tuple[str, ...]:
        """The paths of `changes`."""
        return tuple(change.path for change in self.changes)

    @property
    def running_s(self) -> float:
        """Seconds since it started; only where it runs."""
        return time.perf_counter() - self._started

    def finish(self, outcome: str) -> None:
        """Note the end of the call; only its first end counts."""
        if self.duration_s is None:  # a call that was given up on may still end
            self.duration_s = self.running_s
            if self.outcome == "running":  # not set by the call itself
                self.outcome = outcome


class Trace(list[TraceEntry]):
    """The calls of one start, in the order in which they started, process after process."""

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} calls>\n{self.table()}"

    def who_changed(self, path: str) -> TraceEntry | None:
        """Find the last call that changed ``path``, such as ``"custom_data.key"``, or in it."""
        for entry in reversed(self):
            if any(changed == path or changed.startswith(f"{path}.") for changed in entry.changed):
                return entry
        return None

    def table(self) -> str:
        """Format the calls for people, one a line."""
        header = ("hook", "callback", "process", "pid", "node", "ms", "outcome", "changed")
        return format_table(header, [_row(entry) for entry in self])


def _row(entry: TraceEntry) -> tuple[str, ...]:
    background = f"/{entry.background}" if entry.background else ""
    reason = f": {entry.reason}" if entry.reason else ""
    attempt = f", attempt {entry.attempt}" if entry.attempt > 1 else ""
    return (
        entry.hook,
        f"{entry.callback}{background}",
        entry.process,
        str(entry.pid),
        entry.node_id[:8],
        "" if entry.duration_s is None else f"{entry.duration_s * 1000:.1f}",
        f"{entry.outcome}{reason}{attempt}",
        ", ".join(map(str, entry.changes)),
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, with two blanks between them."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
