"""The one place that decides what becomes of a callback's failure."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core.hooks import CLEAN_UP, PHASES
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError, Phase, RemoteCause, describe
from rayserve_hooks.trace import TraceEntry


def settle(
    error: Exception,
    ctx: CallbackCtx,
    callback: str,
    hook: str,
    *,
    kwargs: Mapping[str, Any],
    warns: bool,
    what: str = "",
) -> HookError | None:
    """Raise what a callback raised as a `HookError`, or log it where the config says so.

    Args:
        error: What was raised; it becomes the cause.
        ctx: The context; its secrets are kept out of the text and the cause.
        callback: The callback's name.
        hook: The hook's name.
        kwargs: The callback's constructor arguments; their secrets are kept out, too.
        warns: Whether the callback has ``on_error: warn``.
        what: What of the callback, when it is not the hook's own call.

    Returns:
        None, so that the next callback runs; or, of a clean-up, the error: it is logged, and a
        list of such results is what the hook call returns.

    Raises:
        HookError: The failure ends the initialization.
    """
    cleaning_up = hook == CLEAN_UP
    if isinstance(error, HookError) and not (warns or cleaning_up or what):
        raise error  # of a hook called by this callback; it names who failed already
    failure = hook_error(error, ctx, callback, hook, what=what, kwargs=kwargs)
    if warns:
        logger.warning("%s (on_error: warn, going on)", failure, exc_info=failure.__cause__)
        return None
    if cleaning_up:
        logger.error("%s", failure, exc_info=failure.__cause__)
        return failure
    raise failure from failure.__cause__


def hook_error(
    error: BaseException,
    ctx: CallbackCtx,
    callback: str,
    hook: str,
    *,
    what: str = "",
    kwargs: Mapping[str, Any] | None = None,
) -> HookError:
    """Return the `HookError` of what a callback raised, which is its cause; see `settle`."""
    values = {"ctx": recorder_of(ctx).values, "kwargs": kwargs or {}}
    failure = HookError(
        callback=callback,
        hook=hook,
        node=str(ctx.node),
        phase=PHASES[hook],
        detail=what + redact(describe(error), values),
        advice="fix the callback, or set 'on_error: warn' on it to go on without it",
    )
    failure.__cause__ = _without_secrets(error, values)
    return failure


def step_error(ctx: CallbackCtx, phase: Phase, detail: str, path: str | None = None) -> HookError:
    """Return the `HookError` of a step that is no hook.

    Args:
        ctx: The context; its secrets are kept out of the text.
        phase: The step.
        detail: What went wrong.
        path: The field that holds the wrong value, or a key in it; the callback that set it is
            named.
    """
    setter = ctx.trace.who_changed(path) if path else None
    where = f"ctx.{path}: " if path else ""
    return blame(setter, ctx.node, phase, redact(f"{where}{detail}", recorder_of(ctx).values))


def blame(call: TraceEntry | None, node: NodeInfo, phase: Phase, detail: str) -> HookError:
    """Return the error of a step; it names the callback of the call that is to blame, if any."""
    return HookError(
        callback=call.callback if call else None,
        hook=call.hook if call else None,
        node=str(node),
        phase=phase,
        detail=detail,
    )


def _without_secrets(error: BaseException, values: Mapping[str, Any]) -> BaseException:
    """Return the error, or a stand-in if its text, or that of one it came from, has a secret."""
    texts = "".join(traceback.format_exception(error, limit=0))
    if redact(texts, values) == texts:
        return error
    formatted = redact("".join(traceback.format_exception(error)), values)
    stand_in = RemoteCause(redact(describe(error), values))
    stand_in.add_note(f"traceback, without secrets:\n{formatted}")
    return stand_in
