"""Which hooks a callback has, what is wrong with them, and that nothing of it runs."""

import functools
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
from plugins_for_tests import make_ctx, make_manager, make_stack, one, parse_callbacks, refused
from pydantic import BaseModel, computed_field
from steps import call

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.inspection import hook_functions, hook_problems
from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl


def create(callback: object) -> Any:
    return one(callback).create()


class NoHook:
    pass


class Misspelt:
    def on_befor_init(self, ctx: CallbackCtx) -> None:
        pass


class OneRightOneMisspelt:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass

    def on_after_initt(self, ctx: CallbackCtx) -> None:
        pass


class Default:
    def on_before_init(self, ctx: CallbackCtx | None = None) -> None:
        pass


class NoCtx:
    def on_before_init(self) -> None:
        pass


class OtherName:
    def on_before_init(self, context: CallbackCtx) -> None:
        pass


class Extra:
    def on_before_init(self, ctx: CallbackCtx, node: str) -> None:
        pass


class KeywordOnly:
    def on_before_init(self, *, ctx: CallbackCtx) -> None:
        pass


class Static:
    @staticmethod
    def on_before_init(context: CallbackCtx) -> None:
        pass


class AsyncWrapper:
    @hookimpl(wrapper=True)
    async def on_before_init(self, ctx: CallbackCtx) -> Any:
        yield


class WrapperWithoutYield:
    @hookimpl(wrapper=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


class OldStyle:
    @hookimpl(hookwrapper=True)
    def on_before_init(self, ctx: CallbackCtx) -> Any:
        yield


class NoMethod:
    on_before_init = "fetch"


class Marked:
    @hookimpl
    def prepare(self, ctx: CallbackCtx) -> None:
        pass


class Cached:
    @functools.cache  # noqa: B019
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


class ErrorWithDefault:
    def on_init_failed(self, ctx: CallbackCtx, error: BaseException | None = None) -> None:
        pass


class ErrorAlone:
    def on_init_failed(self, error: BaseException) -> None:
        pass


class ErrorByKeyword:
    def on_init_failed(self, ctx: CallbackCtx, *, error: BaseException) -> None:
        pass


class OtherError:
    def on_init_failed(self, ctx: CallbackCtx, exception: BaseException) -> None:
        pass


class ErrorTooEarly:
    def on_before_init(self, ctx: CallbackCtx, error: BaseException) -> None:
        pass


class StaticCleanUp:
    @staticmethod
    def on_init_failed(error: BaseException) -> None:
        pass


class MisspeltCleanUp:
    def on_init_fail(self, ctx: CallbackCtx) -> None:
        pass


class Generates:
    def on_before_init(self, ctx: CallbackCtx) -> Any:
        yield


class GeneratesAsync:
    @staticmethod
    async def on_before_init(ctx: CallbackCtx) -> Any:
        yield


class FirstAndLast:
    @hookimpl(tryfirst=True, trylast=True)
    def on_before_init(self, ctx: CallbackCtx) -> None: ...


NOTHING = (
    "of which nothing would run; drop its 'yield', or make it a 'def' under @hookimpl(wrapper=True)"
)
HOOK_LIST = ", ".join(HOOKS)
WRITE = "write 'def on_before_init(self, ctx)'"
WRITE_CLEAN_UP = "write 'def on_init_failed(self, ctx, error)'"


@pytest.mark.parametrize(
    ("cls", "problem"),
    [
        (NoHook, f"NoHook has no hook; define at least one of {HOOK_LIST}"),
        (Misspelt, "method 'on_befor_init' is not a hook; did you mean 'on_before_init'?"),
        (
            OneRightOneMisspelt,
            "method 'on_after_initt' is not a hook; did you mean 'on_after_init'?",
        ),
        (Default, f"on_before_init() gives 'ctx' a default, but is always called with it; {WRITE}"),
        (NoCtx, f"on_before_init() has no parameter 'ctx'; {WRITE}"),
        (
            OtherName,
            (
                f"on_before_init() has no parameter 'ctx'; {WRITE}; "
                f"on_before_init() has unknown parameter 'context'; {WRITE}"
            ),
        ),
        (Extra, f"on_before_init() has unknown parameter 'node'; {WRITE}"),
        (
            Static,
            (
                "on_before_init() has no parameter 'ctx'; write 'def on_before_init(ctx)'; "
                "on_before_init() has unknown parameter 'context'; write 'def on_before_init(ctx)'"
            ),
        ),
        (AsyncWrapper, "wrapper on_before_init() must be a 'def' with one 'yield'"),
        (WrapperWithoutYield, "wrapper on_before_init() must be a 'def' with one 'yield'"),
        (OldStyle, "on_before_init() is an old-style hookwrapper; use wrapper=True"),
        (
            NoMethod,
            "'on_before_init' is named after a hook, but is a str; define a method of that name",
        ),
        (
            KeywordOnly,
            f"on_before_init() takes 'ctx' by keyword only, which pluggy cannot; {WRITE}",
        ),
        (
            Cached,
            (
                "'on_before_init' is named after a hook, but is a _lru_cache_wrapper; define a "
                "method of that name"
            ),
        ),
        (
            ErrorWithDefault,
            (
                "on_init_failed() gives 'error' a default, but is always called with it; "
                f"{WRITE_CLEAN_UP}"
            ),
        ),
        (ErrorAlone, f"on_init_failed() has no parameter 'ctx'; {WRITE_CLEAN_UP}"),
        (
            ErrorByKeyword,
            (
                "on_init_failed() takes 'error' by keyword only, which pluggy cannot; "
                f"{WRITE_CLEAN_UP}"
            ),
        ),
        (OtherError, f"on_init_failed() has unknown parameter 'exception'; {WRITE_CLEAN_UP}"),
        (ErrorTooEarly, f"on_before_init() has unknown parameter 'error'; {WRITE}"),
        (
            StaticCleanUp,
            ("on_init_failed() has no parameter 'ctx'; write 'def on_init_failed(ctx, error)'"),
        ),
        (MisspeltCleanUp, "method 'on_init_fail' is not a hook; did you mean 'on_init_failed'?"),
        (Generates, f"on_before_init() is a generator, {NOTHING}"),
        (GeneratesAsync, f"on_before_init() is an async generator, {NOTHING}"),
        (FirstAndLast, "on_before_init() is marked tryfirst and trylast; keep one of them"),
        (Marked, f"'prepare' is marked as a hook; use one of {HOOK_LIST}"),
    ],
)
def test_what_keeps_a_class_from_being_a_callback(cls: type, problem: str) -> None:
    with refused(f"callback {cls.__name__!r}: {problem}") as caught:
        create(cls)
    assert str(caught.value).endswith(problem)


def test_a_clean_up_may_leave_out_the_error() -> None:
    class CleansUp:
        def on_init_failed(self, ctx: CallbackCtx) -> None:
            pass

    assert type(create(CleansUp)) is CleansUp


def test_a_subclass_that_overrides_nothing_has_no_hook() -> None:
    class Nothing(RayServeLLMCallback):
        pass

    with refused("callback 'Nothing': Nothing has no hook; define at least one of "):
        create(Nothing)


def test_a_subclass_registers_only_what_it_overrides() -> None:
    class OnlyAfter(RayServeLLMCallback):
        def on_after_init(self, ctx: CallbackCtx) -> None:
            pass

    only = {"on_after_init": ["OnlyAfter"]}
    assert make_manager(OnlyAfter).run_order() == {hook: only.get(hook, []) for hook in HOOKS}


def test_other_public_methods_are_left_alone() -> None:
    class Busy:
        limit = 3

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

        def on_message(self, text: str) -> None:
            pass

        def helper(self, a: int, b: int = 2) -> None:
            pass

    assert type(create(Busy)) is Busy


def test_a_property_is_not_run_by_the_checks() -> None:
    class Costly:
        @property
        def client(self) -> object:
            raise AssertionError("opened a client")

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    assert type(create(Costly)) is Costly


def test_a_method_may_be_marked_as_a_hook_of_another_name() -> None:
    class Renamed:
        @hookimpl(specname="on_before_init")
        def prepare(self, ctx: CallbackCtx) -> None:
            pass

    assert type(create(Renamed)) is Renamed


def test_a_method_marked_with_another_name_is_that_hook() -> None:
    class Renamed:
        @hookimpl(specname="on_before_init")
        def prepare(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason="renamed")

    ctx = make_ctx()
    assert call(Renamed, ctx=ctx) == Handled(reason="renamed")
    assert (ctx.trace[0].callback, ctx.trace[0].hook) == ("Renamed", "on_before_init")


def test_a_decorated_method_that_keeps_its_signature_is_a_hook() -> None:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    class Retried:
        @decorated
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            return Handled("/m")

    assert create(Retried).on_before_init(make_ctx()) == Handled("/m")


RAN: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_has_run() -> None:
    RAN.clear()


class Watched:
    """Notes all of it that runs."""

    __slots__ = ()

    @property
    def client(self) -> object:
        RAN.append("property")
        raise AssertionError("opened a client")

    @functools.cached_property
    def cached(self) -> object:
        RAN.append("cached_property")
        raise AssertionError("opened a client")

    def __getattr__(self, name: str) -> Any:
        RAN.append(f"__getattr__({name!r})")
        raise AttributeError(name)

    def __dir__(self) -> list[str]:
        RAN.append("__dir__")
        return []

    def __eq__(self, other: object) -> bool:
        RAN.append("__eq__")
        return True

    def __hash__(self) -> int:
        RAN.append("__hash__")
        return 0

    def __bool__(self) -> bool:
        RAN.append("__bool__")
        return False

    def __len__(self) -> int:
        RAN.append("__len__")
        return 0

    def __repr__(self) -> str:
        RAN.append("__repr__")
        return ""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


class WatchedPlain(Watched):
    pass


class WatchedSlots(Watched):
    __slots__ = ("path",)


@dataclass(eq=False, repr=False)
class WatchedDataclass(Watched):
    size: int = 1


class WatchedModel(BaseModel):
    size: int = 1

    @property
    def client(self) -> object:
        RAN.append("property")
        raise AssertionError("opened a client")

    @functools.cached_property
    def cached(self) -> object:
        RAN.append("cached_property")
        raise AssertionError("opened a client")

    @computed_field  # type: ignore[prop-decorator] # mypy knows no decorated property
    @property
    def computed(self) -> int:
        RAN.append("computed_field")
        raise AssertionError("computed")

    def __getattr__(self, name: str) -> Any:
        RAN.append(f"__getattr__({name!r})")
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        RAN.append("__eq__")
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        RAN.append("__repr__")
        return ""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


@pytest.mark.parametrize("cls", [WatchedPlain, WatchedSlots, WatchedDataclass, WatchedModel])
@pytest.mark.parametrize("how", ["class", "instance"])
def test_nothing_of_a_callback_runs_when_a_config_is_made_and_a_manager_is_built(
    cls: type, how: str
) -> None:
    instances = [cls() for _ in range(2)]
    RAN.clear()
    targets = [cls, cls] if how == "class" else instances
    stack = [{"callback": target, "name": name} for target, name in zip(targets, "ab", strict=True)]
    for entry in parse_callbacks(stack):
        assert hook_problems(entry.create()) == []
    assert make_manager(*stack).run_order()["on_before_init"] == ["a", "b"]
    assert RAN == []


@pytest.mark.parametrize("cls", [WatchedPlain, WatchedSlots, WatchedDataclass, WatchedModel])
def test_no_property_of_an_instance_runs_when_it_is_pickled_for_its_journey(cls: type) -> None:
    stack = make_stack(cls())
    stack.freeze(pickle.dumps)
    # Pickle itself asks for special methods and slots that are not there, which __getattr__ sees.
    assert [ran for ran in RAN if not ran.startswith("__getattr__(")] == []


def test_nothing_of_a_callback_runs_when_it_is_looked_up() -> None:
    manager, callback, other = make_manager(), WatchedPlain(), WatchedPlain()
    manager.register(callback, "a")
    assert manager.get_name(callback) == "a"
    assert manager.get_name(other) is None
    assert manager.is_registered(callback)
    assert not manager.is_registered(other)
    assert manager.get_hookcallers(callback) == [manager.hook.on_before_init]
    assert manager.get_hookcallers(other) is None
    assert manager.subset_hook_caller("on_before_init", [callback, other]).get_hookimpls() == []
    assert manager.unregister(callback) is callback
    assert RAN == []


def test_a_property_named_as_a_hook_is_refused_without_running_it() -> None:
    class Lazy:
        @property
        def on_before_init(self) -> object:
            raise AssertionError("opened a client")

        @functools.cached_property
        def on_after_init(self) -> object:
            raise AssertionError("opened a client")

    with refused(
        "callback 'Lazy': 'on_after_init' is named after a hook, but is a cached_property; define "
        "a method of that name; 'on_before_init' is named after a hook, but is a property; define "
        "a method of that name"
    ):
        create(Lazy)


def test_a_proxy_among_the_attributes_is_not_asked_what_it_stands_for() -> None:
    class Proxy:
        @property  # type: ignore[misc] # which a proxy does all the same
        def __class__(self) -> Any:
            raise AssertionError("connected")

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("connected")

    class Slots:
        __slots__ = ("on_after_init",)

        def __init__(self) -> None:
            self.on_after_init = Proxy()

    class Holds:
        client = Proxy()

        def __init__(self) -> None:
            self.own = Proxy()

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    assert hook_problems(Holds()) == []
    (problem,) = hook_problems(Slots())
    assert problem.startswith("'on_after_init' is named after a hook, but is a member_descriptor; ")


def test_a_mock_among_the_functions_is_marked_as_nothing() -> None:
    def helper() -> None: ...

    vars(helper)["rayserve_hooks_impl"] = mock.MagicMock()

    class Holds:
        help = staticmethod(helper)

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    assert [hook.attribute for hook in hook_functions(Holds())] == ["on_before_init"]


def test_a_module_is_looked_at_without_running_it() -> None:
    module = types.ModuleType("watched_module")

    def runs(*args: object) -> Any:
        raise AssertionError("ran")

    def on_before_init(ctx: CallbackCtx) -> None:
        pass

    vars(module).update(__getattr__=runs, __dir__=runs, on_before_init=on_before_init)
    assert [hook.attribute for hook in hook_functions(module)] == ["on_before_init"]
    assert hook_problems(module) == []


def first(self: object, ctx: CallbackCtx) -> Handled:
    return Handled(reason="first")


class Above:
    """Options above ``@staticmethod`` and ``@classmethod``."""

    @hookimpl(trylast=True)
    @staticmethod
    def on_before_init(ctx: CallbackCtx) -> Handled:
        return Handled(reason="static")

    @hookimpl(tryfirst=True)
    @classmethod
    def on_before_download(cls, ctx: CallbackCtx) -> Handled:
        return Handled(reason=cls.__name__)


class Below:
    """Options below them."""

    @staticmethod
    @hookimpl(trylast=True)
    def on_before_init(ctx: CallbackCtx) -> Handled:
        return Handled(reason="static")

    @classmethod
    @hookimpl(tryfirst=True)
    def on_before_download(cls, ctx: CallbackCtx) -> Handled:
        return Handled(reason=cls.__name__)


@pytest.mark.parametrize("cls", [Above, Below])
def test_options_of_static_and_class_methods_count_above_and_below(cls: type) -> None:
    options = {hook.attribute: hook.options for hook in hook_functions(cls())}
    assert options["on_before_init"]["trylast"]
    assert options["on_before_download"]["tryfirst"]
    assert call(cls) == Handled(reason="static")
    assert call(cls, hook="on_before_download") == Handled(reason=cls.__name__)
    other = {"callback": type("Other", (), {"on_before_init": first}), "name": "other"}
    assert make_manager(cls, other).run_order()["on_before_init"] == ["other", cls.__name__]


def test_a_function_set_on_the_instance_is_a_hook_without_self() -> None:
    class Sets:
        def __init__(self) -> None:
            self.on_before_init = self.prepare
            self.on_after_init = lambda ctx: None

        def prepare(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason="bound")

    assert call(Sets) == Handled(reason="bound")
    assert call(Sets, hook="on_after_init") == []


def test_a_function_in_a_slot_is_a_hook() -> None:
    class Slots:
        __slots__ = ("on_after_init", "on_before_init")

        def __init__(self) -> None:
            self.on_before_init = lambda ctx: Handled(reason="slot")

    hooks = [hook.attribute for hook in hook_functions(Slots())]
    assert hooks == ["on_before_init"]


def test_a_hook_of_a_base_class_counts_and_the_last_definition_wins() -> None:
    class Base:
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason="base")

    class Derived(Base):
        @hookimpl(trylast=True)
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            return Handled(reason=f"derived of {super().on_before_init(ctx).reason}")

    (found,) = hook_functions(Derived())
    assert found.options["trylast"]
    assert call(Derived) == Handled(reason="derived of base")


def test_a_class_that_is_registered_itself_has_its_static_hooks() -> None:
    assert [hook.attribute for hook in hook_functions(Above)] == [
        "on_before_download",
        "on_before_init",
    ]


def test_a_class_with_slots_can_be_looked_at_before_it_is_built() -> None:
    class Slotted:
        __slots__ = ("on_after_init", "size")

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    assert [function.hook for function in hook_functions(Slotted)] == ["on_before_init"]
