"""``on_init_failed``: who cleans up, and what becomes of a failure in it."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import (
    EXITS,
    FIRST_FAILURE,
    Wrapping,
    clean_up,
    cleans,
    fails_after,
    fails_before,
    never_yields,
    outcomes,
    passes_on,
    returns_true,
    step,
    wraps,
    yields_twice,
)

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.errors import HookError, Phase


def test_clean_up_leaves_out_who_had_not_started() -> None:
    ctx = make_ctx()
    clean_up(cleans("a"), cleans("b"), ctx=ctx, started="b")
    assert ctx.custom_data["log"] == ["b"]


def test_a_callback_without_another_hook_counts_as_started() -> None:
    ctx = make_ctx()
    clean_up(cleans("a", started=False), cleans("b"), ctx=ctx, started="")
    assert ctx.custom_data["log"] == ["a"]


def test_clean_up_of_equal_instances_leaves_out_the_right_one() -> None:
    @dataclass
    class Equal:
        size: int = 1

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

        def on_init_failed(self, ctx: CallbackCtx) -> None:
            pass

    ctx = make_ctx()
    stack = [{"callback": Equal, "name": "a"}, {"callback": Equal, "name": "b"}]
    clean_up(*stack, ctx=ctx, started="a")
    assert outcomes(ctx) == [("a", "returned")]


def test_clean_up_without_callbacks_is_nothing() -> None:
    assert clean_up() == []


def test_the_error_is_handed_to_who_wants_it() -> None:
    seen: list[BaseException | None] = []

    class Wants:
        def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
            seen.append(error)

    class WantsInAnotherOrder:
        async def on_init_failed(self, error: BaseException, ctx: CallbackCtx) -> None:
            seen.append(error)

    class WantsNot:
        def on_init_failed(self, ctx: CallbackCtx) -> None:
            seen.append(None)

    clean_up(Wants, WantsInAnotherOrder, WantsNot)
    assert seen == [None, FIRST_FAILURE, FIRST_FAILURE]


def test_every_failure_of_a_clean_up_is_collected_and_the_next_one_runs() -> None:
    ctx = make_ctx()
    stack = [cleans("a", error=OSError("locked")), cleans("b"), cleans("c", error=KeyError("x"))]
    failures = clean_up(*stack, ctx=ctx)
    assert [(failure.callback, failure.detail) for failure in failures] == [
        ("c", "KeyError: 'x'"),
        ("a", "OSError: locked"),
    ]
    assert outcomes(ctx) == [("c", "failed"), ("b", "returned"), ("a", "failed")]
    assert [type(failure.__cause__) for failure in failures] == [KeyError, OSError]


def test_a_failure_of_a_clean_up_says_so() -> None:
    (failure,) = clean_up(cleans("a", error=OSError("locked")))
    assert str(failure).startswith(
        "callback 'a' failed in hook on_init_failed on node n1 (10.0.0.1) (phase: clean-up): "
        "OSError: locked; "
    )


def test_a_failure_of_a_clean_up_is_logged_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    cause = OSError("locked")
    with hook_log(caplog):
        (failure,) = clean_up(cleans("a", error=cause))
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("ERROR", str(failure))
    assert record.exc_info is not None
    assert record.exc_info[1] is cause


def test_on_error_warn_forgives_a_clean_up(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        assert clean_up(cleans("a", error=OSError("locked"), on_error="warn")) == []
    assert caplog.messages[0].endswith("(on_error: warn, going on)")


@pytest.mark.parametrize("result", [True, Handled()])
def test_a_clean_up_has_no_result(result: object) -> None:
    (failure,) = clean_up(step("a", result=result, hook=CLEAN_UP))
    assert failure.detail.endswith("; on_init_failed has no result, return None")


def raises_again(self: object, ctx: CallbackCtx, error: BaseException) -> None:
    raise error


def test_an_error_raised_again_does_not_become_its_own_cause() -> None:
    error = HookError(callback="a", hook="h", node="n1", phase=Phase.DOWNLOAD, detail="disk full")
    again = {"callback": type("Again", (), {CLEAN_UP: raises_again}), "name": "again"}
    error.cleanup_errors.extend(make_manager(again).clean_up(make_ctx(), error, ()))
    (failure,) = pickle.loads(pickle.dumps(error)).cleanup_errors
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
    run: Callable[[CallbackCtx], Wrapping],
) -> None:
    stack = [wraps_clean_up(run), cleans("a", error=OSError("locked")), cleans("b")]
    assert [failure.callback for failure in clean_up(*stack)] == ["a"]


@pytest.mark.parametrize("run", [fails_before, fails_after, yields_twice, never_yields])
def test_a_wrapper_that_fails_in_a_clean_up_is_collected_too(
    run: Callable[[CallbackCtx], Wrapping],
) -> None:
    ctx = make_ctx()
    stack = [wraps_clean_up(run), cleans("a", error=OSError("locked")), cleans("b")]
    assert [failure.callback for failure in clean_up(*stack, ctx=ctx)] == ["a", "W"]
    assert ctx.custom_data["log"] == ["b", "a"]


@pytest.mark.parametrize("error", EXITS)
def test_an_exit_in_a_clean_up_is_collected_and_the_next_runs(error: type[BaseException]) -> None:
    ctx = make_ctx()
    (failure,) = clean_up(cleans("a"), cleans("b", error=error("out")), ctx=ctx)
    assert failure.callback == "b"
    assert failure.detail.endswith(f"{error.__name__}: out")
    assert outcomes(ctx) == [("b", "failed"), ("a", "returned")]
