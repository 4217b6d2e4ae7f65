"""In which order callbacks are built and run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins_for_tests import hook_arguments, make_ctx, make_manager
from steps import call, cleans, step, wrapper

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP, HOOKS, REVERSED
from rayserve_hooks.hookspecs import hookimpl
from rayserve_hooks.testing import Fail, RunStack

PLACES = ["first", "plain", "last"]


def log_of(run_stack: RunStack, *stack: object) -> list[str]:
    log: list[str] = run_stack(stack).assert_succeeded().custom_data["log"]
    return log


def cleaned(run_stack: RunStack, *stack: object) -> list[str]:
    """Return who cleans up, in order, where the start fails once the stack has started."""
    outcome = run_stack([*stack, Fail("on_engine_ready")])
    assert outcome.assert_failed(callback="Fail").cleanup_errors == []
    return [call.callback for call in outcome.calls(hook=CLEAN_UP)]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in REVERSED])
def test_callbacks_run_in_list_order(run_stack: RunStack, hook: str) -> None:
    stack = [step(name, hook=hook) for name in "abc"]
    outcome = run_stack(stack, engine_processes=[]).assert_succeeded()
    assert [call.callback for call in outcome.calls(hook=hook)] == ["a", "b", "c"]


def test_tryfirst_and_trylast_keep_list_order_within_their_groups(run_stack: RunStack) -> None:
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
    assert log_of(run_stack, *stack) == ["f1", "f2", "f3", "p1", "p2", "p3", "l1", "l2", "l3"]


def test_wrappers_surround_the_rest_outermost_first(run_stack: RunStack) -> None:
    stack = [step("a", "first"), wrapper("u"), step("b"), wrapper("v"), step("c", "last")]
    assert log_of(run_stack, *stack) == ["u", "v", "a", "b", "c", "/v", "/u"]


def test_wrappers_are_grouped_as_the_others_are(run_stack: RunStack) -> None:
    stack = [
        wrapper("l1", "last"),
        wrapper("p1"),
        wrapper("f1", "first"),
        step("a"),
        wrapper("l2", "last"),
        wrapper("p2"),
        wrapper("f2", "first"),
    ]
    opening = log_of(run_stack, *stack)[:7]
    assert opening == ["f1", "f2", "p1", "p2", "l1", "l2", "a"]


def test_decorated_and_undecorated_callbacks_share_one_order(run_stack: RunStack) -> None:
    class Decorated:
        @hookimpl
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["log"].append("decorated")

    class Undecorated:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data.setdefault("log", []).append("undecorated")

    stack = [Undecorated, Decorated, {"callback": Undecorated, "name": "again"}]
    assert log_of(run_stack, *stack) == ["undecorated", "decorated", "undecorated"]


def test_clean_up_runs_in_reverse_list_order_within_each_group(run_stack: RunStack) -> None:
    stack = [
        step("l1", "last", hook=CLEAN_UP),
        step("p1", hook=CLEAN_UP),
        step("f1", "first", hook=CLEAN_UP),
        step("l2", "last", hook=CLEAN_UP),
        step("p2", hook=CLEAN_UP),
        step("f2", "first", hook=CLEAN_UP),
    ]
    assert cleaned(run_stack, *stack) == ["f2", "f1", "p2", "p1", "l2", "l1"]


def test_clean_up_keeps_that_order_among_those_that_had_started(run_stack: RunStack) -> None:
    class Idle:
        @hookimpl(trylast=True)
        def on_engine_ready(self, ctx: CallbackCtx) -> None:
            raise AssertionError("started after the failure")

        def on_init_failed(self, ctx: CallbackCtx) -> None:
            pass

    stack = [cleans("a", "last"), Idle, cleans("c", "last"), cleans("d")]
    assert cleaned(run_stack, *stack) == ["d", "c", "a"]


def modelled_order(stack: list[tuple[bool, str]], hook: str = "on_before_init") -> list[int]:
    step = -1 if hook in REVERSED else 1
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
    ctx = make_ctx()
    assert call(*callbacks, ctx=ctx) == Handled(reason="mine")
    ran = [name for name in ctx.custom_data["log"] if not name.startswith("/")]
    assert ran == [str(i) for i in order[: order.index(taker) + 1]]


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
    assert {hook: names for hook, names in manager.run_order().items() if names} == {
        "on_before_init": ["w", "f", "a", "z"],
        "on_before_download": ["d"],
        "on_init_failed": ["y", "x"],
    }
    assert tuple(manager.run_order()) == HOOKS
