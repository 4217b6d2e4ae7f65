import contextlib
import pickle
import re
import threading
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins_for_tests import hook_arguments, hook_log, make_ctx, make_manager, run_script

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import parse_callbacks
from rayserve_hooks.core.manager import (
    DISABLE_VARIABLE,
    CallbackStack,
    PluginManager,
    enabled,
    get_plugin_manager,
    parse_stack,
)
from rayserve_hooks.errors import CallbackConfigError, HookError, RemoteCause
from rayserve_hooks.hookspecs import CLEAN_UP, HOOKS, RayServeLLMCallback, hookimpl, hookspec

Wrapping = Generator[None, Any, Any]
PLACES = ["first", "plain", "last"]


def step(
    name: str,
    place: str = "plain",
    *,
    result: object = None,
    error: BaseException | None = None,
    hook: str = "on_before_init",
    on_error: str = "raise",
) -> dict[str, object]:
    """Make a callback that logs its name, then raises or returns."""

    def run(self: object, ctx: CallbackCtx) -> object:
        ctx.custom_data.setdefault("log", []).append(name)
        if error is not None:
            raise error
        return result

    if place != "plain":
        run = hookimpl(run, tryfirst=place == "first", trylast=place == "last")
    return {"callback": type(name, (), {hook: run}), "name": name, "on_error": on_error}


def wrapper(name: str, place: str = "plain", hook: str = "on_before_init") -> dict[str, object]:
    """Make a wrapper that logs its name on the way in and out, and passes the result on."""

    @hookimpl(wrapper=True, tryfirst=place == "first", trylast=place == "last")
    def run(self: object, ctx: CallbackCtx) -> Wrapping:
        ctx.custom_data.setdefault("log", []).append(name)
        try:
            return (yield)
        finally:
            ctx.custom_data["log"].append(f"/{name}")

    return {"callback": type(name, (), {hook: run}), "name": name}


def log_of(*callbacks: object, hook: str = "on_before_init") -> list[str]:
    ctx = make_ctx()
    call(*callbacks, ctx=ctx, hook=hook)
    log: list[str] = ctx.custom_data.get("log", [])
    return log


def call(*callbacks: object, ctx: CallbackCtx | None = None, hook: str = "on_before_init") -> Any:
    return getattr(make_manager(*callbacks).hook, hook)(**hook_arguments(hook, ctx))


def outcomes(ctx: CallbackCtx) -> list[tuple[str, str]]:
    return [(entry.callback, entry.outcome) for entry in ctx.trace]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != CLEAN_UP])
def test_callbacks_run_in_list_order(hook: str) -> None:
    assert log_of(*(step(name, hook=hook) for name in "abc"), hook=hook) == ["a", "b", "c"]


def test_tryfirst_and_trylast_keep_list_order_within_their_groups() -> None:
    stack = [
        step("l1", "last"),
        step("p1"),
        step("f1", "first"),
        step("l2", "last"),
        step("p2"),
        step("f2", "first"),
        step("l3", "last"),
        step("p3"),
        step("f3", "first"),
    ]
    assert log_of(*stack) == ["f1", "f2", "f3", "p1", "p2", "p3", "l1", "l2", "l3"]


def test_wrappers_surround_the_rest_outermost_first() -> None:
    stack = [step("a", "first"), wrapper("u"), step("b"), wrapper("v"), step("c", "last")]
    assert log_of(*stack) == ["u", "v", "a", "b", "c", "/v", "/u"]


def test_wrappers_are_grouped_as_the_others_are() -> None:
    stack = [
        wrapper("l1", "last"),
        wrapper("p1"),
        wrapper("f1", "first"),
        step("a"),
        wrapper("l2", "last"),
        wrapper("p2"),
        wrapper("f2", "first"),
    ]
    opening = log_of(*stack)[:7]
    assert opening == ["f1", "f2", "p1", "p2", "l1", "l2", "a"]


def test_decorated_and_undecorated_callbacks_share_one_order() -> None:
    class Decorated:
        @hookimpl
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["log"].append("decorated")

    class Undecorated:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["log"].append("undecorated")

    ctx = make_ctx(custom_data={"log": []})
    call(Undecorated, Decorated, {"callback": Undecorated, "name": "again"}, ctx=ctx)
    assert ctx.custom_data["log"] == ["undecorated", "decorated", "undecorated"]


def test_the_same_class_runs_twice_under_two_names() -> None:
    class Count:
        def __init__(self, start: int) -> None:
            self.count = start

        def on_before_init(self, ctx: CallbackCtx) -> None:
            self.count += 1
            ctx.custom_data.setdefault("counts", []).append(self.count)

    ctx = make_ctx()
    manager = make_manager(
        {"callback": Count, "name": "one", "kwargs": {"start": 0}},
        {"callback": Count, "name": "two", "kwargs": {"start": 10}},
    )
    manager.hook.on_before_init(ctx=ctx)
    manager.hook.on_before_init(ctx=ctx)
    assert ctx.custom_data["counts"] == [1, 11, 2, 12]
    assert [entry.callback for entry in ctx.trace] == ["one", "two", "one", "two"]


def test_a_dataclass_runs_twice_though_its_instances_are_equal() -> None:
    @dataclass
    class Equal:
        size: int = 1

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    manager = make_manager({"callback": Equal, "name": "one"}, {"callback": Equal, "name": "two"})
    assert manager.run_order()["on_before_init"] == ["one", "two"]


@pytest.mark.parametrize("kind", ["instance", "module"])
def test_the_very_same_object_twice_is_a_config_error(kind: str) -> None:
    class Once:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    if kind == "instance":
        plugin: object = Once()
    else:
        plugin = "plugins_for_tests:ready_made"
    text = (
        "callbacks 'two' and 'one' are the same object; name the class twice, or make two instances"
    )
    with pytest.raises(CallbackConfigError, match=f"^{text}$"):
        make_manager({"callback": plugin, "name": "one"}, {"callback": plugin, "name": "two"})


def modelled_order(stack: list[tuple[bool, str]], hook: str = "on_before_init") -> list[int]:
    step = -1 if hook == CLEAN_UP else 1
    return sorted(
        range(len(stack)), key=lambda i: (not stack[i][0], PLACES.index(stack[i][1]), step * i)
    )


stacks = st.lists(st.tuples(st.booleans(), st.sampled_from(PLACES)), max_size=8)


@given(stacks, st.sampled_from(HOOKS))
@settings(deadline=None, max_examples=150)
def test_any_stack_runs_as_the_rule_says(stack: list[tuple[bool, str]], hook: str) -> None:
    callbacks = [
        wrapper(str(i), place, hook) if wraps else step(str(i), place, hook=hook)
        for i, (wraps, place) in enumerate(stack)
    ]
    order = [str(i) for i in modelled_order(stack, hook)]
    wrappers = [name for name in order if stack[int(name)][0]]
    manager, ctx = make_manager(*callbacks), make_ctx()
    assert manager.run_order()[hook] == order
    getattr(manager.hook, hook)(**hook_arguments(hook, ctx))
    closing = [f"/{name}" for name in reversed(wrappers)]
    assert ctx.custom_data.get("log", []) == order + closing


@given(stacks, st.data())
@settings(deadline=None, max_examples=60)
def test_a_first_result_anywhere_ends_any_stack(
    stack: list[tuple[bool, str]], data: st.DataObject
) -> None:
    order = modelled_order(stack)
    plain = [i for i in order if not stack[i][0]]
    if not plain:
        return
    taker = data.draw(st.sampled_from(plain))
    callbacks = [
        wrapper(str(i), place)
        if wraps
        else step(str(i), place, result=Handled(reason="mine") if i == taker else None)
        for i, (wraps, place) in enumerate(stack)
    ]
    ran = [name for name in log_of(*callbacks) if not name.startswith("/")]
    assert ran == [str(i) for i in order[: order.index(taker) + 1]]
    assert call(*callbacks) == Handled(reason="mine")


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


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("on_before_init", "before init"),
        ("on_before_download", "before download"),
        ("on_after_init", "after init"),
    ],
)
def test_a_failure_names_callback_hook_node_and_phase(hook: str, phase: str) -> None:
    cause = ValueError("boom")
    with pytest.raises(HookError) as caught:
        call(step("a", error=cause, hook=hook), hook=hook)
    error = caught.value
    assert vars(error) == {
        "callback": "a",
        "hook": hook,
        "node": "n1 (10.0.0.1)",
        "phase": phase,
        "detail": "ValueError: boom",
        "advice": "fix the callback, or set 'on_error: warn' on it to go on without it",
        "cleanup_errors": [],
    }
    assert error.__cause__ is cause
    assert str(error).startswith(
        f"callback 'a' failed in hook {hook} on node n1 (10.0.0.1) (phase: {phase}): "
        "ValueError: boom; fix the callback, or set 'on_error: warn'"
    )


def test_the_reason_of_a_handled_is_in_the_trace_without_its_secrets() -> None:
    ctx = make_ctx(custom_data={"api_key": "s3cr3t-value"})
    call(step("a", result=Handled(reason="found with s3cr3t-value")), ctx=ctx)
    assert (ctx.trace[0].outcome, ctx.trace[0].reason) == ("handled", "found with ***")
    assert "handled: found with ***" in ctx.trace.table()


def test_a_failure_stops_the_chain() -> None:
    ctx = make_ctx()
    with pytest.raises(HookError):
        call(step("a"), step("b", error=ValueError("boom")), step("c"), ctx=ctx)
    assert outcomes(ctx) == [("a", "returned"), ("b", "failed")]


def test_on_error_warn_goes_on_with_the_next() -> None:
    ctx = make_ctx()
    stack = [step("a", error=ValueError("boom"), on_error="warn"), step("b", result=Handled("/m"))]
    assert call(*stack, ctx=ctx) == Handled("/m")
    assert outcomes(ctx) == [("a", "warned"), ("b", "handled")]


def test_on_error_warn_logs_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    cause = ValueError("boom")
    with hook_log(caplog):
        call(step("a", error=cause, on_error="warn"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("callback 'a' failed in hook on_before_init on node n1")
    assert record.getMessage().endswith("(on_error: warn, going on)")
    assert record.exc_info is not None
    assert record.exc_info[1] is cause
    assert "Traceback (most recent call last):" in caplog.text


def test_on_error_warn_also_forgives_a_wrong_result() -> None:
    assert call(step("a", result=True, on_error="warn"), step("b", result=Handled())) == Handled()


def test_on_error_warn_also_forgives_a_hook_that_the_callback_itself_called() -> None:
    inner = make_manager(step("inner", error=ValueError("boom")))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            inner.hook.on_before_init(ctx=ctx)

    ctx = make_ctx()
    call({"callback": Calls, "on_error": "warn"}, step("b"), ctx=ctx)
    assert outcomes(ctx) == [("Calls", "warned"), ("inner", "failed"), ("b", "returned")]


def test_a_hook_error_of_an_inner_call_keeps_its_name() -> None:
    inner = make_manager(step("inner", error=ValueError("boom")))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            inner.hook.on_before_init(ctx=ctx)

    with pytest.raises(HookError) as caught:
        call(Calls)
    assert caught.value.callback == "inner"


def test_the_stack_says_what_an_entry_does_not() -> None:
    failing = step("a", error=ValueError("boom")) | {"on_error": None}
    assert make_manager(failing, on_error="warn").hook.on_before_init(ctx=make_ctx()) is None
    with pytest.raises(HookError):
        make_manager(failing, on_error="raise").hook.on_before_init(ctx=make_ctx())


def test_an_entry_overrules_the_stack() -> None:
    failing = step("a", error=ValueError("boom"), on_error="raise")
    with pytest.raises(HookError):
        make_manager(failing, on_error="warn").hook.on_before_init(ctx=make_ctx())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_an_interruption_passes_through(error: type[BaseException], on_error: str) -> None:
    ctx = make_ctx()
    with pytest.raises(error):
        call(step("a", error=error(), on_error=on_error), step("b"), ctx=ctx)
    assert outcomes(ctx) == [("a", "interrupted")]
    assert ctx.trace[0].duration_s is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes_through_wrappers(error: type[BaseException]) -> None:
    ctx = make_ctx()
    with pytest.raises(error):
        call(wrapper("w"), step("a", error=error()), ctx=ctx)
    assert outcomes(ctx) == [("w", "interrupted"), ("a", "interrupted")]
    assert ctx.custom_data["log"] == ["w", "a", "/w"]


def wraps(
    run: Callable[[CallbackCtx], Wrapping], hook: str = "on_before_init", on_error: str = "raise"
) -> dict[str, object]:
    """Make a wrapper callback named W of a generator function."""

    @hookimpl(wrapper=True)
    def method(self: object, ctx: CallbackCtx) -> Wrapping:
        return (yield from run(ctx))

    return {"callback": type("W", (), {hook: method}), "name": "W", "on_error": on_error}


def replaces(ctx: CallbackCtx) -> Wrapping:
    inner = yield
    return Handled("/replaced", f"instead of {inner.model_path}")


def returns_path(ctx: CallbackCtx) -> Wrapping:
    yield
    return "/short"


def returns_true(ctx: CallbackCtx) -> Wrapping:
    yield
    return True


def swallows(ctx: CallbackCtx) -> Wrapping:
    try:
        return (yield)
    except HookError as error:
        return Handled(reason=f"{error.callback} failed")


def fails_before(ctx: CallbackCtx) -> Wrapping:
    if ctx is not None:
        raise ValueError("before")
    return (yield)


def fails_after(ctx: CallbackCtx) -> Wrapping:
    yield
    raise ValueError("after")


def fails_on_failure(ctx: CallbackCtx) -> Wrapping:
    try:
        return (yield)
    except HookError:
        raise ValueError("cleanup") from None


def passes_on(ctx: CallbackCtx) -> Wrapping:
    return (yield)


def never_yields(ctx: CallbackCtx) -> Wrapping:
    if ctx is None:
        yield
    return None


def yields_twice(ctx: CallbackCtx) -> Wrapping:
    yield
    yield


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
    assert outcomes(ctx) == [("W", "returned"), ("a", "failed")]


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


def test_changes_around_the_yield_are_charged_to_the_wrapper() -> None:
    def changes(ctx: CallbackCtx) -> Wrapping:
        ctx.custom_data["before"] = 1
        result = yield
        ctx.custom_data["after"] = 1
        return result

    def changes_inside(ctx: CallbackCtx) -> Wrapping:
        ctx.runtime_env["inside"] = 1
        return (yield)

    ctx = make_ctx()
    call(wraps(changes), wraps(changes_inside) | {"name": "V"}, step("a"), ctx=ctx)
    assert {entry.callback: entry.changed for entry in ctx.trace} == {
        "W": ("custom_data.before", "custom_data.after"),
        "V": ("runtime_env.inside",),
        "a": ("custom_data.log",),
    }


def test_changes_before_a_nested_call_are_charged_to_the_caller() -> None:
    inner = make_manager(step("inner"))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.runtime_env["mine"] = 1
            inner.hook.on_before_init(ctx=ctx)

    ctx = make_ctx()
    call(Calls, ctx=ctx)
    assert {entry.callback: entry.changed for entry in ctx.trace} == {
        "Calls": ("runtime_env.mine",),
        "inner": ("custom_data.log",),
    }


def test_after_the_yield_errors_of_the_context_name_the_wrapper() -> None:
    def misspells(ctx: CallbackCtx) -> Wrapping:
        yield
        ctx.runtime_envs = {}

    with pytest.raises(HookError, match="callback 'W': CallbackCtx has no field 'runtime_envs'"):
        call(wraps(misspells), step("a"))


def test_the_trace_times_a_wrapper_around_what_it_wraps() -> None:
    ctx = make_ctx()
    call(wraps(passes_on), step("a"), ctx=ctx)
    outer, inner = ctx.trace
    assert outer.duration_s is not None
    assert inner.duration_s is not None
    assert outer.duration_s >= inner.duration_s


def cleans(
    name: str,
    place: str = "plain",
    *,
    error: BaseException | None = None,
    started: bool = True,
    on_error: str = "raise",
) -> dict[str, object]:
    """Make a callback that logs its name in the clean-up; ``started`` gives it another hook."""
    made: Any = step(name, place, error=error, hook=CLEAN_UP, on_error=on_error)
    if started:
        made["callback"].on_before_init = lambda self, ctx: None
    return made  # type: ignore[no-any-return]


FIRST_FAILURE = ValueError("the first failure")


def clean_up(
    *callbacks: object, ctx: CallbackCtx | None = None, started: str = "abcd"
) -> list[HookError]:
    return make_manager(*callbacks).clean_up(ctx or make_ctx(), FIRST_FAILURE, started)


def test_clean_up_runs_in_reverse_list_order_within_each_group() -> None:
    stack = [
        step("l1", "last", hook=CLEAN_UP),
        step("p1", hook=CLEAN_UP),
        step("f1", "first", hook=CLEAN_UP),
        step("l2", "last", hook=CLEAN_UP),
        step("p2", hook=CLEAN_UP),
        step("f2", "first", hook=CLEAN_UP),
    ]
    assert log_of(*stack, hook=CLEAN_UP) == ["f2", "f1", "p2", "p1", "l2", "l1"]


def test_clean_up_keeps_that_order_among_those_that_had_started() -> None:
    ctx = make_ctx()
    stack = [cleans("a", "last"), cleans("b"), cleans("c", "last"), cleans("d")]
    assert clean_up(*stack, ctx=ctx, started="acd") == []
    assert ctx.custom_data["log"] == ["d", "c", "a"]


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
    error = HookError(callback="a", hook="h", node="n1", phase="download", detail="disk full")
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


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_of_a_clean_up_passes_through(error: type[BaseException]) -> None:
    ctx = make_ctx()
    with pytest.raises(error):
        clean_up(cleans("a"), cleans("b", error=error()), ctx=ctx)
    assert outcomes(ctx) == [("b", "interrupted")]


SECRET = "hf_abcdefgh"


def leaks(self: object, ctx: CallbackCtx) -> None:
    try:
        raise KeyError(f"{SECRET} in the inner one")
    except KeyError as error:
        raise ValueError(f"401 for {SECRET}") from error


class Token:
    """Knows a secret by its arguments and shows it in an error."""

    def __init__(self, hf_token: str) -> None:
        pass

    on_before_init = leaks


LEAKS = type("Leaks", (), {"on_before_init": leaks})
BY_CONTEXT: tuple[Any, Any] = (
    {"callback": LEAKS},
    {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}},
)
BY_KWARGS: tuple[Any, Any] = ({"callback": Token, "kwargs": {"hf_token": SECRET}}, {})
leaking = pytest.mark.parametrize(("callback", "fields"), [BY_CONTEXT, BY_KWARGS])


@leaking
def test_a_secret_reaches_no_error_and_no_cause(
    callback: dict[str, object], fields: dict[str, Any]
) -> None:
    with pytest.raises(HookError) as caught:
        call(callback, ctx=make_ctx(**fields))
    error = pickle.loads(pickle.dumps(caught.value))
    for found in (caught.value, error):
        assert found.detail == "ValueError: 401 for ***"
        assert type(found.__cause__) is RemoteCause
        assert str(found.__cause__) == "ValueError: 401 for ***"
        formatted = "".join(traceback.format_exception(found))
        assert SECRET not in formatted
        assert "in leaks" in formatted
        assert "KeyError: '*** in the inner one'" in formatted


@leaking
@pytest.mark.parametrize("hook", ["on_before_init", CLEAN_UP])
def test_a_secret_reaches_no_log(
    callback: dict[str, Any], fields: dict[str, Any], hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls = type("Leaks", (callback["callback"],), {hook: leaks})
    with hook_log(caplog):
        call({**callback, "callback": cls, "on_error": "warn"}, ctx=make_ctx(**fields), hook=hook)
    assert "ValueError: 401 for ***" in caplog.text
    assert "Traceback (most recent call last):" in caplog.text
    assert SECRET not in caplog.text


def test_a_secret_reaches_no_log_of_a_failed_clean_up(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        call(
            type("Leaks", (), {CLEAN_UP: leaks}),
            ctx=make_ctx(custom_data={"password": SECRET}),
            hook=CLEAN_UP,
        )
    assert "ValueError: 401 for ***" in caplog.text
    assert SECRET not in caplog.text


def test_a_secret_reaches_neither_the_context_nor_the_trace() -> None:
    def sets(self: object, ctx: CallbackCtx) -> None:
        ctx.runtime_env["env_vars"] = {"HF_TOKEN": SECRET}
        ctx.extra_init_kwargs["api_key"] = SECRET
        ctx.custom_data["stores"] = [{"password": SECRET}]

    ctx = make_ctx()
    call(type("Sets", (), {"on_before_init": sets}), ctx=ctx)
    assert SECRET not in repr(ctx) + repr(ctx.trace) + ctx.trace.table() + repr(list(ctx.trace))
    assert len(ctx.trace[0].changes) == 3


def test_a_cause_without_a_secret_is_the_very_exception() -> None:
    cause = ValueError("boom")
    with pytest.raises(HookError) as caught:
        call(step("a", error=cause), ctx=make_ctx(custom_data={"password": SECRET}))
    assert caught.value.__cause__ is cause


def test_a_protocol_subclass_registers_only_what_it_overrides() -> None:
    class OnlyAfter(RayServeLLMCallback):
        def on_after_init(self, ctx: CallbackCtx) -> None:
            pass

    assert make_manager(OnlyAfter).run_order() == {
        "on_before_init": [],
        "on_before_download": [],
        "on_after_init": ["OnlyAfter"],
        "on_init_failed": [],
    }


def test_a_module_is_a_plugin() -> None:
    module = ModuleType("module_plugin")

    def on_before_init(ctx: CallbackCtx) -> Handled:
        return Handled(reason="module")

    vars(module)["on_before_init"] = on_before_init
    manager = make_manager()
    manager.register(module, "module_plugin")
    assert manager.hook.on_before_init(ctx=make_ctx()) == Handled(reason="module")


def test_a_method_marked_with_another_name_is_that_hook() -> None:
    class Renamed:
        @hookimpl(specname="on_before_init")
        def prepare(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason="renamed")

    ctx = make_ctx()
    assert call(Renamed, ctx=ctx) == Handled(reason="renamed")
    assert (ctx.trace[0].callback, ctx.trace[0].hook) == ("Renamed", "on_before_init")


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


def test_callbacks_are_built_in_list_order() -> None:
    built = []

    class Builds:
        def __init__(self, number: int) -> None:
            built.append(number)

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    make_manager(*({"callback": Builds, "name": str(n), "kwargs": {"number": n}} for n in range(3)))
    assert built == [0, 1, 2]


def test_run_order_names_the_callbacks_of_each_hook() -> None:
    manager = make_manager(
        step("a"),
        step("z", "last"),
        wrapper("w"),
        step("f", "first"),
        step("d", hook="on_before_download"),
        step("x", hook="on_init_failed"),
        step("y", hook="on_init_failed"),
    )
    assert manager.run_order() == {
        "on_before_init": ["w", "f", "a", "z"],
        "on_before_download": ["d"],
        "on_after_init": [],
        "on_init_failed": ["y", "x"],
    }


def test_the_hook_needs_its_argument_by_name() -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        make_manager(step("a")).hook.on_before_init(make_ctx())  # type: ignore[call-arg]


def test_a_manager_cannot_be_pickled() -> None:
    text = (
        "a rayserve_hooks PluginManager cannot be pickled: callbacks are built once in each "
        "process; send the config and call rayserve_hooks.get_plugin_manager(config) there"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        pickle.dumps(make_manager())


@pytest.fixture
def app(request: pytest.FixtureRequest) -> str:
    """Name a deployment that no other test has."""
    return str(request.node.nodeid)


class Empty:
    def __init__(self, **kwargs: object) -> None:
        pass

    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


def stack_of(
    app: str,
    callback: object = Empty,
    on_error: str = "raise",
    time_limits: TimeLimits | None = None,
) -> CallbackStack:
    entries = parse_callbacks([callback])
    return CallbackStack(app, entries, on_error, time_limits or TimeLimits())


def test_equal_stacks_share_one_manager(app: str) -> None:
    assert get_plugin_manager(stack_of(app)) is get_plugin_manager(stack_of(app))


def test_a_stack_that_travelled_has_the_same_manager(app: str) -> None:
    stack = stack_of(app, Empty())
    assert get_plugin_manager(pickle.loads(pickle.dumps(stack))) is get_plugin_manager(stack)


@pytest.mark.parametrize(
    "other",
    [
        {"app": "another app"},
        {"on_error": "warn"},
        {"time_limits": TimeLimits(total=60)},
        {"callback": {"callback": Empty, "kwargs": {"a": 1}}},
        {"callback": {"callback": Empty, "name": "other"}},
    ],
)
def test_stacks_that_differ_share_none(app: str, other: dict[str, Any]) -> None:
    first = get_plugin_manager(stack_of(app))
    second = get_plugin_manager(stack_of(**({"app": app} | other)))
    assert first is not second
    assert not first.get_plugins() & second.get_plugins()


def test_many_threads_at_once_get_one_manager(app: str) -> None:
    together, second_build = threading.Barrier(16), threading.Barrier(2)
    built = []

    class Slow:
        def __init__(self) -> None:
            built.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                second_build.wait(0.2)

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    def get(_: int) -> PluginManager:
        together.wait(10)
        return get_plugin_manager(stack_of(app, Slow))

    with ThreadPoolExecutor(16) as pool:
        managers = set(pool.map(get, range(16)))
    assert len(managers) == 1
    assert len(built) == 1


def test_a_stack_that_cannot_be_built_fails_each_time(app: str) -> None:
    for _ in range(2):
        with pytest.raises(CallbackConfigError, match="no module named 'no_such_module'"):
            get_plugin_manager(stack_of(app, "no_such_module:Fetch"))


def test_a_callback_may_ask_for_a_manager_while_it_is_built() -> None:
    # A process of its own: the lock that hangs here would hang the tests that follow.
    script = """
        from rayserve_hooks.core.loading import parse_callbacks
        from rayserve_hooks.core.manager import CallbackStack, get_plugin_manager

        class Asks:
            def __init__(self):
                get_plugin_manager(CallbackStack("other", ()))

            def on_before_init(self, ctx):
                pass

        manager = get_plugin_manager(CallbackStack("app", parse_callbacks([Asks])))
        print(manager.run_order()["on_before_init"])
    """
    assert run_script(script) == "['Asks']"


OURS = "rayserve_hooks.HooksCallback"


def test_a_stack_is_read_from_a_callback_config() -> None:
    kwargs = {"callbacks": [Empty], "time_limits": {"total": 60}}
    stack = parse_stack("app", OURS, kwargs, "warn")
    assert [entry.name for entry in stack.entries] == ["Empty"]
    assert (stack.on_error, stack.time_limits) == ("warn", TimeLimits(total=60))


def test_a_stack_without_anything_is_empty() -> None:
    assert parse_stack("app", OURS, {}) == CallbackStack("app", ())


def test_another_callback_class_is_a_stack_of_one() -> None:
    (entry,) = parse_stack("app", "ray_callbacks:Strict", {"paths": []}).entries
    assert (entry.name, entry.kwargs) == ("Strict", {"paths": []})


def test_an_unknown_key_of_callback_kwargs() -> None:
    text = (
        "callback_kwargs has unknown key 'callback'; HooksCallback takes 'callbacks', a list, and "
        "'time_limits', a mapping"
    )
    with pytest.raises(CallbackConfigError, match=f"^{text}$"):
        parse_stack("app", OURS, {"callback": "x"})


def test_keys_callbacks_and_limits_that_are_wrong_are_reported_together() -> None:
    kwargs = {"zzz": 1, "callbacks": [None], "time_limits": {"total": 0}}
    with pytest.raises(CallbackConfigError) as caught:
        parse_stack("app", OURS, kwargs)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "callback_kwargs",
        "callbacks[0]",
        "time_limits:",
    ]


def test_a_callback_is_switched_off_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "a, ,c")
    entries = parse_callbacks([step("a"), step("b"), step("c")])
    with hook_log(caplog):
        assert [entry.name for entry in enabled(entries)] == ["b"]
    assert caplog.messages == [
        "callback 'a' is switched off by RAYSERVE_HOOKS_DISABLE",
        "callback 'c' is switched off by RAYSERVE_HOOKS_DISABLE",
    ]


@pytest.mark.parametrize(("names", "known"), [("ba", "a, b"), ("", "none")])
def test_an_unknown_name_to_switch_off(
    names: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "zzz")
    text = (
        "RAYSERVE_HOOKS_DISABLE names 'zzz', which is no callback of this deployment; use names "
        f"of its callbacks (known: {known})"
    )
    with pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}$"):
        enabled(parse_callbacks([step(name) for name in names]))


def test_subset_hook_caller_keeps_the_order_of_a_clean_up() -> None:
    manager, ctx = make_manager(*(cleans(name) for name in "abc")), make_ctx()
    subset = manager.subset_hook_caller(CLEAN_UP, [manager.get_plugin("b")])
    assert subset(**hook_arguments(CLEAN_UP, ctx)) == []
    assert ctx.custom_data["log"] == ["c", "a"]


def test_subset_hook_caller_leaves_plugins_out() -> None:
    manager, ctx = make_manager(step("a"), step("b"), step("c")), make_ctx()
    subset = manager.subset_hook_caller("on_before_init", [manager.get_plugin("b")])
    subset(ctx=ctx)
    assert outcomes(ctx) == [("a", "returned"), ("c", "returned")]


def test_hook_calls_can_be_monitored() -> None:
    manager = make_manager(step("a", result=Handled("/m")))
    seen: list[object] = []

    def before(hook: str, impls: Any, kwargs: Any) -> None:
        seen.append(("before", hook, [impl.plugin_name for impl in impls]))

    def after(outcome: pluggy.Result[Any], hook: str, impls: Any, kwargs: Any) -> None:
        seen.append(("after", hook, outcome.get_result()))

    undo = manager.add_hookcall_monitoring(before, after)
    manager.hook.on_before_init(ctx=make_ctx())
    undo()
    manager.hook.on_before_init(ctx=make_ctx())
    assert seen == [
        ("before", "on_before_init", ["a"]),
        ("after", "on_before_init", Handled("/m")),
    ]


def test_a_monitor_sees_the_failure() -> None:
    manager = make_manager(step("a", error=ValueError("boom")))
    seen: list[object] = []
    manager.add_hookcall_monitoring(
        lambda *args: None, lambda outcome, *args: seen.append(type(outcome.exception))
    )
    with pytest.raises(HookError):
        manager.hook.on_before_init(ctx=make_ctx())
    assert seen == [HookError]


def test_call_extra_runs_functions_for_one_call() -> None:
    def extra(ctx: CallbackCtx) -> Handled:
        return Handled(reason="extra")

    manager = make_manager(step("a"))
    call_extra = manager.hook.on_before_init.call_extra
    assert call_extra([extra], {"ctx": make_ctx()}) == Handled(reason="extra")
    assert manager.hook.on_before_init(ctx=make_ctx()) is None


def test_a_blocked_callback_does_not_run() -> None:
    manager = make_manager(step("a"), step("b"))
    manager.set_blocked("a")
    assert manager.is_blocked("a")
    assert manager.run_order()["on_before_init"] == ["b"]
    assert manager.register(object(), "a") is None


def test_an_unregistered_callback_does_not_run() -> None:
    manager, ctx = make_manager(step("a"), step("b"), step("c")), make_ctx()
    plugin = manager.get_plugin("b")
    assert manager.unregister(name="b") is plugin
    manager.hook.on_before_init(ctx=ctx)
    assert outcomes(ctx) == [("a", "returned"), ("c", "returned")]


def test_a_callback_registered_again_is_traced_once() -> None:
    manager, ctx = make_manager(step("a")), make_ctx()
    manager.register(manager.unregister(name="a"), "a")
    manager.hook.on_before_init(ctx=ctx)
    assert outcomes(ctx) == [("a", "returned")]


def test_a_plugin_registered_by_hand_is_traced_and_runs_first() -> None:
    class Late:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    manager, ctx = make_manager(step("a")), make_ctx()
    manager.register(Late(), "late")
    manager.hook.on_before_init(ctx=ctx)
    assert outcomes(ctx) == [("late", "returned"), ("a", "returned")]


def test_a_users_own_historic_hook_works() -> None:
    class Specs:
        @hookspec(historic=True)
        def on_model_registered(self, name: str) -> None: ...

    class Listens:
        def __init__(self) -> None:
            self.names: list[str] = []

        @hookimpl
        def on_model_registered(self, name: str) -> None:
            self.names.append(name)

    manager, early, late = make_manager(), Listens(), Listens()
    manager.add_hookspecs(Specs)
    manager.register(early)
    manager.hook.on_model_registered.call_historic(kwargs={"name": "m"})
    manager.register(late)
    assert early.names == late.names == ["m"]


def test_hooks_of_a_user_are_called_as_pluggy_calls_them() -> None:
    class Specs:
        @hookspec
        def on_ready(self, name: str) -> object: ...

    class Listens:
        @hookimpl
        def on_ready(self, name: str) -> bool:
            return True

    manager = make_manager()
    manager.add_hookspecs(Specs)
    manager.register(Listens())
    assert manager.hook.on_ready(name="m") == [True]
