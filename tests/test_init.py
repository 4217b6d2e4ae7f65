import ast
import importlib
import re
from pathlib import Path

import pytest
from plugins_for_tests import run_script

import rayserve_hooks

BUILDERS = {"build_dp_openai_app", "build_openai_app", "build_pd_openai_app"}
NEED_RAY = BUILDERS | {"HooksCallback", "LLMConfig", "SGLangServer", "initialize_node"}
HEAVY = "{'pydantic', 'ray', 'torch', 'vllm'}"
LIGHT = sorted(set(rayserve_hooks.__all__) - NEED_RAY)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, rayserve_hooks;"
        f"print(sorted({{name.partition('.')[0] for name in sys.modules}} & {HEAVY}))"
    )
    assert run_script(code) == "[]"


def test_asking_for_the_names_imports_nothing_at_all() -> None:
    code = (
        "import sys, rayserve_hooks; dir(rayserve_hooks);"
        "print([name for name in sys.modules if name.startswith('rayserve_hooks.')])"
    )
    assert run_script(code) == "[]"


def test_what_needs_no_ray_imports_nothing_heavy() -> None:
    code = (
        f"import sys; from rayserve_hooks import {', '.join(LIGHT)};"
        f"print(sorted({{name.partition('.')[0] for name in sys.modules}} & {HEAVY}))"
    )
    assert run_script(code) == "[]"


def test_the_public_names_are_one_sorted_list() -> None:
    assert rayserve_hooks.__all__ == sorted(set(rayserve_hooks.__all__))


@pytest.mark.parametrize("name", sorted(set(rayserve_hooks._HOMES) - NEED_RAY))
def test_a_name_is_loaded_from_its_home_at_its_first_use(name: str) -> None:
    vars(rayserve_hooks).pop(name, None)
    home = importlib.import_module(f"rayserve_hooks.{rayserve_hooks._HOMES[name]}")
    assert getattr(rayserve_hooks, name) is vars(home)[name]
    assert vars(rayserve_hooks)[name] is vars(home)[name]


@pytest.mark.parametrize("name", sorted(NEED_RAY))
def test_a_name_that_needs_ray_is_defined_in_its_home(name: str) -> None:
    folder = Path(rayserve_hooks.__file__).parent
    home = folder.joinpath(*rayserve_hooks._HOMES[name].split(".")).with_suffix(".py")
    defined = {getattr(node, "name", None) for node in ast.parse(home.read_text()).body}
    assert name in defined


@pytest.mark.parametrize(
    ("name", "hint"),
    [("LLMConfi", "; did you mean 'LLMConfig'?"), ("hookimp", "; did you mean 'hookimpl'?")],
)
def test_a_name_that_is_nearly_one_is_suggested(name: str, hint: str) -> None:
    text = f"^module 'rayserve_hooks' has no attribute {name!r}{re.escape(hint)}$"
    with pytest.raises(AttributeError, match=text):
        getattr(rayserve_hooks, name)


@pytest.mark.parametrize("name", rayserve_hooks.__all__)
def test_dir_shows_every_public_name(name: str) -> None:
    assert name in dir(rayserve_hooks)


@pytest.mark.parametrize("name", rayserve_hooks.__all__)
def test_a_public_name_has_a_home_or_is_there(name: str) -> None:
    assert name in rayserve_hooks._HOMES or name in vars(rayserve_hooks)


def test_type_checkers_find_each_name_in_the_same_home() -> None:
    tree = ast.parse(Path(rayserve_hooks.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"rayserve_hooks.{home}" for name, home in rayserve_hooks._HOMES.items()}
    assert found == homes


def test_an_unknown_name_is_an_attribute_error() -> None:
    text = "^module 'rayserve_hooks' has no attribute 'nope'$"
    with pytest.raises(AttributeError, match=text):
        _ = rayserve_hooks.nope
