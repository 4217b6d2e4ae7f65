import pytest
from plugins_for_tests import run_script

import rayserve_hooks

NEED_RAY = {"HooksCallback", "LLMConfig", "initialize_node"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, rayserve_hooks;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'ray', 'torch', 'vllm'}))"
    )
    assert run_script(code) == "[]"


def test_asking_for_the_names_imports_nothing_heavy() -> None:
    code = "import sys, rayserve_hooks; dir(rayserve_hooks); print('ray' in sys.modules)"
    assert run_script(code) == "False"


def test_the_public_names_are_one_sorted_list() -> None:
    assert rayserve_hooks.__all__ == sorted(set(rayserve_hooks.__all__))


@pytest.mark.parametrize("name", sorted(set(rayserve_hooks.__all__) - NEED_RAY))
def test_a_light_name_is_there(name: str) -> None:
    assert name in vars(rayserve_hooks)


@pytest.mark.parametrize("name", rayserve_hooks.__all__)
def test_dir_shows_every_public_name(name: str) -> None:
    assert name in dir(rayserve_hooks)


def test_the_names_that_need_ray_are_named_once_more_where_they_live() -> None:
    assert set(rayserve_hooks._NEEDS_RAY) == NEED_RAY


def test_an_unknown_name_is_an_attribute_error() -> None:
    text = "^module 'rayserve_hooks' has no attribute 'nope'$"
    with pytest.raises(AttributeError, match=text):
        _ = rayserve_hooks.nope
