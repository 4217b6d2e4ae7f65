"""Registration, and one manager per process and deployment."""

import contextlib
import functools
import gc
import importlib.metadata
import pickle
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pluggy
import pytest
from plugins_for_tests import (
    Outer,
    Plain,
    hook_arguments,
    make_ctx,
    make_manager,
    parse_callbacks,
    ready_made,
    refused,
    run_script,
    sent,
)
from pydantic import BaseModel
from steps import cleans, outcomes, step

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.manager import PluginManager, RegisteredCallback, manager_of
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError, HookError
from rayserve_hooks.hookspecs import hookimpl, hookspec


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


class Slots:
    __slots__ = ("__weakref__", "path")

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(reason="Slots")


@dataclass
class Equal:
    token: str = "s3cret"

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(reason="Equal")


class Model(BaseModel):
    token: str = "s3cret"

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(reason="Model")


class Static:
    @hookimpl(tryfirst=True)
    @staticmethod
    def on_before_init(ctx: CallbackCtx) -> Handled:
        return Handled(reason="Static")


class ClassMethod:
    @hookimpl(trylast=True)
    @classmethod
    def on_before_init(cls, ctx: CallbackCtx) -> Handled:
        return Handled(reason=cls.__name__)


class Renamed:
    @hookimpl(specname="on_before_init")
    def prepare(self, ctx: CallbackCtx) -> Handled:
        return Handled(reason="Renamed")


class Async:
    async def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(reason="Async")


def a_module() -> ModuleType:
    module = ModuleType("a_module")

    def on_before_init(ctx: CallbackCtx) -> Handled:
        return Handled(reason="a_module")

    vars(module)["on_before_init"] = on_before_init
    return module


every_kind = pytest.mark.parametrize(
    "make", [Slots, Equal, Model, Static, ClassMethod, Renamed, Async, a_module]
)
Make = Callable[[], Any]


def registered(make: Make) -> tuple[PluginManager, Any, RegisteredCallback]:
    """Return a manager with another callback, one of this kind as ``a``, and what pluggy holds."""
    manager, callback = make_manager(step("other")), make()
    assert manager.register(callback, "a") == "a"
    impls = manager.hook.on_before_init.get_hookimpls()
    (plugin,) = (impl.plugin for impl in impls if impl.plugin_name == "a")
    assert isinstance(plugin, RegisteredCallback)
    return manager, callback, plugin


@every_kind
def test_every_look_up_returns_the_callback_itself(make: Make) -> None:
    manager, callback, _ = registered(make)
    other = manager.get_plugin("other")
    assert manager.get_plugin("a") is callback
    assert [found for found in manager.get_plugins() if found is callback] == [callback]
    assert callback in manager.get_plugins()
    assert make() not in manager.get_plugins()
    assert len(manager.get_plugins()) == 2
    found = manager.list_name_plugin()
    assert [name for name, _ in found] == ["other", "a"]
    assert found[0][1] is other
    assert found[1][1] is callback
    assert manager.has_plugin("a")


@every_kind
def test_the_plugin_of_a_hookimpl_holds_the_callback_and_equals_it(make: Make) -> None:
    _, callback, plugin = registered(make)
    assert plugin.name == "a"
    assert plugin.callback is callback
    assert plugin == callback
    assert hash(plugin) == object.__hash__(callback)
    assert plugin != make()
    assert plugin not in (None, "a")


@every_kind
@pytest.mark.parametrize("by", ["callback", "registration"])
def test_every_look_up_takes_the_callback_or_its_registration(make: Make, by: str) -> None:
    manager, callback, plugin = registered(make)
    given = callback if by == "callback" else plugin
    assert manager.get_name(given) == "a"
    assert manager.is_registered(given)
    assert manager.get_hookcallers(given) == [manager.hook.on_before_init]
    assert manager.subset_hook_caller("on_before_init", [given])(ctx=make_ctx()) is None
    assert manager.unregister(given) is callback
    assert manager.get_name(given) is None
    assert not manager.is_registered(given)
    assert manager.get_hookcallers(given) is None
    assert manager.run_order()["on_before_init"] == ["other"]


@every_kind
def test_a_callback_is_unregistered_by_name(make: Make) -> None:
    manager, callback, _ = registered(make)
    assert manager.unregister(name="a") is callback
    assert manager.unregister(name="a") is None
    assert not manager.has_plugin("a")
    assert manager.register(callback, "a") == "a"


@every_kind
def test_every_kind_of_callback_is_called_and_traced(make: Make) -> None:
    manager, _, _ = registered(make)
    ctx = make_ctx()
    assert manager.hook.on_before_init(ctx=ctx) == Handled(reason=make.__name__)
    assert ("a", "handled") in outcomes(ctx)


@every_kind
def test_an_unregistered_callback_is_freed(make: Make) -> None:
    manager, callback, plugin = registered(make)
    manager.hook.on_before_init(ctx=make_ctx())
    references = [weakref.ref(callback), weakref.ref(plugin)]
    manager.unregister(name="a")
    del callback, plugin
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_an_unregistered_callback_of_a_stack_is_freed() -> None:
    manager = make_manager(Slots)
    reference = weakref.ref(manager.unregister(name="Slots"))
    gc.collect()
    assert reference() is None


@every_kind
def test_a_blocked_callback_is_unregistered_and_stays_out(make: Make) -> None:
    manager, callback, _ = registered(make)
    manager.set_blocked("a")
    assert manager.is_blocked("a")
    assert manager.get_plugin("a") is None
    assert not manager.is_registered(callback)
    assert callback not in manager.get_plugins()
    assert manager.register(callback, "a") is None
    assert manager.unregister(callback, "a") is callback  # as in pluggy
    assert manager.run_order()["on_before_init"] == ["other"]
    manager.unblock("a")
    assert manager.register(callback, "a") == "a"


@every_kind
def test_its_repr_shows_nothing_of_the_callbacks_own(make: Make) -> None:
    _, callback, plugin = registered(make)
    cls = type(callback)
    assert repr(plugin) == f"<callback 'a' of {cls.__module__}.{cls.__qualname__}>"


def test_a_name_that_is_taken_is_an_error_that_shows_no_repr_of_a_callback() -> None:
    manager, _, _ = registered(Equal)
    with pytest.raises(ValueError, match="already registered: a=<callback 'a' of ") as caught:
        manager.register(Equal(), "a")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("make", [Equal, Model])
def test_two_equal_instances_are_two_callbacks(make: Make) -> None:
    first, second = make(), make()
    assert first == second
    manager = make_manager({"callback": first, "name": "a"}, {"callback": second, "name": "b"})
    assert (manager.get_name(first), manager.get_name(second)) == ("a", "b")
    assert len(manager.get_plugins()) == 2
    assert manager.unregister(second) is second
    assert manager.is_registered(first)
    assert not manager.is_registered(second)
    assert manager.run_order()["on_before_init"] == ["a"]


def test_an_impl_calls_the_instrumented_hook_and_leads_to_the_callbacks_own() -> None:
    manager, callback, plugin = registered(Renamed)
    (impl,) = (i for i in manager.hook.on_before_init.get_hookimpls() if i.plugin == callback)
    ctx = make_ctx()
    assert impl.function(ctx) == Handled(reason="Renamed")
    assert outcomes(ctx)[0] == ("a", "handled")
    assert plugin.original(impl.function) == callback.prepare
    assert plugin.original(print) is None


def test_options_of_static_and_class_methods_order_them() -> None:
    manager = make_manager(ClassMethod, step("plain"), Static)
    assert manager.run_order()["on_before_init"] == ["Static", "plain", "ClassMethod"]


def test_a_callback_of_a_stack_is_shown_by_the_same_rule() -> None:
    instance = Plain()
    manager = make_manager("plugins_for_tests:ready_made", instance, Slots)
    found: list[tuple[str, Any]] = manager.list_name_plugin()
    assert dict(found)["Plain"] is instance
    assert {name: type(callback) for name, callback in found} == {
        "ready_made": Plain,
        "Plain": Plain,
        "Slots": Slots,
    }


def test_a_clean_up_under_another_name_is_left_out_of_who_had_not_started() -> None:
    class Tidies:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

        @hookimpl(specname="on_init_failed")
        def tidy(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["tidied"] = True

    manager, ctx = make_manager(Tidies), make_ctx()
    assert manager.clean_up(ctx, ValueError("boom"), ()) == []
    assert ctx.custom_data == {}
    (impl,) = manager.hook.on_init_failed.get_hookimpls()
    # What pluggy 1.6 asks of a plugin before it leaves it out.
    assert hasattr(impl.plugin, "on_init_failed")
    text = "<callback 'Tidies' of .*> has no 'on_after_init'; see the callback: its 'callback'"
    with pytest.raises(AttributeError, match=f"^{text}$"):
        _ = impl.plugin.on_after_init  # type: ignore[attr-defined]


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
    return CallbackStack(entries, on_error, time_limits or TimeLimits(), app)


def test_equal_stacks_share_one_manager(app: str) -> None:
    assert manager_of(stack_of(app)) is manager_of(stack_of(app))


def test_a_stack_that_travelled_has_the_same_manager(app: str) -> None:
    stack = stack_of(app, Empty())
    assert manager_of(sent(stack)) is manager_of(stack)


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
    first = manager_of(stack_of(app))
    second = manager_of(stack_of(**({"app": app} | other)))
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
        return manager_of(stack_of(app, Slow))

    with ThreadPoolExecutor(16) as pool:
        managers = set(pool.map(get, range(16)))
    assert len(managers) == 1
    assert len(built) == 1


def test_a_stack_that_cannot_be_built_fails_each_time(app: str) -> None:
    for _ in range(2):
        with pytest.raises(CallbackConfigError, match="no module named 'no_such_module'"):
            manager_of(stack_of(app, "no_such_module:Fetch"))


def test_a_callback_may_ask_for_a_manager_while_it_is_built() -> None:
    # A process of its own: the lock that hangs here would hang the tests that follow.
    script = """
        from rayserve_hooks.core.manager import manager_of
        from rayserve_hooks.core.stack import CallbackStack

        class Asks:
            def __init__(self):
                manager_of(CallbackStack(deployment="other"))

            def on_before_init(self, ctx):
                pass

        manager = manager_of(CallbackStack.parse([Asks]))
        print(manager.run_order()["on_before_init"])
    """
    assert run_script(script) == "['Asks']"


def test_a_callback_that_asks_for_its_own_manager_is_told_so(app: str) -> None:
    class AsksForOwn:
        def __init__(self) -> None:
            manager_of(stack)

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    stack = stack_of(app, AsksForOwn)
    text = "RuntimeError: it asks for a plugin manager that is built only after it; ask in a hook$"
    with pytest.raises(CallbackConfigError, match=text):
        manager_of(stack)


def test_two_callbacks_that_ask_for_each_others_manager_do_not_hang(app: str) -> None:
    both = threading.Barrier(2)
    stacks: list[CallbackStack] = []

    class AsksForOther:
        def __init__(self, other: int) -> None:
            with contextlib.suppress(threading.BrokenBarrierError):  # built again by the other
                both.wait(0.2)
            manager_of(stacks[other])

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    stacks += [
        stack_of(f"{app} {index}", {"callback": AsksForOther, "kwargs": {"other": 1 - index}})
        for index in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(manager_of, stack) for stack in stacks]
        errors = [str(future.exception(10)) for future in futures]
    assert any("it asks for a plugin manager that is built only after it" in e for e in errors)


def test_a_slow_constructor_holds_up_no_other_deployment(app: str) -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        def __init__(self) -> None:
            started.set()
            assert go_on.wait(10)

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(manager_of, stack_of(app, Slow))
        assert started.wait(10)
        assert manager_of(stack_of(f"{app} other")).run_order()["on_before_init"] == ["Empty"]
        go_on.set()
        assert slow.result(10).run_order()["on_before_init"] == ["Slow"]


def test_a_manager_lives_as_long_as_what_is_made_of_its_stack_and_no_longer(app: str) -> None:
    instance = Empty()
    stack = CallbackStack.parse([instance])
    manager = weakref.ref(manager_of(stack.for_deployment(app).here()))
    reference = weakref.ref(instance)
    del instance
    gc.collect()
    assert manager_of(stack.for_deployment(app)) is manager()
    del stack
    gc.collect()
    assert (manager(), reference()) == (None, None)


def test_many_stacks_that_are_gone_keep_nothing(app: str) -> None:
    references = []
    for index in range(50):
        instance = Empty()
        references.append(weakref.ref(instance))
        manager_of(stack_of(f"{app} {index}", instance))
    del instance
    gc.collect()
    assert [reference() for reference in references] == [None] * 50


def test_what_is_kept_is_neither_sent_nor_compared(app: str) -> None:
    stack = stack_of(app)
    manager_of(stack)
    assert sent(stack) == stack
    assert sent(stack).kept.managers == {}
    assert manager_of(sent(stack)) is manager_of(stack)


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


def test_none_is_ignored_as_in_pluggy() -> None:
    manager = make_manager()
    assert manager.register(None) is None
    assert len(manager.get_plugins()) == 0


def test_pluggys_parser_takes_a_callback_and_a_registration() -> None:
    class Marked:
        @hookimpl(tryfirst=True)
        def on_before_init(self, ctx: CallbackCtx) -> None: ...

        def helper(self) -> None: ...

    manager = make_manager(Marked)
    (callback,) = manager.get_plugins()
    (impl,) = manager.hook.on_before_init.get_hookimpls()
    for plugin, name in ((callback, "on_before_init"), (impl.plugin, "on_before_init()")):
        options = manager.parse_hookimpl_opts(plugin, name)
        assert options is not None
        assert options["tryfirst"]
        assert manager.parse_hookimpl_opts(plugin, "helper") is None


def test_a_subclass_may_find_hooks_in_its_own_way() -> None:
    class OwnWay(PluginManager):
        def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
            found = super().parse_hookimpl_opts(plugin, name)
            return {"specname": "on_before_init"} if name == "start" else found

    class Starts:
        def start(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason="started")

    manager = OwnWay(CallbackStack())
    manager.register(Starts())
    (impl,) = manager.hook.on_before_init.get_hookimpls()
    assert impl.plugin == manager.get_plugin(impl.plugin_name)
    assert manager.hook.on_before_init(ctx=make_ctx()) == Handled(reason="started")


class TestRegisteredByHand:
    """What the config refuses is refused, and nothing of it stays."""

    def test_without_ctx(self) -> None:
        class Bad:
            def on_after_init(self, ctx: CallbackCtx) -> None: ...

            def on_before_init(self) -> None: ...

        self.refuse(Bad(), "on_before_init() has no parameter 'ctx'; write 'def on_before_init(")

    def test_without_even_self(self) -> None:
        class Bad:
            def on_before_init() -> None: ...  # type: ignore[misc]

        self.refuse(
            Bad(),
            "on_before_init() takes nothing, or says wrongly what it takes; write 'def on_before_",
        )

    @pytest.mark.parametrize("hook", ["on_before_init", "on_init_failed"])
    def test_with_a_default(self, hook: str) -> None:
        def run(self: object, ctx: CallbackCtx | None = None) -> None: ...

        self.refuse(
            type("Bad", (), {hook: run})(),
            f"{hook}() gives 'ctx' a default, but is always called with it; write 'def {hook}(",
        )

    def test_a_class_instead_of_an_instance(self) -> None:
        self.refuse(Slots, "is the class itself; register Slots(), an instance of it")
        manager = make_manager()
        manager.register(Static, "static")  # whose hooks need no instance
        assert manager.hook.on_before_init(ctx=make_ctx()) == Handled(reason="Static")

    def test_an_old_style_hookwrapper(self) -> None:
        class Bad:
            @hookimpl(hookwrapper=True)
            def on_before_init(self, ctx: CallbackCtx) -> Any:
                yield

        self.refuse(Bad(), "on_before_init() is an old-style hookwrapper; use wrapper=True")

    def test_first_and_last_at_once(self) -> None:
        class Bad:
            @hookimpl(tryfirst=True, trylast=True)
            def on_before_init(self, ctx: CallbackCtx) -> None: ...

        text = "on_before_init() is marked tryfirst and trylast; keep one of them"
        self.refuse(Bad(), text)
        with refused(f"callback 'Bad': {text}"):
            make_manager(Bad)

    @pytest.mark.parametrize("descriptor", [property, functools.cached_property, functools.cache])
    def test_a_descriptor_named_as_a_hook(self, descriptor: Any) -> None:
        def on_before_init(self: object) -> object:
            raise AssertionError("it ran")

        bad = type("Bad", (), {"on_before_init": descriptor(on_before_init)})
        self.refuse(bad(), "'on_before_init' is named after a hook, but is a ")

    def test_a_generator(self) -> None:
        class Bad:
            def on_before_init(self, ctx: CallbackCtx) -> Any:
                yield

        self.refuse(Bad(), "on_before_init() is a generator, of which nothing would run; drop its")

    def test_a_hook_of_the_users_own_that_does_not_fit(self) -> None:
        class Specs:
            @hookspec
            def on_ready(self, name: str) -> object: ...

        class Bad:
            def on_before_init(self, ctx: CallbackCtx) -> None: ...

            @hookimpl
            def on_ready(self, other: str) -> None: ...

        manager, bad = make_manager(), Bad()
        manager.add_hookspecs(Specs)
        with pytest.raises(pluggy.PluginValidationError) as caught:
            manager.register(bad, "bad")
        assert caught.value.plugin is bad
        self.nothing_stays(manager, bad)

    def test_an_unknown_hook_is_charged_to_the_callback_itself(self) -> None:
        class Unknown:
            @hookimpl
            def on_ready(self, name: str) -> None: ...

        manager, callback = make_manager(), Unknown()
        manager.register(callback, "unknown")
        with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'on_re") as caught:
            manager.check_pending()
        assert caught.value.plugin is callback

    def refuse(self, callback: object, text: str) -> None:
        manager = make_manager()
        with refused(f"callback 'bad': {text}"):
            manager.register(callback, "bad")
        self.nothing_stays(manager, callback)

    @staticmethod
    def nothing_stays(manager: PluginManager, callback: object) -> None:
        assert not manager.is_registered(callback)
        assert not manager.has_plugin("bad")
        assert set(map(tuple, manager.run_order().values())) == {()}

    def test_any_order_of_parameters_and_any_name_of_self(self) -> None:
        def decorated(function: Any) -> Any:
            @functools.wraps(function)
            def call(*args: Any) -> Any:
                return function(*args)

            return call

        class Odd:
            @decorated
            def on_before_init(this, ctx: CallbackCtx) -> Handled:  # noqa: N805
                return Handled(reason="decorated")

            def on_init_failed(this, error: BaseException, ctx: CallbackCtx) -> None:  # noqa: N805
                ctx.custom_data["error"] = str(error)

        manager, ctx = make_manager(), make_ctx()
        manager.register(Odd())
        assert manager.hook.on_before_init(ctx=ctx) == Handled(reason="decorated")
        manager.hook.on_init_failed(ctx=ctx, error=ValueError("boom"))
        assert ctx.custom_data["error"] == "boom"

    def test_a_hook_under_a_name_that_a_registration_has_itself(self) -> None:
        class Odd:
            @hookimpl(specname="on_before_init")
            def callback(self, ctx: CallbackCtx) -> None:
                ctx.custom_data["callback"] = True

            @hookimpl(specname="on_before_init")
            def name(self, ctx: CallbackCtx) -> Handled:
                return Handled(reason="name")

        manager, ctx = make_manager(), make_ctx()
        manager.register(Odd(), "odd")
        manager.register(Plain(), "plain")
        assert manager.hook.on_before_init(ctx=ctx) == Handled(reason="name")
        assert manager.get_name(manager.get_plugin("odd")) == "odd"

    def test_an_optional_hook_that_is_unknown(self) -> None:
        @dataclass
        class Newer:
            @hookimpl(optionalhook=True)
            def on_before_everything(self, ctx: CallbackCtx) -> None: ...

        manager = make_manager(Newer)
        manager.register(Newer(), "by hand")
        manager.check_pending()
        assert len(manager.get_plugins()) == 2

    def test_a_name_is_found_without_running_anything(self) -> None:
        class Attacks:
            @property
            def __name__(self) -> str:
                raise AssertionError("it ran")

            def __getattr__(self, name: str) -> Any:
                raise AssertionError("it ran")

            def on_before_init(self, ctx: CallbackCtx) -> None: ...

        callback = Attacks()
        assert make_manager().register(callback) == str(id(callback))

    def test_entry_points_are_built_as_the_config_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Distribution:
            metadata: ClassVar = {"name": "fetchers"}
            entry_points: ClassVar = [
                importlib.metadata.EntryPoint("outer", "plugins_for_tests:Outer.Inner", "g"),
                importlib.metadata.EntryPoint("strict", "plugins_for_tests:Strict", "g2"),
                importlib.metadata.EntryPoint("ready", "plugins_for_tests:ready_made", "g"),
            ]

        monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Distribution()])
        manager = make_manager()
        manager.set_blocked("blocked")
        assert manager.load_setuptools_entrypoints("g") == 2
        assert type(manager.get_plugin("outer")) is Outer.Inner
        assert manager.get_plugin("ready") is ready_made
        assert manager.load_setuptools_entrypoints("g") == 0
        plugins = [plugin for plugin, _ in manager.list_plugin_distinfo()]
        assert plugins == [manager.get_plugin("outer"), ready_made]
        with refused("callback 'strict': plugins_for_tests.Strict(*, limit: int) "):
            manager.load_setuptools_entrypoints("g2", "strict")
