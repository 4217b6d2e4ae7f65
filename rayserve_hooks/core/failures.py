"""The one place that decides what becomes of a callback's failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core.hooks import ENGINE_PROCESS, PHASES, REVERSED
from rayserve_hooks.core.log import call_fields, logger
from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError, HooksError, Phase, describe, raise_from
from rayserve_hooks.trace import TraceEntry

_FIX = "fix the callback"
_OR_WARN = ", or set 'on_error: warn' on it to go on without it"
_RAISE_ANOTHER = "return, or raise an Exception"
_WHICH_COUNTS = ", for which on_error counts"


class OwnFailures:
    """A plugin that settles its failures itself, by other rules than ``on_error`` alone.

    ``blame_of`` returns what they are charged to in a hook; it is set where the plugin is
    registered.
    """

    blame_of: Callable[[str], Blame]


@dataclass(frozen=True)
class Blame:
    """Whose failure it is: a callback's in a hook, of which ``what``, if not the call itself.

    One that ``warns`` is only logged; ``configured`` is whether a config can say so. Secrets among
    the constructor's ``kwargs``, and those that the ``plugin`` keeps on itself, stay out of it.
    """

    callback: str
    hook: str
    warns: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plugin: object = field(default=None, repr=False, compare=False)
    configured: bool = True
    what: str = ""

    @property
    def secrets_among(self) -> tuple[object, ...]:
        """Where a callback's secrets are."""
        return self.kwargs, self.plugin

    def goes_on_after(self, error: BaseException) -> bool:
        """Return whether the next callback runs: ``on_error: warn`` counts for an `Exception`.

        Not for one that has been settled for this callback before.
        """
        settled = isinstance(error, HookError) and error.callback == self.callback
        return self.warns and isinstance(error, Exception) and not settled

    def outcome_of(self, error: BaseException) -> str:
        """Return what a trace says of a call that raised ``error``."""
        return "warned" if self.goes_on_after(error) else "failed"


def settle(
    error: BaseException, ctx: CallbackCtx, blame: Blame, entry: TraceEntry | None
) -> HookError | None:
    """Raise what a callback raised in a call as a `HookError`, or log it where the config says so.

    A failed clean-up or shutdown is logged and returned: a list of these is what that hook call
    returns.
    """
    cleaning_up = blame.hook in REVERSED
    goes_on = blame.goes_on_after(error)
    if isinstance(error, HookError) and not (goes_on or cleaning_up or blame.what):
        raise error  # of a hook called by this callback; it names who failed already
    failure = hook_error(error, ctx, blame)
    if not (cleaning_up or goes_on):
        raise_from(failure, failure.__cause__)
    extra = call_fields(entry) if entry else None
    if not goes_on:
        logger.error("%s", failure, exc_info=failure.__cause__, extra=extra)
        return failure
    text = "%s (on_error: warn, going on)"
    logger.warning(text, failure, exc_info=failure.__cause__, extra=extra)
    return None


def hook_error(error: BaseException, ctx: CallbackCtx, blame: Blame) -> HookError:
    """Return the `HookError` of what a callback raised, which is its cause."""
    values = *blame.secrets_among, *recorder_of(ctx).secrets_among, error
    failure = HookError(
        callback=blame.callback,
        hook=blame.hook,
        node=str(ctx.node),
        phase=PHASES[blame.hook],
        process=str(ctx.process) if blame.hook == ENGINE_PROCESS else "",
        detail=blame.what + redact(describe(error), *values),
        advice=_advice(error, blame),
    )
    failure.__cause__ = masked(error, *values)
    return failure


def _advice(error: BaseException, blame: Blame) -> str:
    # Ours say themselves what to do, such as a download's, which leaving the callback out is not.
    if isinstance(error, HooksError):
        return ""
    # A failed clean-up is logged, whatever on_error says; one that warns is, too.
    counts = blame.configured and blame.hook not in REVERSED
    may_warn = counts and not blame.warns
    if isinstance(error, Exception):
        return _FIX + (_OR_WARN if may_warn else "")
    return _RAISE_ANOTHER + (
        _WHICH_COUNTS if blame.configured and blame.hook not in REVERSED else ""
    )


def step_error(
    ctx: CallbackCtx,
    phase: Phase,
    detail: str,
    path: str | None = None,
    cause: BaseException | None = None,
) -> HookError:
    """Return the `HookError` of a step that is no hook; it names the callback that set ``path``."""
    setter = ctx.trace.who_changed(path) if path else None
    where = f"ctx.{path}: " if path else ""
    known = recorder_of(ctx).secrets_among
    return entry_error(setter, ctx.node, phase, f"{where}{detail}", cause=cause, known=known)


def entry_error(
    entry: TraceEntry | None,
    node: NodeInfo,
    phase: Phase,
    detail: str,
    *,
    cause: BaseException | None = None,
    known: object = None,
) -> HookError:
    """Return the `HookError` of a step that is no hook; it names the call behind it, if any.

    Secrets, among them those in ``known``, stay out of its detail and its ``cause``.
    """
    callback, hook = (entry.callback, entry.hook) if entry else (None, None)
    detail = redact(detail, known, cause)
    failure = HookError(callback=callback, hook=hook, node=str(node), phase=phase, detail=detail)
    if cause is not None:
        failure.__cause__ = masked(cause, known, cause)
    return failure
