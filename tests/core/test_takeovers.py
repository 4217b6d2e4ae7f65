"""Who has taken over, whom that skips, and what the log says of it."""

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import call, cleans, outcomes, step, wraps

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.running import clean_up
from rayserve_hooks.core.takeovers import log_take_over, named

HOOK = "on_before_download"
SECRET = "s3cr3t-value"


def takes(name: str, **options: Any) -> dict[str, object]:
    return step(name, result=Handled("/m", f"found with {SECRET}"), hook=HOOK, **options)


def test_who_took_over_why_and_whom_that_skips(caplog: pytest.LogCaptureFixture) -> None:
    ctx = make_ctx(custom_data={"api_key": SECRET})
    stack = [step("a", hook=HOOK), takes("store"), step("b", hook=HOOK), step("c", hook=HOOK)]
    handled = named(call(*stack, ctx=ctx, hook=HOOK), HOOK, ctx)
    assert (handled.callback, handled.skipped) == ("store", ("b", "c"))
    assert handled == Handled("/m", f"found with {SECRET}")
    assert outcomes(ctx)[1:] == [("store", "handled"), ("b", "skipped"), ("c", "skipped")]
    with hook_log(caplog):
        log_take_over(ctx.trace, HOOK, ctx.node)
    (record,) = caplog.records
    assert record.message == (
        "callback 'store' took over in on_before_download on node n1 (10.0.0.1): found with ***; "
        "skipped: the default download; on_before_download of 'b', 'c'"
    )
    fields = vars(record)
    assert (fields["callback"], fields["hook"], fields["node"]) == ("store", HOOK, "n1")


def replaces(ctx: CallbackCtx) -> Generator[None, Any, Any]:
    yield
    return Handled("/replaced", "mine")


def test_a_wrapper_that_replaces_a_result_has_taken_over() -> None:
    ctx = make_ctx()
    handled = call(wraps(replaces, HOOK), takes("store"), step("b", hook=HOOK), ctx=ctx, hook=HOOK)
    assert outcomes(ctx) == [("W", "handled"), ("store", "handled"), ("b", "skipped")]
    assert named(handled, HOOK, ctx).callback == "W"


def test_a_call_that_was_skipped_is_not_cleaned_up_after() -> None:
    late = cleans("late")
    manager, ctx = make_manager(step("store", result=Handled()), late), make_ctx()
    manager.hook.on_before_init(ctx=ctx)
    assert outcomes(ctx) == [("store", "handled"), ("late", "skipped")]
    assert asyncio.run(clean_up(manager, ctx, ValueError())) == []
    assert ctx.custom_data["log"] == ["store"]
