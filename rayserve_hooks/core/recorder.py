"""Who is running, and what each call changes: the manager's side of a `CallbackCtx`.

This is the one file besides ``context.py`` that touches a context's private state.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

from rayserve_hooks.context import (
    CallbackCtx,
    ContextLogger,
    DeferredConfig,
    Handled,
    NodeResult,
)
from rayserve_hooks.core import threads
from rayserve_hooks.core.log import call_fields, fields, logger
from rayserve_hooks.core.masking import is_secret, redact, shown
from rayserve_hooks.trace import ABSENT, Change, TraceEntry

_MOST_ITEMS = 10_000  # of the context that are compared after each call
_DEEPEST = 50

# The call that this code belongs to, and whose recorder it is: work beside the hooks has its own.
_own_call: ContextVar[tuple[Recorder, TraceEntry] | None] = ContextVar("own_call", default=None)


class Recorder:
    """Brackets each call of a callback, so that errors, trace and conflicts can name it.

    A context has one. ``on_call`` is called with each call's trace entry before the call starts.
    """

    def __init__(
        self,
        ctx: CallbackCtx,
        *,
        attempt: int = 1,
        on_call: Callable[[TraceEntry], None] | None = None,
    ) -> None:
        self._state = ctx._state  # noqa: SLF001 - the link of the two
        self._state.recorder = self
        self._attempt, self._on_call = attempt, on_call
        self._conflicts: dict[str, str] = {}
        self.running: TraceEntry | None = None  # the innermost call
        self.assigned: set[str] = set()  # the fields that callbacks have assigned
        # What was started beside the hooks, until `with_background` takes it.
        self.background: list[tuple[TraceEntry, threads.ThreadCall[Any]]] = []
        self.values: Mapping[str, Any] = self._state.values
        self._before = seen(self.values)

    @property
    def secrets_among(self) -> tuple[object, ...]:
        """Where a context's secrets are: its fields, and its config where that is loaded."""
        config = self._state.llm_config
        # Of the config what the engine is given: the callbacks' arguments are known by callback.
        engine = () if isinstance(config, DeferredConfig) else getattr(config, "engine_kwargs", ())
        return self.values, engine

    def begin(self, callback: str, hook: str) -> tuple[TraceEntry, TraceEntry | None]:
        """Return a starting call's trace entry, and that of the call around it, for `end`."""
        outer = self.running
        if outer is not None:  # a hook call inside a callback: charge it with its own changes
            self.note_changes(outer)
        entry = self._entry(callback, hook)
        if self._on_call is not None:
            self._on_call(entry)
        self._run_as(entry)
        return entry, outer

    def _run_as(self, entry: TraceEntry | None) -> None:
        self.running = entry
        _own_call.set(None if entry is None else (self, entry))

    def end(self, entry: TraceEntry, outer: TraceEntry | None, outcome: str) -> None:
        self.note_changes(entry)
        self._run_as(outer)
        entry.finish(outcome)

    def note_handled(
        self,
        entry: TraceEntry,
        handled: Handled,
        kwargs: Mapping[str, Any],
        skipped: Sequence[str] = (),
    ) -> None:
        """Note that a call has taken over, and whom of its hook that skips.

        Secrets among the callback's ``kwargs`` stay out of the reason.
        """
        entry.reason = redact(handled.reason, self.values, kwargs)
        self.skip(entry.hook, skipped, entry.callback)

    def skip(self, hook: str, callbacks: Sequence[str], taken_over_by: str) -> None:
        """Note calls that are not made."""
        for callback in callbacks:
            entry = self._entry(callback, hook)
            entry.duration_s = 0.0
            entry.outcome = "skipped"
            entry.reason = f"{taken_over_by!r} took over"

    def log(self) -> ContextLogger:
        """Return the logger of the callback whose code asks; outside of all, of none."""
        recorder, entry = _own_call.get() or (None, None)
        if recorder is not self:  # a thread that the callback has started, or no callback at all
            entry = self.running
        if entry is None:
            return ContextLogger(fields=functools.partial(fields, node=self._state.node.id))
        return ContextLogger(entry.callback, functools.partial(call_fields, entry))

    def note_changes(self, entry: TraceEntry) -> None:
        """Charge ``entry`` with what differs from the last look, and warn of conflicts."""
        try:
            if self.values == self._before:
                return
        except Exception:  # noqa: S110 - suppress() would cost more than all the rest
            pass  # an array's == has no truth value: look closer
        now = seen(self.values)
        changes = changes_between(self._before, now)
        entry.changes = (*entry.changes, *changes)
        self._before = now
        last = entry.callback
        for path in (change.path for change in changes):
            earlier = self._conflicts.get(path, last)
            if earlier != last and not path.startswith("custom_data"):
                text = "callbacks %r and %r both set ctx.%s; %r ran last and has the last word"
                logger.warning(text, earlier, last, path, last, extra=call_fields(entry))
            self._conflicts[path] = last

    def note_assignment(self, name: str) -> None:
        if self.running is not None:
            self.assigned.add(name)

    def run_in_background(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        running = self.running
        assert running is not None
        name = getattr(fn, "__name__", type(fn).__name__)
        entry = self._entry(running.callback, running.hook, background=name)

        def run() -> Any:
            _own_call.set((self, entry))
            outcome = "failed"
            try:
                result = fn(*args)
                if inspect.isawaitable(result):
                    result = threads.run_coroutine(result)
                outcome = "returned"
                return result
            finally:
                entry.finish(outcome)

        call = threads.ThreadCall(run)
        self.background.append((entry, call))
        return call.future

    def take_over(self, handled: Handled) -> None:
        self._state.handled = handled

    def adopt(self, **values: Any) -> None:
        """Set fields on behalf of the initialization itself, not of a callback."""
        self._state.values.update(values)
        self._before = seen(self.values)

    def begin_with(self, calls: Sequence[TraceEntry]) -> None:
        """Put calls of an earlier process in front, for the trace and for conflicts."""
        self._state.trace.extend(calls)
        for call in calls:
            self._conflicts.update(dict.fromkeys(call.changed, call.callback))

    def set_engine(self, engine: object) -> None:
        self._state.engine = engine

    def set_nodes(self, results: Mapping[str, NodeResult]) -> None:
        self._state.nodes.update(results)

    def set_own_custom_data(self) -> None:
        """Copy ``ctx.custom_data`` to this node's result, once nothing adds to it any more."""
        node_id = self._state.node.id
        if here := self._state.nodes.get(node_id):
            custom_data = dict(self.values["custom_data"])
            self._state.nodes[node_id] = dataclasses.replace(here, custom_data=custom_data)

    def _entry(self, callback: str, hook: str, background: str = "") -> TraceEntry:
        process = self._state.process
        entry = TraceEntry(
            callback,
            hook,
            process.role,
            self._state.node.id,
            background=background,
            attempt=self._attempt,
            rank=process.rank,
        )
        self._state.trace.append(entry)
        return entry


def recorder_of(ctx: CallbackCtx) -> Recorder:
    """Return a context's recorder; one that was made by hand gets it here."""
    recorder = ctx._state.recorder  # noqa: SLF001 - as above
    return recorder or Recorder(ctx)


def snapshot(value: Any) -> Any:
    """Copy plain containers, and nothing in them, so that a later change in place shows."""
    if type(value) is dict:
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) is list:
        return [snapshot(item) for item in value]
    return value


class Large:
    """A container that is not looked into: another one, or another length, is a change."""

    __slots__ = ("_length", "_value")

    def __init__(self, value: Any) -> None:
        self._value, self._length = value, len(value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Large):
            return self._value is other._value and self._length == other._length
        unchanged: bool = self._length == len(self._value)
        return other is self._value and unchanged

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self._value).__name__} of {self._length} items>"


def seen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy plain containers as `snapshot` does, as far as each call can afford to compare them."""
    left = _MOST_ITEMS

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        kind = type(value)
        if kind is not dict and kind is not list:
            return value
        if len(value) > left or depth > _DEEPEST:
            return Large(value)
        left -= len(value)
        if kind is dict:
            return {key: copy(item, depth + 1) for key, item in value.items()}
        return [copy(item, depth + 1) for item in value]

    return {name: copy(value, 0) for name, value in values.items()}


def changes_between(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str = "", secret: bool = False
) -> tuple[Change, ...]:
    """Return where two snapshots of ``path`` differ, through dicts, in ``after``'s order."""
    changes: list[Change] = []
    for key in {**after, **before}:
        here = f"{path}.{key}" if path else str(key)
        hidden = secret or is_secret(key)
        old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
        # A dict that comes or goes whole counts as its keys, so that paths can be compared.
        if old is _ABSENT and isinstance(new, dict) and new:
            old = {}
        if new is _ABSENT and isinstance(old, dict) and old:
            new = {}
        if isinstance(old, dict) and isinstance(new, dict):
            changes.extend(changes_between(old, new, here, hidden))
        elif not _same(old, new):
            changes.append(Change(here, _text(old, hidden), _text(new, hidden)))
    return tuple(changes)


_ABSENT = object()


def _text(value: Any, hidden: bool) -> str:
    if value is _ABSENT:
        return ABSENT
    return repr(value) if isinstance(value, Large) and not hidden else shown(value, hidden)


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    try:
        return bool(old == new)
    except Exception:  # a value whose == cannot be a truth value, such as an array
        return False
