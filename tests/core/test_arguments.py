from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import cloudpickle  # type: ignore[import-untyped]
import pytest
from pydantic import Field

from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.errors import CallbackConfigError


class Warmup:
    @checked_arguments
    def __init__(
        self, prompts: Sequence[str], rounds: Annotated[int, Field(gt=0)] = 1, hf_token: str = ""
    ) -> None:
        self.prompts, self.rounds = prompts, rounds


class Inherits(Warmup):
    pass


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"prompts": "Hi"}, ["(prompts='Hi'): write a list, even of one item"]),
        ({"prompts": ["Hi", 7]}, ["(prompts[1]=7): write a string"]),
        ({"prompts": [], "rounds": 0}, ["(rounds=0): write more than 0"]),
        ({"prompts": [], "hf_token": 12345}, ["(hf_token=***): write a string"]),
        (
            {"promts": []},
            [
                " has no argument 'prompts'; add it",
                " has unknown argument 'promts'; did you mean 'prompts'?",
            ],
        ),
        (
            {"prompts": 7, "rounds": "many"},
            ["(prompts=7): write a list", "(rounds='many'): write a whole number"],
        ),
    ],
)
@pytest.mark.parametrize("cls", [Warmup, Inherits])
def test_all_that_is_wrong_is_reported_together(
    cls: Any, kwargs: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises(CallbackConfigError) as caught:
        cls(**kwargs)
    assert list(caught.value.problems) == [f"{cls.__name__}{text}" for text in texts]


def test_what_fits_is_converted_by_position_and_by_name() -> None:
    assert Warmup(["Hi"], 2).rounds == Warmup(prompts=["Hi"], rounds=2).rounds == 2
    assert Warmup(("Hi",)).rounds == 1


def test_too_many_arguments_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="takes from 2 to 4 positional arguments"):
        Warmup([], 1, "", 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiple values for argument 'prompts'"):
        Warmup([], prompts=[])  # type: ignore[misc]


def test_signature_and_name_stay() -> None:
    assert list(inspect.signature(Warmup).parameters) == ["prompts", "rounds", "hf_token"]
    assert Warmup.__init__.__qualname__ == "Warmup.__init__"


def test_a_class_of_a_notebook_travels_after_its_first_use() -> None:
    """Such a class is pickled by value, its methods' closures included."""
    program = """
        import pickle, sys
        Callback = pickle.load(sys.stdin.buffer)
        assert Callback(3).size == 3
        try:
            Callback("x")
        except ValueError as error:
            print(error)
    """

    class Callback:
        @checked_arguments
        def __init__(self, size: int) -> None:
            self.size = size

    Callback(1)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        data = cloudpickle.dumps(Callback)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    command = [sys.executable, "-c", inspect.cleandoc(program)]
    answer = subprocess.run(command, input=data, capture_output=True, check=True)
    assert answer.stdout.decode() == "Callback(size='x'): write a whole number\n"


@pytest.mark.parametrize(
    "name",
    [
        "compile_cache",
        "custom_initialization",
        "custom_placement_group",
        "download_policy",
        "engine_modules",
        "notify",
        "startup_metrics",
        "startup_timeline",
        "warm_up",
    ],
)
def test_importing_a_callback_builds_no_schema(name: str) -> None:
    program = (
        f"import sys, rayserve_hooks.impls.{name}\n"
        "assert 'pydantic._internal._generate_schema' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
