"""``on_init_failed``: who cleans up, and what becomes of a failure in it."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from plugins_for_tests import hook_log
from steps import (
    EXITS,
    Wrapping,
    cleans,
    fails_after,
    fails_before,
    never_yields,
    passes_on,
    returns_true,
    step,
    wraps,
    yields_twice,
)

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.errors import HookError
from rayserve_hooks.testing import Fail, Outcome, RunStack


def clean_up(run_stack: RunStack, *stack: object) -> Outcome:
    """Run a start that fails when all of the stack have started."""
    return run_stack([*stack, Fail("on_engine_ready")])


def failures(outcome: Outcome) -> list[HookError]:
    return outcome.assert_failed(callback="Fail").cleanup_errors


def cleaned(outcome: Outcome) -> list[tuple[str, str]]:
    return [(call.callback, call.outcome) for call in outcome.calls(hook=CLEAN_UP)]


def test_clean_up_leaves_out_who_had_not_started(run_stack: RunStack) -> None:
    outcome = run_stack([cleans("a"), Fail("on_before_init"), cleans("b")])
    assert failures(outcome) == []
    assert cleaned(outcome) == [("a", "returned")]


def test_a_callback_without_another_hook_counts_as_started(run_stack: RunStack) -> None:
    outcome = run_stack([Fail("on_before_init"), cleans("a", started=False), cleans("b")])
    assert cleaned(outcome) == [("a", "returned")]


def test_clean_up_of_equal_instances_leaves_out_the_right_one(run_stack: RunStack) -> None:
    @dataclass
    class Equal:
        size: int = 1

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

        def on_init_failed(self, ctx: CallbackCtx) -> None:
            pass

    a, b = ({"callback": Equal, "name": name} for name in "ab")
    assert cleaned(run_stack([a, Fail("on_before_init"), b])) == [("a", "returned")]


def test_clean_up_without_callbacks_is_nothing(run_stack: RunStack) -> None:
    outcome = clean_up(run_stack)
    assert failures(outcome) == []
    outcome.assert_order(["replica: on_engine_ready: Fail (failed)"])


def test_the_error_is_handed_to_who_wants_it(run_stack: RunStack) -> None:
    def sees(ctx: CallbackCtx, error: BaseException | None) -> None:
        ctx.custom_data.setdefault("seen", []).append(error)

    class Wants:
        def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
            sees(ctx, error)

    class WantsInAnotherOrder:
        async def on_init_failed(self, error: BaseException, ctx: CallbackCtx) -> None:
            sees(ctx, error)

    class WantsNot:
        def on_init_failed(self, ctx: CallbackCtx) -> None:
            sees(ctx, None)

    outcome = clean_up(run_stack, Wants, WantsInAnotherOrder, WantsNot)
    assert failures(outcome) == []
    assert outcome.custom_data["seen"] == [None, outcome.error, outcome.error]


def test_every_failure_of_a_clean_up_is_collected_and_the_next_one_runs(
    run_stack: RunStack,
) -> None:
    stack = [cleans("a", error=OSError("locked")), cleans("b"), cleans("c", error=KeyError("x"))]
    outcome = clean_up(run_stack, *stack)
    assert [(failure.callback, failure.detail) for failure in failures(outcome)] == [
        ("c", "KeyError: 'x'"),
        ("a", "OSError: locked"),
    ]
    assert cleaned(outcome) == [("c", "failed"), ("b", "returned"), ("a", "failed")]
    assert [type(failure.__cause__) for failure in failures(outcome)] == [KeyError, OSError]


def test_a_failure_of_a_clean_up_says_so_and_is_logged_with_traceback(
    run_stack: RunStack, caplog: pytest.LogCaptureFixture
) -> None:
    with hook_log(caplog):
        (failure,) = failures(clean_up(run_stack, cleans("a", error=OSError("locked"))))
    assert str(failure).startswith(
        "callback 'a' failed in hook on_init_failed on node node-1 (10.0.0.1) (phase: clean-up): "
        "OSError: locked; "
    )
    (record,) = [record for record in caplog.records if record.getMessage() == str(failure)]
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert record.exc_info[1] is failure.__cause__
    assert type(failure.__cause__) is OSError


def test_on_error_warn_forgives_a_clean_up(run_stack: RunStack) -> None:
    outcome = clean_up(run_stack, cleans("a", error=OSError("locked"), on_error="warn"))
    assert failures(outcome) == []
    (line,) = (line for line in outcome.log if line.startswith("WARNING: callback 'a' failed"))
    assert line.endswith("(on_error: warn, going on)")


@pytest.mark.parametrize("result", [True, Handled()])
def test_a_clean_up_has_no_result(run_stack: RunStack, result: object) -> None:
    (failure,) = failures(clean_up(run_stack, step("a", result=result, hook=CLEAN_UP)))
    assert failure.detail.endswith("; on_init_failed has no result, return None")


def raises_again(self: object, ctx: CallbackCtx, error: BaseException) -> None:
    raise error


def test_an_error_raised_again_does_not_become_its_own_cause(run_stack: RunStack) -> None:
    again = {"callback": type("Again", (), {CLEAN_UP: raises_again}), "name": "again"}
    outcome = run_stack([again, Fail("on_engine_ready", OSError("disk full"))])
    (failure,) = pickle.loads(pickle.dumps(outcome.assert_failed("disk full"))).cleanup_errors
    assert failure.callback == "again"
    assert "disk full" in failure.detail
    assert failure.__cause__ is None


def wraps_clean_up(run: Callable[[CallbackCtx], Wrapping]) -> dict[str, object]:
    return wraps(run, CLEAN_UP)


def returns_nothing(ctx: CallbackCtx) -> Wrapping:
    yield
    return None


@pytest.mark.parametrize("run", [passes_on, returns_nothing, returns_true])
def test_what_failed_in_a_clean_up_passes_any_wrapper(
    run_stack: RunStack, run: Callable[[CallbackCtx], Wrapping]
) -> None:
    stack = [wraps_clean_up(run), cleans("a", error=OSError("locked")), cleans("b")]
    assert [failure.callback for failure in failures(clean_up(run_stack, *stack))] == ["a"]


@pytest.mark.parametrize("run", [fails_before, fails_after, yields_twice, never_yields])
def test_a_wrapper_that_fails_in_a_clean_up_is_collected_too(
    run_stack: RunStack, run: Callable[[CallbackCtx], Wrapping]
) -> None:
    stack = [wraps_clean_up(run), cleans("a", error=OSError("locked")), cleans("b")]
    outcome = clean_up(run_stack, *stack)
    assert [failure.callback for failure in failures(outcome)] == ["a", "W"]
    assert outcome.custom_data["log"] == ["b", "a"]


@pytest.mark.parametrize("error", EXITS)
def test_an_exit_in_a_clean_up_is_collected_and_the_next_runs(
    run_stack: RunStack, error: type[BaseException]
) -> None:
    outcome = clean_up(run_stack, cleans("a"), cleans("b", error=error("out")))
    (failure,) = failures(outcome)
    assert failure.callback == "b"
    assert failure.detail.endswith(f"{error.__name__}: out")
    assert cleaned(outcome) == [("b", "failed"), ("a", "returned")]
