"""Who has taken over with a `Handled`, and whom that skips."""

from __future__ import annotations

from collections.abc import Sequence

from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo
from rayserve_hooks.core.log import call_fields, logger
from rayserve_hooks.trace import TraceEntry


def taken_over_by(trace: Sequence[TraceEntry], hook: str, node_id: str) -> TraceEntry | None:
    """Return the call whose `Handled` is a hook's result on a node.

    None if no callback's is. A wrapper may return another one than what it surrounds, and has begun
    earlier; a node's process that was killed may have had one, too.
    """
    calls = [call for call in trace if (call.hook, call.node_id) == (hook, node_id)]
    attempt = max((call.attempt for call in calls), default=1)
    handled = (call for call in calls if (call.outcome, call.attempt) == ("handled", attempt))
    return next(handled, None)


def named(handled: Handled, hook: str, ctx: CallbackCtx) -> Handled:
    """Return a hook's result with the name of its callback, and of those that it skips."""
    call = taken_over_by(ctx.trace, hook, ctx.node.id)
    if call is None:
        return handled
    skipped = dict.fromkeys(other.callback for other in ctx.trace if other.outcome == "skipped")
    return handled.returned_by(call.callback, list(skipped))


def log_take_over(trace: Sequence[TraceEntry], hook: str, node: NodeInfo) -> None:
    """Log who has taken over on a node, why, and whom that skips."""
    call = taken_over_by(trace, hook, node.id)
    if call is None:
        return
    logger.info(
        "callback %r took over in %s on node %s: %s; skipped: %s",
        call.callback,
        hook,
        node,
        call.reason or "no reason given",
        "; ".join(["the default download", *skips([c for c in trace if c.node_id == node.id])]),
        extra=call_fields(call),
    )


def skips(trace: Sequence[TraceEntry]) -> list[str]:
    """Return which callbacks were skipped, one text for each hook."""
    by_hook: dict[str, dict[str, None]] = {}
    for call in trace:
        if call.outcome == "skipped":
            by_hook.setdefault(call.hook, {})[repr(call.callback)] = None
    return [f"{hook} of {', '.join(callbacks)}" for hook, callbacks in by_hook.items()]
