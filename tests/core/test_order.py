"""In which order callbacks are built and run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins_for_tests import hook_arguments, make_ctx, make_manager
from steps import call, clean_up, cleans, log_of, step, wrapper

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP, HOOKS
from rayserve_hooks.hookspecs import hookimpl

PLACES = ["first", "plain", "last"]


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
