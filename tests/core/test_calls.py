"""One call: its result, the first result, wrappers, exits."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from plugins_for_tests import make_ctx, make_manager
from steps import (
    EXITS,
    ON_EXIT,
    Wrapping,
    call,
    fails_after,
    fails_before,
    never_yields,
    outcomes,
    passes_on,
    returns_true,
    step,
    wrapper,
    wraps,
    yields_twice,
)

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.errors import HookError


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download"])
@pytest.mark.parametrize("position", range(3))
def test_the_first_result_wins_at_each_position(hook: str, position: int) -> None:
    ctx = make_ctx()
    handled = Handled("/m", f"position {position}")
    stack = [
        step(name, result=handled if i == position else None, hook=hook)
        for i, name in enumerate("abc")
    ]
    assert call(*stack, ctx=ctx, hook=hook) is handled
    assert ctx.custom_data["log"] == ["a", "b", "c"][: position + 1]


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download"])
def test_no_result_is_none(hook: str) -> None:
    assert call(step("a", hook=hook), hook=hook) is None
    assert call(hook=hook) is None


def test_all_run_in_on_after_init() -> None:
    assert call(*(step(name, hook="on_after_init") for name in "abc"), hook="on_after_init") == []


@pytest.mark.parametrize("path", ["/models/a", Path("/models/a")])
def test_a_plain_path_is_a_result_of_the_node_hook(path: object) -> None:
    result = call(step("a", result=path, hook="on_before_download"), hook="on_before_download")
    assert result == Handled("/models/a")


def test_an_empty_path_is_an_error_of_the_callback() -> None:
    text = "callback 'a' failed in hook on_before_download"
    with pytest.raises(HookError, match=f"{text}.*names no folder"):
        call(step("a", result="", hook="on_before_download"), hook="on_before_download")


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download"])
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [(True, "True"), (False, "False"), (3, "a int"), ({"a": "s3cret"}, "a dict")],
)
def test_any_other_result_is_an_error(hook: str, wrong: object, shown: str) -> None:
    text = (
        f"TypeError: returned {shown}; return Handled(...) to say 'done, skip the rest', or None "
        "to go on with the next callback; "
    )
    with pytest.raises(HookError, match=re.escape(text)):
        call(step("a", result=wrong, hook=hook), hook=hook)


def test_a_plain_path_is_an_error_before_init() -> None:
    with pytest.raises(HookError, match=re.escape("returned a str; return Handled(...)")):
        call(step("a", result="/models/a"))


@pytest.mark.parametrize(
    ("wrong", "shown"), [(True, "True"), (Handled(), "a Handled"), ("/m", "a str")]
)
def test_on_after_init_has_no_result(wrong: object, shown: str) -> None:
    text = f"TypeError: returned {shown}; on_after_init has no result, return None; "
    with pytest.raises(HookError, match=re.escape(text)):
        call(step("a", result=wrong, hook="on_after_init"), hook="on_after_init")


def test_the_reason_of_a_handled_is_in_the_trace_without_its_secrets() -> None:
    ctx = make_ctx(custom_data={"api_key": "s3cr3t-value"})
    call(step("a", result=Handled(reason="found with s3cr3t-value")), ctx=ctx)
    assert (ctx.trace[0].outcome, ctx.trace[0].reason) == ("handled", "found with ***")
    assert "handled: found with ***" in ctx.trace.table()


def test_one_instance_serves_all_hooks() -> None:
    class Keeps:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            self.kept = "here"

        def on_after_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["kept"] = self.kept

    manager, ctx = make_manager(Keeps), make_ctx()
    manager.hook.on_before_init(ctx=ctx)
    manager.hook.on_after_init(ctx=ctx)
    assert ctx.custom_data["kept"] == "here"


def test_the_hook_needs_its_argument_by_name() -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        make_manager(step("a")).hook.on_before_init(make_ctx())  # type: ignore[call-arg]


@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_exit_of_a_callback_is_its_failure_whatever_on_error_says(
    error: type[BaseException], on_error: str
) -> None:
    ctx = make_ctx()
    with pytest.raises(HookError, match=rf"callback 'a' failed .*{error.__name__}: out") as caught:
        call(step("a", error=error("out"), on_error=on_error), step("b"), ctx=ctx)
    assert type(caught.value.__cause__) is error
    assert str(caught.value).endswith(ON_EXIT)
    assert outcomes(ctx) == [("a", "failed")]
    assert ctx.trace[0].duration_s is not None


@pytest.mark.parametrize("error", EXITS)
def test_wrappers_see_the_exit_of_a_callback_as_its_failure(error: type[BaseException]) -> None:
    ctx = make_ctx()
    with pytest.raises(HookError, match="callback 'a' failed"):
        call(wrapper("w"), step("a", error=error()), ctx=ctx)
    assert outcomes(ctx) == [("w", "returned"), ("a", "failed")]
    assert ctx.custom_data["log"] == ["w", "a", "/w"]


@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("late", [False, True])
def test_an_exit_of_a_wrapper_is_its_failure(error: type[BaseException], late: bool) -> None:
    def exits(ctx: CallbackCtx) -> Wrapping:
        if late:
            yield
        raise error
        yield

    ctx = make_ctx()
    with pytest.raises(HookError, match="callback 'W' failed in hook on_before_init"):
        call(wraps(exits, on_error="warn"), step("a"), ctx=ctx)
    assert outcomes(ctx)[0] == ("W", "failed")


def replaces(ctx: CallbackCtx) -> Wrapping:
    inner = yield
    return Handled("/replaced", f"instead of {inner.model_path}")


def returns_path(ctx: CallbackCtx) -> Wrapping:
    yield
    return "/short"


def swallows(ctx: CallbackCtx) -> Wrapping:
    try:
        return (yield)
    except HookError as error:
        return Handled(reason=f"{error.callback} failed")


def fails_on_failure(ctx: CallbackCtx) -> Wrapping:
    try:
        return (yield)
    except HookError:
        raise ValueError("cleanup") from None


def test_a_wrapper_replaces_a_result() -> None:
    result = call(wraps(replaces), step("a", result=Handled("/m")))
    assert result == Handled("/replaced", "instead of /m")


def test_a_wrapper_may_return_a_plain_path_for_a_node() -> None:
    hook = "on_before_download"
    assert call(wraps(returns_path, hook), step("a", hook=hook), hook=hook) == Handled("/short")


def test_a_wrong_result_of_a_wrapper_is_its_error() -> None:
    with pytest.raises(HookError, match=re.escape("callback 'W' failed in hook on_before_init")):
        call(wraps(returns_true), step("a"))


def test_a_wrapper_swallows_an_inner_failure() -> None:
    ctx = make_ctx()
    result = call(wraps(swallows), step("a", error=ValueError("boom")), ctx=ctx)
    assert result == Handled(reason="a failed")
    assert outcomes(ctx) == [("W", "handled"), ("a", "failed")]


def test_an_inner_failure_that_a_wrapper_lets_pass_is_not_its_own() -> None:
    ctx = make_ctx()
    with pytest.raises(HookError) as caught:
        call(wraps(passes_on), step("a", error=ValueError("boom")), ctx=ctx)
    assert caught.value.callback == "a"
    assert type(caught.value.__cause__) is ValueError
    assert outcomes(ctx) == [("W", "returned"), ("a", "failed")]


@pytest.mark.parametrize("run", [fails_before, fails_after])
def test_a_wrapper_that_fails_is_named(run: Callable[[CallbackCtx], Wrapping]) -> None:
    ctx = make_ctx()
    detail = run.__name__.removeprefix("fails_")
    with pytest.raises(HookError, match=rf"callback 'W' failed .*: ValueError: {detail};"):
        call(wraps(run), step("a"), ctx=ctx)
    assert outcomes(ctx)[0] == ("W", "failed")


def test_a_wrapper_that_fails_on_an_inner_failure_is_named() -> None:
    with pytest.raises(HookError, match=r"callback 'W' failed .*: ValueError: cleanup;"):
        call(wraps(fails_on_failure), step("a", error=ValueError("boom")))


def test_a_wrapper_that_fails_first_is_skipped_on_warn() -> None:
    ctx = make_ctx()
    stack = [wraps(fails_before, on_error="warn"), step("a", result=Handled("/m"))]
    assert call(*stack, ctx=ctx) == Handled("/m")
    assert outcomes(ctx) == [("W", "warned"), ("a", "handled")]


def test_a_wrapper_that_fails_last_keeps_the_inner_result_on_warn() -> None:
    ctx = make_ctx()
    stack = [wraps(fails_after, on_error="warn"), step("a", result=Handled("/m"))]
    assert call(*stack, ctx=ctx) == Handled("/m")
    assert outcomes(ctx) == [("W", "warned"), ("a", "handled")]


def test_a_wrapper_on_warn_that_fails_on_a_failure_does_not_hide_it() -> None:
    stack = [wraps(fails_on_failure, on_error="warn"), step("a", error=ValueError("boom"))]
    with pytest.raises(HookError, match="callback 'a' failed"):
        call(*stack)


@pytest.mark.parametrize("run", [never_yields, yields_twice])
def test_a_wrapper_must_yield_once(run: Callable[[CallbackCtx], Wrapping]) -> None:
    text = "callback 'W' failed .*: RuntimeError: a wrapper must yield once;"
    with pytest.raises(HookError, match=text):
        call(wraps(run), step("a"))


def test_after_the_yield_errors_of_the_context_name_the_wrapper() -> None:
    def misspells(ctx: CallbackCtx) -> Wrapping:
        yield
        ctx.runtime_envs = {}  # type: ignore[attr-defined]

    with pytest.raises(HookError, match="callback 'W': CallbackCtx has no field 'runtime_envs'"):
        call(wraps(misspells), step("a"))


def test_the_trace_times_a_wrapper_around_what_it_wraps() -> None:
    ctx = make_ctx()
    call(wraps(passes_on), step("a"), ctx=ctx)
    outer, inner = ctx.trace
    assert outer.duration_s is not None
    assert inner.duration_s is not None
    assert outer.duration_s >= inner.duration_s
