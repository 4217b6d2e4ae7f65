import functools
import importlib
import pickle
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import plugins_for_tests
import pytest
from plugins_for_tests import Outer, Plain, Strict, make_ctx

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.loading import CallbackEntry, parse_callbacks, short_names
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl

WriteModule = Callable[[str, str], None]

PLUGIN_SOURCE = """
class Fetch:
    def on_before_init(self, ctx):
        pass
"""
HOOK_SOURCE = """
def on_before_init(ctx):
    ctx.custom_data["module"] = __name__
"""


def one(callback: object) -> CallbackEntry:
    (entry,) = parse_callbacks([callback])
    return entry


def create(callback: object) -> Any:
    return one(callback).create()


def refused(text: str) -> Any:
    return pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}")


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name: str, source: str) -> None:
        *parents, last = name.split(".")
        folder = tmp_path.joinpath(*parents)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(len(parents)):
            tmp_path.joinpath(*parents[: i + 1], "__init__.py").touch()
        (folder / f"{last}.py").write_text(source)
        importlib.invalidate_caches()
        written.append(name)

    yield write
    for name in written:
        for loaded in [m for m in sys.modules if f"{m}.".startswith(name.partition(".")[0] + ".")]:
            del sys.modules[loaded]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make a distribution that registers entry points of our group."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(lines: str) -> None:
        info = tmp_path / "fetchers-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fetchers\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rayserve_hooks]\n{lines}\n")
        importlib.invalidate_caches()
        short_names.cache_clear()

    yield write
    monkeypatch.undo()
    short_names.cache_clear()


@pytest.mark.parametrize("target", ["plugins_for_tests:Plain", "plugins_for_tests.Plain", Plain])
def test_a_class_is_built(target: object) -> None:
    assert type(create(target)) is Plain
    assert one(target).name == "Plain"


@pytest.mark.parametrize("target", ["plugins_for_tests:Outer.Inner", Outer.Inner])
def test_a_nested_class_is_built(target: object) -> None:
    assert type(create(target)) is Outer.Inner
    assert one(target).name == "Inner"


@pytest.mark.parametrize("target", ["plugins_for_tests:ready_made", "plugins_for_tests.ready_made"])
def test_a_string_may_name_an_instance(target: str) -> None:
    assert create(target) is plugins_for_tests.ready_made
    assert one(target).name == "ready_made"


def test_an_instance_is_taken_as_it_is() -> None:
    instance = Plain("mine")
    assert create(instance) is instance
    assert one(instance).name == "Plain"


def test_a_module_may_be_named(write_module: WriteModule) -> None:
    write_module("fetch_module", HOOK_SOURCE)
    assert create("fetch_module") is sys.modules["fetch_module"]
    assert one("fetch_module").name == "fetch_module"


@pytest.mark.parametrize("target", ["fetch_package.deep.fetch", "fetch_package.deep:fetch"])
def test_a_submodule_may_be_named(target: str, write_module: WriteModule) -> None:
    write_module("fetch_package.deep.fetch", HOOK_SOURCE)
    if ":" in target:
        importlib.import_module("fetch_package.deep.fetch")
    assert create(target) is sys.modules["fetch_package.deep.fetch"]
    assert one(target).name == "fetch"


def test_a_submodule_is_found_beside_attributes_of_its_package(write_module: WriteModule) -> None:
    write_module("fetch_package.__init__", PLUGIN_SOURCE)
    write_module("fetch_package.fetch", HOOK_SOURCE)
    assert create("fetch_package.fetch") is sys.modules["fetch_package.fetch"]
    assert type(create("fetch_package.Fetch")).__name__ == "Fetch"


def test_a_module_object_travels_by_name(write_module: WriteModule) -> None:
    write_module("fetch_module", HOOK_SOURCE)
    entry = one(importlib.import_module("fetch_module"))
    assert entry.target == "fetch_module"
    assert entry.create() is sys.modules["fetch_module"]


def test_a_mapping_gives_kwargs_name_and_on_error() -> None:
    entry = one(
        {
            "callback": "plugins_for_tests:Plain",
            "kwargs": {"greeting": "hi"},
            "name": "greeter",
            "on_error": "warn",
        }
    )
    assert (entry.name, entry.on_error) == ("greeter", "warn")
    plugin = entry.create()
    assert isinstance(plugin, Plain)
    assert plugin.greeting == "hi"


def test_a_mapping_needs_no_more_than_the_callback() -> None:
    entry = one({"callback": Plain})
    assert (entry.name, entry.on_error, entry.kwargs) == ("Plain", None, {})


@pytest.mark.parametrize("empty", [None, {}])
def test_kwargs_may_be_left_empty_in_yaml(empty: object) -> None:
    assert one({"callback": Plain, "kwargs": empty}).kwargs == {}


def test_a_short_name_is_an_entry_point(
    write_module: WriteModule, install: Callable[[str], None]
) -> None:
    write_module("fetch_module", PLUGIN_SOURCE)
    install("fetch = fetch_module:Fetch")
    assert type(create("fetch")).__name__ == "Fetch"
    assert one("fetch").name == "fetch"


def test_an_installed_callback_that_nobody_names_is_not_imported(
    write_module: WriteModule, install: Callable[[str], None]
) -> None:
    write_module("fetch_module", PLUGIN_SOURCE)
    install("fetch = fetch_module:Fetch")
    create("plugins_for_tests:Plain")
    assert "fetch_module" not in sys.modules


def test_one_callback_needs_no_list() -> None:
    assert [entry.name for entry in parse_callbacks("plugins_for_tests:Plain")] == ["Plain"]
    assert [entry.name for entry in parse_callbacks({"callback": Plain})] == ["Plain"]


def test_entries_are_taken_as_they_are() -> None:
    entry = one(Plain)
    assert parse_callbacks((entry,)) == (entry,)


def test_the_same_class_may_be_stacked_twice_under_two_names() -> None:
    entries = parse_callbacks([Plain, {"callback": Plain, "name": "again"}])
    assert [entry.name for entry in entries] == ["Plain", "again"]


@pytest.mark.parametrize("target", ["no_such_module:Fetch", "no_such_module.Fetch"])
def test_an_unknown_module(target: str) -> None:
    text = (
        f"callback {target!r}: no module named 'no_such_module' and no such short name; write "
        "'pkg.module:Class' of a module that can be imported here, or a short name (known: "
    )
    with refused(text):
        create(target)


def test_an_unknown_submodule_names_the_part_that_is_missing() -> None:
    with refused("callback 'json.nope:Fetch': no module named 'json.nope' and no such short name"):
        create("json.nope:Fetch")


def test_a_misspelt_short_name(install: Callable[[str], None]) -> None:
    install("fetch_weights = fetch_module:Fetch")
    text = (
        "callback 'fetch_weight': no module named 'fetch_weight' and no such short name; "
        "did you mean 'fetch_weights'?; write "
    )
    with refused(text) as caught:
        create("fetch_weight")
    assert re.search(r"\(known: .*\bfetch_weights\b.*\)$", str(caught.value))


@pytest.mark.parametrize("target", ["plugins_for_tests:Plian", "plugins_for_tests.Plian"])
def test_a_misspelt_class(target: str) -> None:
    text = (
        f"callback {target!r}: module 'plugins_for_tests' has no 'Plian'; did you mean 'Plain'?; "
        "name a class, instance or module with at least one of on_before_init, "
        "on_before_download, on_after_init, on_init_failed"
    )
    with refused(text):
        create(target)


def test_a_misspelt_nested_class() -> None:
    text = (
        "callback 'plugins_for_tests:Outer.Iner': module 'plugins_for_tests' has no "
        "'Outer.Iner'; did you mean 'Inner'?; "
    )
    with refused(text):
        create("plugins_for_tests:Outer.Iner")


def test_a_module_that_fails_shows_its_own_error(write_module: WriteModule) -> None:
    write_module("fetch_module", "raise RuntimeError('no GPU here')")
    text = (
        "callback 'fetch_module:Fetch': importing module 'fetch_module' failed: "
        "RuntimeError: no GPU here"
    )
    with refused(text) as caught:
        create("fetch_module:Fetch")
    assert type(caught.value.__cause__) is RuntimeError


def test_a_module_that_misses_another_is_not_called_missing(write_module: WriteModule) -> None:
    write_module("fetch_module", "import absent_dependency")
    text = (
        "callback 'fetch_module:Fetch': importing module 'fetch_module' failed: "
        "ModuleNotFoundError: No module named 'absent_dependency'"
    )
    with refused(text):
        create("fetch_module:Fetch")


def test_a_package_that_misses_a_module_of_its_own(write_module: WriteModule) -> None:
    write_module("fetch_package.fetch", "import fetch_package.absent")
    with refused(
        "callback 'fetch_package.fetch:Fetch': importing module 'fetch_package.fetch' failed: "
        "ModuleNotFoundError: No module named 'fetch_package.absent'"
    ):
        create("fetch_package.fetch:Fetch")


def test_a_short_name_that_cannot_be_loaded(
    write_module: WriteModule, install: Callable[[str], None]
) -> None:
    write_module("fetch_module", "import absent_dependency")
    install("fetch = fetch_module:Fetch")
    text = (
        "callback 'fetch': its entry point 'fetch_module:Fetch' cannot be loaded: "
        "ModuleNotFoundError: No module named 'absent_dependency'"
    )
    with refused(text):
        create("fetch")


@pytest.mark.parametrize("item", [True, False, None, 3, 1.5, b"plugins_for_tests:Plain"])
def test_an_item_that_names_nothing(item: object) -> None:
    text = (
        f"callbacks[1] is {item!r}; write a string such as 'pkg.module:Class', a class, an "
        "instance, a module, or a mapping with 'callback'"
    )
    with refused(text):
        parse_callbacks([Plain, item])


def test_none_is_no_list() -> None:
    with refused("callbacks[0] is None; write a string such as"):
        parse_callbacks(None)


def test_an_unknown_key() -> None:
    text = (
        "callbacks[0] has unknown key 'kwarg'; did you mean 'kwargs'?; "
        "known keys: callback, kwargs, name, on_error, only_on_cluster"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain, "kwarg": {}}])


@pytest.mark.parametrize("item", [{}, {"kwargs": {}}, {"callback": None}])
def test_a_mapping_without_a_callback(item: object) -> None:
    with refused("callbacks[0] names no callback; add 'callback: pkg.module:Class'"):
        parse_callbacks([item])


def test_kwargs_that_are_no_mapping() -> None:
    with refused("callbacks[0]: kwargs is list; write a mapping of argument names"):
        parse_callbacks([{"callback": Plain, "kwargs": ["greeting"]}])


@pytest.mark.parametrize("wrong", ["ignore", "", False, ["warn"]])
def test_a_wrong_on_error(wrong: object) -> None:
    with refused(f"callbacks[0]: on_error is {wrong!r}; use one of raise, warn"):
        parse_callbacks([{"callback": Plain, "on_error": wrong}])


@pytest.mark.parametrize("wrong", ["", 7, ["a"], True])
def test_a_wrong_name(wrong: object) -> None:
    with refused(f"callbacks[0]: name is {wrong!r}; write a string"):
        parse_callbacks([{"callback": Plain, "name": wrong}])


@pytest.mark.parametrize("wrong", [True, 3, b"plugins_for_tests:Plain"])
def test_a_mapping_whose_callback_names_nothing(wrong: object) -> None:
    text = (
        f"callbacks[0]: callback is {wrong!r}; write a string such as 'pkg.module:Class', a "
        "class, an instance or a module"
    )
    with refused(text):
        parse_callbacks([{"callback": wrong}])


ABSENT = {"callback": "only_there:Fetch", "only_on_cluster": True}


def test_a_callback_that_is_only_on_the_cluster_is_not_imported_to_check_it() -> None:
    entry = one(ABSENT)
    entry.check()
    assert (entry.name, entry.only_on_cluster) == ("Fetch", True)


def test_a_callback_that_is_only_on_the_cluster_is_found_there(write_module: WriteModule) -> None:
    entry = sent(one(ABSENT))
    write_module("only_there", PLUGIN_SOURCE)
    assert type(entry.create()).__name__ == "Fetch"


def test_what_is_wrong_with_it_is_found_there() -> None:
    with refused("callback 'only_there:Fetch': no module named 'only_there'"):
        create(ABSENT)


def test_without_it_a_callback_is_checked() -> None:
    with refused("callback 'only_there:Fetch': no module named 'only_there'"):
        one({**ABSENT, "only_on_cluster": False}).check()


@pytest.mark.parametrize("wrong", ["true", 1, None])
def test_only_on_cluster_is_a_yes_or_no(wrong: object) -> None:
    text = (
        f"callbacks[0]: only_on_cluster is {wrong!r} for callback 'only_there:Fetch'; write true, "
        "and name the callback by a string"
    )
    with refused(text):
        parse_callbacks([{**ABSENT, "only_on_cluster": wrong}])


def test_what_is_here_is_not_only_on_the_cluster() -> None:
    text = (
        f"callbacks[0]: only_on_cluster is True for callback {Plain!r}; write true, and name the "
        "callback by a string"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain, "only_on_cluster": True}])


def test_a_problem_of_the_list_comes_with_those_of_its_callbacks() -> None:
    with pytest.raises(CallbackConfigError) as caught:
        parse_callbacks([None, "no_such_module:Other", ABSENT])
    first, second = caught.value.problems
    assert first.startswith("callbacks[0] is None")
    assert second.startswith("callback 'no_such_module:Other': no module named")


def test_the_same_name_twice() -> None:
    text = (
        "callbacks has more than one callback named 'Plain'; give each its own name: "
        "{callback: ..., name: ...}"
    )
    with refused(text):
        parse_callbacks([Plain, "plugins_for_tests:Plain"])


def test_messages_name_the_config_field() -> None:
    with refused("my_list[0] is None"):
        parse_callbacks([None], "my_list")


@pytest.mark.parametrize(
    ("kwargs", "keys", "reason"),
    [
        ({}, [], "missing 1 required keyword-only argument: 'limit'"),
        ({"limt": 1}, ["limt"], "got an unexpected keyword argument 'limt'"),
        ({"limit": -1}, ["limit"], "ValueError: limit must not be negative"),
    ],
)
def test_a_constructor_that_refuses(kwargs: object, keys: list[str], reason: str) -> None:
    with refused("callback 'Strict': plugins_for_tests.Strict(*, limit: int)") as caught:
        create({"callback": Strict, "kwargs": kwargs})
    assert f" refused kwargs {keys}: " in str(caught.value)
    assert str(caught.value).endswith(reason)
    assert isinstance(caught.value.__cause__, (TypeError, ValueError))


def secret_refusal(kwargs: dict[str, Any]) -> CallbackConfigError:
    class Refuses:
        def __init__(self, **kwargs: Any) -> None:
            raise ValueError(f"cannot use {kwargs}")

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    with pytest.raises(CallbackConfigError) as caught:
        create({"callback": Refuses, "kwargs": kwargs})
    return caught.value


def test_a_constructor_that_shows_a_secret() -> None:
    error = secret_refusal({"hf_token": "s3cret", "size": 1})
    assert str(error).endswith(
        "refused kwargs ['hf_token', 'size']: ValueError: cannot use {'hf_token': '***', 'size': 1}"
    )
    assert "s3cret" not in "".join(traceback.format_exception(error))


def test_a_constructor_that_shows_no_secret_is_the_cause() -> None:
    assert type(secret_refusal({"size": 1}).__cause__) is ValueError


def test_kwargs_for_an_instance() -> None:
    text = (
        "callback 'Plain': kwargs ['greeting'] given for an instance, which is already built; "
        "pass the class instead, or drop kwargs"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain(), "kwargs": {"greeting": "hi"}}])


@pytest.mark.parametrize("as_object", [True, False])
def test_kwargs_for_a_module(write_module: WriteModule, as_object: bool) -> None:
    write_module("fetch_module", HOOK_SOURCE)
    target = importlib.import_module("fetch_module") if as_object else "fetch_module"
    text = (
        "callback 'fetch_module': kwargs ['a'] given for module 'fetch_module', which takes none; "
        "name a class, or drop kwargs"
    )
    with refused(text):
        create({"callback": target, "kwargs": {"a": 1}})


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


HOOK_LIST = "on_before_init, on_before_download, on_after_init, on_init_failed"
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
        (Default, f"on_before_init() gives 'ctx' a default and would never get it; {WRITE}"),
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
            (f"on_init_failed() gives 'error' a default and would never get it; {WRITE_CLEAN_UP}"),
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


def test_a_protocol_subclass_that_overrides_nothing_has_no_hook() -> None:
    class Nothing(RayServeLLMCallback):
        pass

    with refused("callback 'Nothing': Nothing has no hook; define at least one of "):
        create(Nothing)


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


class Streaming:
    def __init__(self) -> None:
        self.stream: Any = None

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.stream = (number for number in range(1))


def sent(entry: CallbackEntry) -> CallbackEntry:
    copy = pickle.loads(pickle.dumps(entry))
    assert isinstance(copy, CallbackEntry)
    return copy


def test_freeze_refuses_an_instance_that_holds_a_stream() -> None:
    instance = Streaming()
    instance.stream = (number for number in range(1))
    with refused(
        "callback 'Streaming' cannot be sent to another process: TypeError: its attribute "
        "'stream', a generator, cannot: cannot pickle 'generator' object; and it cannot be made "
        "again there: Streaming() does not make it; name the class with kwargs instead of an "
        "instance, and open clients in its hooks"
    ):
        one(instance).freeze()


def test_freeze_refuses_kwargs_that_hold_a_stream() -> None:
    with refused("callback 'Plain' cannot be sent to another process: TypeError: cannot pickle"):
        one({"callback": Plain, "kwargs": {"greeting": (number for number in range(1))}}).freeze()


def test_an_instance_travels_as_it_was_configured() -> None:
    instance = Streaming()
    entry = one(instance)
    entry.freeze()
    instance.on_before_init(make_ctx())
    copy = sent(entry).create()
    assert isinstance(copy, Streaming)
    assert copy.stream is None
    assert entry.create() is instance


class FailsToLoad(Plain):
    def __setstate__(self, state: object) -> None:
        raise RuntimeError("no GPU here")


def test_an_instance_that_cannot_be_built_again() -> None:
    text = (
        "callback 'FailsToLoad': the instance cannot be built again in this process: "
        "RuntimeError: no GPU here; name the class with kwargs instead"
    )
    with refused(text) as caught:
        sent(one(FailsToLoad())).create()
    assert type(caught.value.__cause__) is RuntimeError


def test_an_instance_travels_with_the_lock_it_holds() -> None:
    instance = Plain()
    instance.lock = threading.Lock()  # type: ignore[attr-defined]
    with instance.lock:  # type: ignore[attr-defined]
        copy: Any = sent(one(instance)).create()
    assert copy.lock.acquire(blocking=False)


def test_an_instance_travels_with_the_client_it_opened() -> None:
    class Mirror:
        def __init__(self, bucket: str) -> None:
            self.bucket = bucket
            self.client = httpx.Client(base_url=f"http://{bucket}.test")

        def on_before_init(self, ctx: CallbackCtx) -> None: ...

    instance = Mirror("weights")
    copy: Any = sent(one(instance)).create()
    assert copy is not instance
    assert (copy.bucket, copy.client.base_url) == ("weights", "http://weights.test")


def test_an_instance_is_unpickled_once_in_a_process() -> None:
    copy = sent(one(Plain("mine")))
    assert copy.create() is copy.create()


def test_a_class_travels_with_its_kwargs_and_is_built_there() -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": "hi"}, "name": "a", "on_error": "warn"})
    copy = sent(entry)
    assert (copy.name, copy.on_error) == ("a", "warn")
    plugin = copy.create()
    assert isinstance(plugin, Plain)
    assert plugin.greeting == "hi"


@pytest.mark.parametrize(
    "callback",
    [Plain, "plugins_for_tests:Plain", Plain("mine"), {"callback": Plain, "kwargs": {"a": [1]}}],
)
def test_the_key_is_the_same_in_another_process(callback: object) -> None:
    entry = one(callback)
    assert sent(entry).key == entry.key


def test_two_lists_with_the_same_instance_ask_for_the_same_plugin() -> None:
    instance = Plain()
    assert one(instance).key == one(instance).key


@pytest.mark.parametrize(
    "other",
    [
        Strict,
        {"callback": Plain, "kwargs": {"greeting": "hi"}},
        {"callback": Plain, "name": "other"},
        {"callback": Plain, "on_error": "warn"},
        Plain(),
    ],
)
def test_entries_that_differ_have_different_keys(other: object) -> None:
    assert one(other).key != one(Plain).key


@pytest.mark.parametrize("value", [{(1, 2): "a"}, {1: "a", "b": 2}, {1, 2}, object()])
def test_kwargs_of_any_kind_have_a_key(value: object) -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": value}})
    assert entry.key == entry.key
    assert hash(entry.key)


def test_repr_names_kwargs_and_hides_their_values() -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": "s3cret"}, "name": "mine"})
    assert repr(entry) == (
        "<callback 'mine': <class 'plugins_for_tests.Plain'> kwargs=['greeting']>"
    )


def test_repr_of_a_named_callback_shows_the_name_as_written() -> None:
    entry = one("plugins_for_tests:Plain")
    assert repr(entry) == "<callback 'Plain': plugins_for_tests:Plain>"


def test_repr_of_an_instance_does_not_call_its_own() -> None:
    @dataclass
    class Holder:
        token: str

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    assert repr(one(Holder("s3cret"))) == "<callback 'Holder': instance of Holder>"


def test_a_class_defined_anew_under_the_same_name_is_another_callback() -> None:
    def define() -> type:
        class Redefined:
            def on_before_init(self, ctx: Any) -> None: ...

        return Redefined

    first, second = define(), define()
    assert CallbackEntry(first).key == CallbackEntry(first).key
    assert CallbackEntry(first).key != CallbackEntry(second).key
