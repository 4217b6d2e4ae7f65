"""Who has taken over, whom that skips, and what the log says of it."""

from collections.abc import Generator
from typing import Any

import pytest
from plugins_for_tests import hook_log
from steps import cleans, step, wraps

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.testing import Fail, ModelConfig, RunStack

HOOK = "on_before_download"
SECRET = "s3cr3t-value"


def takes(name: str, **options: Any) -> dict[str, object]:
    return step(name, result=Handled("/", f"found with {SECRET}"), hook=HOOK, **options)


def test_who_took_over_why_and_whom_that_skips(
    run_stack: RunStack, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(runtime_env={"env_vars": {"API_KEY": SECRET}})
    stack = [step("a", hook=HOOK), takes("store"), step("b", hook=HOOK), step("c", hook=HOOK)]
    with hook_log(caplog):
        outcome = run_stack(stack, config).assert_succeeded()
    handled = outcome.nodes["node-1"].handled
    assert handled is not None
    assert (handled.callback, handled.skipped) == ("store", ("b", "c"))
    assert handled == Handled("/", f"found with {SECRET}")
    outcome.assert_order(
        [
            "replica: on_before_download: a",
            "replica: on_before_download: store (handled)",
            "replica: on_before_download: b (skipped)",
            "replica: on_before_download: c (skipped)",
        ]
    )
    (record,) = [record for record in caplog.records if "' took over in " in record.message]
    assert record.message == (
        "callback 'store' took over in on_before_download on node node-1 (10.0.0.1): found with "
        "***; skipped: the default download; on_before_download of 'b', 'c'"
    )
    fields = vars(record)
    assert (fields["callback"], fields["hook"], fields["node"]) == ("store", HOOK, "node-1")


def replaces(ctx: CallbackCtx) -> Generator[None, Any, Any]:
    yield
    return Handled("/", "mine")


def test_a_wrapper_that_replaces_a_result_has_taken_over(run_stack: RunStack) -> None:
    outcome = run_stack([wraps(replaces, HOOK), takes("store"), step("b", hook=HOOK)])
    outcome.assert_succeeded().assert_order(
        [
            "replica: on_before_download: W (handled)",
            "replica: on_before_download: store (handled)",
            "replica: on_before_download: b (skipped)",
        ]
    )
    handled = outcome.nodes["node-1"].handled
    assert handled is not None
    assert (handled.callback, handled.reason) == ("W", "mine")


def test_a_call_that_was_skipped_is_not_cleaned_up_after(run_stack: RunStack) -> None:
    stack = [step("store", result=Handled()), cleans("late"), Fail("on_engine_ready")]
    outcome = run_stack(stack)
    assert outcome.assert_failed(callback="Fail").cleanup_errors == []
    outcome.assert_order(
        [
            "replica: on_before_init: store (handled)",
            "replica: on_before_init: late (skipped)",
            "replica: on_engine_ready: Fail (failed)",
        ]
    )
