"""Watches what `rayserve_hooks.core._pluggy` takes from pluggy's inside."""

import importlib.metadata
from typing import Any

import pluggy
import pytest

from rayserve_hooks.core import _pluggy

hookspec = pluggy.HookspecMarker("watch")
hookimpl = pluggy.HookimplMarker("watch")


class Spec:
    @hookspec
    def step(self, log: list[str]) -> None: ...


class Plain:
    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def step(self, log: list[str]) -> None:
        log.append(self.name)


class Last(Plain):
    @hookimpl(trylast=True)
    def step(self, log: list[str]) -> None:
        log.append(self.name)


class LastWrapper(Plain):
    @hookimpl(trylast=True, wrapper=True)
    def step(self, log: list[str]) -> Any:
        log.append(self.name)
        return (yield)


def manager_of(*plugins: object) -> pluggy.PluginManager:
    manager = pluggy.PluginManager("watch")
    manager.add_hookspecs(Spec)
    for plugin in plugins:
        manager.register(plugin)
    return manager


def run(manager: pluggy.PluginManager) -> list[str]:
    log: list[str] = []
    manager.hook.step(log=log)
    return log


def test_hookimpls_is_the_very_list_that_is_called_from_its_end() -> None:
    manager = manager_of(Plain("a"), Plain("b"))
    assert isinstance(manager.hook.step._hookimpls, list), "pluggy moved HookCaller._hookimpls"
    manager.hook.step._hookimpls.reverse()
    assert run(manager) == ["a", "b"]


def test_pluggy_still_runs_trylast_in_registration_order_and_others_from_the_last() -> None:
    order = run(manager_of(Plain("a"), Plain("b"), Last("y"), Last("z")))
    assert order == ["b", "a", "y", "z"], "pluggy changed its order; see reverse_groups"


def test_a_marked_function_still_holds_its_options() -> None:
    options = _pluggy.impl_options(LastWrapper.step, "watch")
    assert options is not None, "pluggy moved what @hookimpl leaves; see impl_options"
    assert (options["wrapper"], options["trylast"]) == (True, True)


def test_a_function_marked_without_arguments_holds_the_defaults() -> None:
    assert _pluggy.impl_options(Plain.step, "watch") == _pluggy.UNDECORATED, (
        "pluggy has other options now; see UNDECORATED"
    )


@pytest.mark.parametrize("holder", [staticmethod, classmethod])
def test_a_marked_static_or_class_method_still_holds_its_options(holder: Any) -> None:
    marked: Any = hookimpl(tryfirst=True)(holder(lambda log: None))
    options = _pluggy.impl_options(marked, "watch")
    assert options is not None, "pluggy moved what @hookimpl leaves; see impl_options"
    assert options["tryfirst"]


@pytest.mark.parametrize("unmarked", [len, Spec.step, staticmethod(len), None, 3])
def test_what_is_not_marked_has_no_options(unmarked: object) -> None:
    assert _pluggy.impl_options(unmarked, "watch") is None


def test_a_mark_of_another_project_does_not_count() -> None:
    assert _pluggy.impl_options(Plain.step, "other") is None


def test_a_marked_spec_still_holds_its_options() -> None:
    marked: Any = hookspec(firstresult=True)(lambda log: None)
    assert vars(marked).get("watch_spec"), "pluggy moved what @hookspec leaves; see spec_options"
    assert _pluggy.spec_options(marked, "watch")["firstresult"] is True
    assert _pluggy.spec_options(Spec.step, "watch")["firstresult"] is False


def test_a_spec_without_a_mark_is_no_spec_without_options() -> None:
    with pytest.raises(AttributeError, match="watch_spec"):
        _pluggy.spec_options(Plain.step, "watch")


def test_registration_takes_what_the_parser_says_of_a_function_of_the_instance() -> None:
    """What `RegisteredCallback` rests on: its hooks are functions in its ``__dict__``."""

    class Manager(pluggy.PluginManager):
        def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
            return plugin.options if name == "step" else None

    class Holder:
        def __init__(self) -> None:
            self.options = {**_pluggy.UNDECORATED, "trylast": True}
            self.step = lambda log: log.append("called")

    manager = Manager("watch")
    manager.add_hookspecs(Spec)
    holder = Holder()
    manager.register(holder, "holder")
    (impl,) = manager.hook.step.get_hookimpls()
    assert (impl.function, impl.plugin, impl.trylast) == (holder.step, holder, True)
    assert run(manager) == ["called"]


def test_reverse_groups_reverses_that_group_alone() -> None:
    manager = manager_of(Plain("a"), Last("x"), Plain("b"), Last("y"), Last("z"))
    _pluggy.reverse_groups(manager.hook.step, "trylast")
    assert run(manager) == ["b", "a", "z", "y", "x"]


def test_reverse_groups_keeps_wrappers_outside() -> None:
    manager = manager_of(LastWrapper("v"), Last("x"), LastWrapper("w"), Last("y"), Plain("a"))
    _pluggy.reverse_groups(manager.hook.step, "trylast")
    assert run(manager) == ["w", "v", "a", "y", "x"]


def test_reverse_groups_of_none_changes_nothing() -> None:
    manager = manager_of(Plain("a"), Plain("b"))
    _pluggy.reverse_groups(manager.hook.step, "trylast")
    assert run(manager) == ["b", "a"]


def test_registration_asks_the_overridable_parser_for_each_name() -> None:
    class Manager(pluggy.PluginManager):
        asked: list[str] = []  # noqa: RUF012

        def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
            self.asked.append(name)
            return super().parse_hookimpl_opts(plugin, name)

    manager = Manager("watch")
    manager.add_hookspecs(Spec)
    manager.register(Plain("a"))
    assert "step" in manager.asked


def test_a_distribution_that_is_noted_is_the_one_that_pluggy_lists() -> None:
    manager, plugin = pluggy.PluginManager("watch"), Plain("a")
    _pluggy.note_distribution(manager, plugin, importlib.metadata.distribution("pluggy"))
    ((listed, distribution),) = manager.list_plugin_distinfo()
    assert listed is plugin
    assert distribution.project_name == "pluggy", "pluggy moved _plugin_distinfo"


def test_what_marks_a_function_but_is_no_options_does_not_count() -> None:
    def function() -> None: ...

    vars(function)["watch_impl"] = object()
    assert _pluggy.impl_options(function, "watch") is None
