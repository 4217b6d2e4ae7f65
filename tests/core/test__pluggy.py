"""Watches what `rayserve_hooks.core._pluggy` takes from pluggy's inside."""

from collections.abc import Callable
from typing import Any

import pluggy

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


def test_a_replaced_function_is_the_one_called() -> None:
    manager = manager_of(Plain("a"))
    (impl,) = manager.hook.step.get_hookimpls()
    original: Callable[..., object] = impl.function

    def twice(log: list[str]) -> None:
        original(log)
        original(log)

    _pluggy.replace_function(impl, twice)
    assert run(manager) == ["a", "a"]


def test_a_replaced_function_keeps_the_arguments_of_the_original() -> None:
    manager = manager_of(Plain("a"))
    (impl,) = manager.hook.step.get_hookimpls()
    seen: list[object] = []
    _pluggy.replace_function(impl, lambda *args: seen.extend(args))
    assert run(manager) == []
    assert seen == [[]]


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
