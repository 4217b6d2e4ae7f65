"""The one place that decides what becomes of a callback's failure."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core.hooks import CLEAN_UP, PHASES
from rayserve_hooks.core.log import call_fields, logger
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import (
    DownloadError,
    HookError,
    Phase,
    RemoteCause,
    describe,
    formatted,
    shortened,
)
from rayserve_hooks.trace import TraceEntry

_FIX = "fix the callback, or set 'on_error: warn' on it to go on without it"
_RAISE_ANOTHER = "return, or raise an Exception, for which on_error counts"


@dataclass(frozen=True)
class Blame:
    """Whose failure it is: a callback's in a hook, of which ``what``, if not the call itself.

    One that ``warns`` is only logged. Secrets among the constructor's ``kwargs`` stay out of it.
    """

    callback: str
    hook: str
    warns: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""

    def goes_on_after(self, error: BaseException) -> bool:
        """Return whether the next callback runs: ``on_error: warn`` counts for an `Exception`."""
        return self.warns and isinstance(error, Exception)

    def outcome_of(self, error: BaseException) -> str:
        """Return what a trace says of a call that raised ``error``."""
        return "warned" if self.goes_on_after(error) else "failed"


def settle(
    error: BaseException, ctx: CallbackCtx, blame: Blame, entry: TraceEntry
) -> HookError | None:
    """Raise what a callback raised in a call as a `HookError`, or log it where the config says so.

    A failed clean-up is logged and returned: a list of these is what that hook call returns.
    """
    cleaning_up = blame.hook == CLEAN_UP
    if isinstance(error, HookError) and not (blame.warns or cleaning_up or blame.what):
        raise error  # of a hook called by this callback; it names who failed already
    failure = hook_error(error, ctx, blame)
    if blame.goes_on_after(error):
        text, cause = "%s (on_error: warn, going on)", failure.__cause__
        logger.warning(text, failure, exc_info=cause, extra=call_fields(entry))
        return None
    if cleaning_up:
        logger.error("%s", failure, exc_info=failure.__cause__, extra=call_fields(entry))
        return failure
    raise failure from failure.__cause__


def hook_error(error: BaseException, ctx: CallbackCtx, blame: Blame) -> HookError:
    """Return the `HookError` of what a callback raised, which is its cause."""
    values = {"ctx": recorder_of(ctx).values, "kwargs": blame.kwargs}
    failure = HookError(
        callback=blame.callback,
        hook=blame.hook,
        node=str(ctx.node),
        phase=PHASES[blame.hook],
        detail=blame.what + redact(describe(error), values),
        advice=_advice(error),
    )
    failure.__cause__ = _presentable(error, values)
    return failure


def _advice(error: BaseException) -> str:
    # A download's error says itself what to do, and leaving the callback out is not it.
    if isinstance(error, DownloadError):
        return ""
    return _FIX if isinstance(error, Exception) else _RAISE_ANOTHER


def step_error(ctx: CallbackCtx, phase: Phase, detail: str, path: str | None = None) -> HookError:
    """Return the `HookError` of a step that is no hook; it names the callback that set ``path``."""
    setter = ctx.trace.who_changed(path) if path else None
    where = f"ctx.{path}: " if path else ""
    return entry_error(setter, ctx.node, phase, redact(f"{where}{detail}", recorder_of(ctx).values))


def entry_error(entry: TraceEntry | None, node: NodeInfo, phase: Phase, detail: str) -> HookError:
    """Return the `HookError` of a step that is no hook; it names the call behind it, if any."""
    callback, hook = (entry.callback, entry.hook) if entry else (None, None)
    return HookError(callback=callback, hook=hook, node=str(node), phase=phase, detail=detail)


def _presentable(error: BaseException, values: Mapping[str, Any]) -> BaseException:
    """Return the error, or a stand-in if its text, or that of one it came from, is not to be shown.

    That is a text with a secret, or one that is too long for a log.
    """
    texts = "".join(traceback.format_exception(error, limit=0))
    if shortened(texts) == texts and redact(texts, values) == texts:
        return error
    stand_in = RemoteCause(redact(describe(error), values))
    stand_in.add_note(f"traceback, without secrets:\n{redact(formatted(error), values)}")
    return stand_in
