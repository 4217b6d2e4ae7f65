import inspect
import re

import pytest
from plugins_for_tests import make_manager

from rayserve_hooks.core.hooks import CLEAN_UP, FIRST_RESULT, HOOK_PARAMETERS, HOOKS, PHASES
from rayserve_hooks.hookspecs import RayServeLLMCallback

SECTIONS = ["When", "Where", "Not for", "Parameters", "Returns", "Failure", "Since"]


def doc_of(hook: str) -> str:
    doc = inspect.getdoc(getattr(RayServeLLMCallback, hook))
    assert doc
    return doc


def test_the_core_hooks_in_call_order() -> None:
    assert HOOKS == ("on_before_init", "on_before_download", "on_after_init", "on_init_failed")


@pytest.mark.parametrize("hook", HOOKS)
def test_a_docstring_has_the_same_sections_in_the_same_order(hook: str) -> None:
    assert re.findall(r"^([A-Z][a-z ]*):", doc_of(hook), re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("hook", HOOKS)
def test_a_docstring_starts_with_a_one_line_purpose(hook: str) -> None:
    purpose, blank, *_ = doc_of(hook).splitlines()
    assert purpose.endswith(".")
    assert blank == ""


@pytest.mark.parametrize("hook", HOOKS)
def test_every_parameter_is_documented(hook: str) -> None:
    parameters = doc_of(hook).partition("Parameters:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+):", parameters, re.MULTILINE)
    signature = inspect.signature(getattr(RayServeLLMCallback, hook))
    assert ["self", *documented] == list(signature.parameters)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_docstring_explains_none_and_refuses_the_rest(hook: str) -> None:
    returns = doc_of(hook).partition("Returns:\n")[2].partition("\n\n")[0]
    assert "``None``:" in returns
    assert re.search(r"Anything else.* is an error", returns, re.DOTALL)


@pytest.mark.parametrize("hook", HOOKS)
def test_since_names_a_version(hook: str) -> None:
    assert re.search(r"^Since: \d+\.\d+$", doc_of(hook), re.MULTILINE)


def test_the_first_result_counts_in_the_first_two_hooks_only() -> None:
    manager = make_manager()
    firstresult = [getattr(manager.hook, hook).spec.opts["firstresult"] for hook in HOOKS]
    assert firstresult == [True, True, False, False]
    assert HOOKS[:2] == FIRST_RESULT


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_takes_the_context_and_the_clean_up_the_error(hook: str) -> None:
    wanted = ("ctx", "error") if hook == CLEAN_UP else ("ctx",)
    assert getattr(make_manager().hook, hook).spec.argnames == wanted
    assert HOOK_PARAMETERS[hook] == wanted


def test_every_hook_has_a_phase() -> None:
    assert tuple(PHASES) == HOOKS
