"""`Outcome`, the whole story of a simulated start."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from rayserve_hooks.context import CallbackCtx, NodeResult
from rayserve_hooks.errors import HookError, formatted
from rayserve_hooks.trace import Trace, TraceEntry


@dataclass(frozen=True, repr=False)
class Outcome:
    """What a simulated start of a replica, and its end, has done.

    Args:
        config: The replica's config, as the engine would get it.
        trace: All calls, process after process.
        error: What has ended it, if anything has; what failed in the clean-up is among its
            ``cleanup_errors``.
        ctx: The replica's context; None if nothing got so far.
        engine: The stand-in for vLLM's client that callbacks got as ``ctx.engine``.
        shared: What callbacks have changed on their classes, or in modules that are callbacks, such
            as ``"MyCallback.cache"``: all simulated processes saw it, and real ones would not.
        log: What this package and ``ctx.log`` have logged, a line each, with the level.
    """

    config: Any
    trace: Trace
    error: BaseException | None = None
    ctx: CallbackCtx | None = None
    engine: Any = None
    shared: Sequence[str] = ()
    log: Sequence[str] = ()

    @property
    def succeeded(self) -> bool:
        """Whether the replica got ready, and was shut down."""
        return self.error is None

    @property
    def order(self) -> list[str]:
        """What ran, a text for each call, such as ``"node-2: on_before_download: MyCallback"``.

        The replica's own are ``"replica: ..."``, a worker's ``"worker 0 on node-1: ..."``. An
        outcome other than ``"returned"`` is added in brackets.
        """
        return [_text_of(entry) for entry in self.trace]

    def calls(
        self,
        callback: str | None = None,
        hook: str | None = None,
        *,
        node: str | None = None,
        process: str | None = None,
    ) -> list[TraceEntry]:
        """Return the calls of one callback, in one hook, on one node or in one process."""
        wanted = {"callback": callback, "hook": hook, "node_id": node, "process": process}
        return [
            entry
            for entry in self.trace
            if all(value in (None, getattr(entry, name)) for name, value in wanted.items())
        ]

    def logged(self, callback: str) -> list[str]:
        """Return what a callback has logged, a text for each line, such as ``"INFO: done"``."""
        lines = (line.partition(f": {callback}: ") for line in self.log)
        return [f"{level}: {text}" for level, found, text in lines if found and level.isalpha()]

    @property
    def changes(self) -> list[str]:
        """What the callbacks changed, such as ``"A: extra_init_kwargs.x: <absent> -> 1"``."""
        return [f"{entry.callback}: {change}" for entry in self.trace for change in entry.changes]

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that the engine would get."""
        kwargs: dict[str, Any] = self.config.engine_kwargs
        return kwargs

    @property
    def model_path(self) -> str:
        """What the engine would load: a folder, a URI or an id."""
        # A real config checks elsewhere whether the cluster that this process is connected to can
        # hold a replica, and nothing is deployed here.
        unchecked = getattr(self.config, "unchecked_engine_config", self.config.get_engine_config)
        path: str = unchecked().actual_hf_model_id
        return path

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The runtime environment of the engine's workers."""
        return {} if self.ctx is None else self.ctx.runtime_env

    @property
    def placement_group_config(self) -> dict[str, Any]:
        """What Serve would reserve for a replica, as ``on_configure`` leaves it."""
        return self.config.placement_group_config or {}

    @property
    def custom_data(self) -> dict[str, Any]:
        """``ctx.custom_data`` of the replica."""
        return {} if self.ctx is None else self.ctx.custom_data

    @property
    def nodes(self) -> Mapping[str, NodeResult]:
        """By node, ``"node-1"`` being the replica's own, what its initialization left."""
        return {} if self.ctx is None else self.ctx.nodes

    def assert_succeeded(self) -> Outcome:
        """Fail the test with the whole story if anything has failed; return the outcome."""
        __tracebackhide__ = True
        if self.error is not None:
            self._fail("the start failed")
        return self

    def assert_failed(
        self, match: str = "", *, callback: str | None = None, hook: str | None = None
    ) -> HookError:
        """Fail the test with the whole story unless the start has failed so.

        Args:
            match: A regular expression that is searched in the error's text.
            callback: Whose failure it is.
            hook: In which hook.

        Returns:
            The error.
        """
        __tracebackhide__ = True
        error = self.error
        if error is None:
            self._fail("the start did not fail")
        if not isinstance(error, HookError):
            self._fail(f"the start ended with a {type(error).__name__}, which is no HookError")
        if callback not in (None, error.callback):
            self._fail(f"it is not callback {callback!r} that failed")
        if hook not in (None, error.hook):
            self._fail(f"it is not in {hook} that it failed")
        if not re.search(match, str(error)):
            self._fail(f"the error's text does not match {match!r}")
        return error

    def assert_order(self, expected: Sequence[str]) -> Outcome:
        """Fail the test with what differs, and the whole story, unless this is the `order`."""
        __tracebackhide__ = True
        if self.order != list(expected):
            lines = difflib.ndiff(list(expected), self.order)
            self._fail("\n".join(["the order is another one:", *lines]))
        return self

    def _fail(self, reason: str) -> NoReturn:
        __tracebackhide__ = True
        pytest.fail(f"{reason}\n\n{self!r}", pytrace=False)

    def __repr__(self) -> str:
        ended = "succeeded" if self.succeeded else "failed"
        plural = "" if len(self.trace) == 1 else "s"
        parts = [f"<Outcome: {ended} after {len(self.trace)} call{plural}>"]
        if self.trace:
            parts.append("\n".join(_line_of(entry) for entry in self.trace))
        parts.append("\n".join(f"{name}: {text}" for name, text in self._left()))
        if self.shared:
            kept = ", ".join(self.shared)
            parts.append(f"changed where each real process would have its own: {kept}")
        if self.error is not None:
            parts.append(formatted(self.error).rstrip())
            failures = getattr(self.error, "cleanup_errors", ())
            parts.extend(f"in the clean-up: {failure}" for failure in failures)
        return "\n\n".join(filter(None, parts))

    def _left(self) -> list[tuple[str, str]]:
        """Return what the callbacks have left, names of keys only: values may be secrets."""
        left = {
            "engine_kwargs": ", ".join(sorted(self.engine_kwargs)),
            "model_path": self.model_path,
            "custom_data": ", ".join(sorted(map(str, self.custom_data))),
            **{
                f"{result.node.id}": f"{result.model_path or 'nothing brought'}"
                + (f", brought by {result.handled.callback}" if result.handled else "")
                for result in self.nodes.values()
            },
        }
        return [(name, text) for name, text in left.items() if text]


def _where(entry: TraceEntry) -> str:
    if entry.role in ("replica", "driver"):
        return entry.role
    if entry.role == "node":
        return entry.node_id
    return f"{entry.process} on {entry.node_id}"


def _text_of(entry: TraceEntry) -> str:
    background = f"/{entry.background}" if entry.background else ""
    how = [] if entry.outcome == "returned" else [entry.outcome]
    how += [f"attempt {entry.attempt}"] if entry.attempt > 1 else []
    text = f"{_where(entry)}: {entry.hook}: {entry.callback}{background}"
    return f"{text} ({', '.join(how)})" if how else text


def _line_of(entry: TraceEntry) -> str:
    reason = f": {entry.reason}" if entry.reason else ""
    changes = (f"\n    {change}" for change in entry.changes)
    return "".join([_text_of(entry), reason, *changes])
