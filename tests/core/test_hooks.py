"""What follows from the hookspecs."""

from typing import Any

import pytest
from plugins_for_tests import make_manager

from rayserve_hooks.core.hooks import (
    CLEAN_UP,
    FIRST_RESULT,
    HOOK_PARAMETERS,
    HOOKS,
    NEED_ENGINE,
    PHASES,
    RUNS_IN,
    is_inherited_spec,
)
from rayserve_hooks.errors import Phase
from rayserve_hooks.hookspecs import RayServeLLMCallback


def test_the_hooks_in_call_order() -> None:
    assert HOOKS == (
        "on_configure",
        "on_before_init",
        "on_before_download",
        "on_after_init",
        "on_before_engine_init",
        "on_engine_ready",
        "on_shutdown",
        "on_init_failed",
    )


def test_the_first_result_counts_in_the_hooks_that_can_take_over_only() -> None:
    manager = make_manager()
    firstresult = [h for h in HOOKS if getattr(manager.hook, h).spec.opts["firstresult"]]
    assert tuple(firstresult) == FIRST_RESULT == ("on_before_init", "on_before_download")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_takes_the_context_and_the_clean_up_the_error(hook: str) -> None:
    wanted = ("ctx", "error") if hook == CLEAN_UP else ("ctx",)
    assert getattr(make_manager().hook, hook).spec.argnames == wanted
    assert HOOK_PARAMETERS[hook] == wanted


def test_every_hook_has_a_phase() -> None:
    assert tuple(PHASES) == HOOKS


def test_every_hook_runs_somewhere() -> None:
    assert tuple(RUNS_IN) == HOOKS
    assert set(NEED_ENGINE) < set(HOOKS)


def test_phases_of_hooks_are_in_the_order_of_the_hooks() -> None:
    order = list(Phase)
    assert list(PHASES.values()) == sorted(PHASES.values(), key=order.index)


@pytest.mark.parametrize("table", [HOOK_PARAMETERS, PHASES])
def test_what_follows_cannot_be_changed(table: Any) -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        table["on_before_init"] = None


def test_an_inherited_spec_is_told_from_what_overrides_it() -> None:
    class Overrides(RayServeLLMCallback):
        def on_before_init(self, ctx: Any) -> None:
            pass

    assert is_inherited_spec(Overrides.on_after_init)
    assert not is_inherited_spec(Overrides.on_before_init)
