"""From what a config names to the plugin it means."""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import plugins_for_tests
import pytest
from plugins_for_tests import Outer, Plain, Strict, make_manager, one, refused, sent

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.loading import short_names
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError

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


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write an importable module: its name and source."""
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
    """Install a distribution that registers entry points of our group."""
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


def create(callback: object) -> Any:
    return one(callback).create()


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
    assert entry.callback == "fetch_module"
    assert entry.create() is sys.modules["fetch_module"]


def test_a_short_name_is_an_entry_point(
    write_module: WriteModule, install: Callable[[str], None]
) -> None:
    write_module("fetch_module", PLUGIN_SOURCE)
    install("fetch = fetch_module:Fetch")
    assert type(create("fetch")).__name__ == "Fetch"
    assert one("fetch").name == "fetch"


def test_a_callback_that_is_only_on_the_cluster_is_found_there(write_module: WriteModule) -> None:
    stack = sent(CallbackStack.parse([{"callback": "only_there:Fetch", "only_on_cluster": True}]))
    write_module("only_there", PLUGIN_SOURCE)
    ((_, plugin),) = stack.build()
    assert type(plugin).__name__ == "Fetch"


def test_an_installed_callback_that_nobody_names_is_not_imported(
    write_module: WriteModule, install: Callable[[str], None]
) -> None:
    write_module("fetch_module", PLUGIN_SOURCE)
    install("fetch = fetch_module:Fetch")
    create("plugins_for_tests:Plain")
    assert "fetch_module" not in sys.modules


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
        f"name a class, instance or module with at least one of {', '.join(HOOKS)}"
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


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({}, "lacks 'limit'; add it, as in kwargs: {limit: ...}"),
        (
            {"limt": 1},
            (
                "refused kwargs ['limt']: TypeError: got an unexpected keyword argument 'limt'; "
                "did you mean 'limit'?"
            ),
        ),
        (
            {"limit": 1, "zzz": 2},
            (
                "refused kwargs ['limit', 'zzz']: TypeError: got an unexpected keyword argument "
                "'zzz'; use one of limit"
            ),
        ),
        ({"limit": -1}, "refused kwargs ['limit']: ValueError: limit must not be negative"),
    ],
)
def test_a_constructor_that_refuses(kwargs: object, text: str) -> None:
    with refused("callback 'Strict': plugins_for_tests.Strict(*, limit: int) ") as caught:
        create({"callback": Strict, "kwargs": kwargs})
    assert str(caught.value).endswith(f"limit: int) {text}")


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


class OfAnotherInterface:
    def prepare(self) -> None:
        pass


class Adapter:
    def __init__(self, kwargs: Mapping[str, Any]) -> None:
        self.kwargs = kwargs

    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


def adapt(found: object, kwargs: Mapping[str, Any]) -> object | None:
    if isinstance(found, OfAnotherInterface):
        raise CallbackConfigError("is an instance of another interface; name the class")
    if found is not OfAnotherInterface:
        return None
    if "wrong" in kwargs:
        raise CallbackConfigError("kwargs are wrong; correct them")
    return Adapter(kwargs)


def test_a_class_of_another_interface_is_adapted() -> None:
    entry = one({"callback": OfAnotherInterface, "kwargs": {"size": 1}})
    plugin = entry.create(adapt)
    assert isinstance(plugin, Adapter)
    assert plugin.kwargs == {"size": 1}
    assert type(one(Plain).create(adapt)) is Plain


def test_without_an_adapter_it_is_a_class_like_any_other() -> None:
    with refused("callback 'OfAnotherInterface': OfAnotherInterface has no hook; "):
        create(OfAnotherInterface)


def test_what_the_adapter_refuses_names_the_callback() -> None:
    with refused("callback 'mine': kwargs are wrong; correct them"):
        one({"callback": OfAnotherInterface, "name": "mine", "kwargs": {"wrong": 1}}).create(adapt)


def test_an_instance_that_the_adapter_refuses_names_the_callback() -> None:
    with refused("callback 'mine' is an instance of another interface; name the class"):
        one({"callback": OfAnotherInterface(), "name": "mine"}).create(adapt)


def test_an_adapter_travels_with_the_stack() -> None:
    stack = CallbackStack.parse([OfAnotherInterface], adapt=adapt).for_deployment("app")
    ((_, plugin),) = sent(stack).build()
    assert isinstance(plugin, Adapter)


def test_an_instance_named_by_a_string_takes_no_kwargs() -> None:
    with refused(
        "callback 'ready_made': kwargs ['greeting'] given for Plain "
        "'plugins_for_tests:ready_made', which takes none; name a class, or drop kwargs"
    ):
        create({"callback": "plugins_for_tests:ready_made", "kwargs": {"greeting": "hi"}})


class Refuses:
    def __init__(self, hf_token: str) -> None:
        raise CallbackConfigError("no such bucket; name another", f"{hf_token} has expired")

    def on_before_init(self, ctx: CallbackCtx) -> None: ...


def test_what_a_constructor_says_of_its_arguments_stays_whole_but_for_secrets() -> None:
    with pytest.raises(CallbackConfigError) as caught:
        make_manager({"callback": Refuses, "kwargs": {"hf_token": "s3cret-token"}})
    assert caught.value.problems == (
        "callback 'Refuses': no such bucket; name another",
        "callback 'Refuses': *** has expired",
    )
