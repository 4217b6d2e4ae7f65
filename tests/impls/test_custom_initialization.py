import re
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks import Finding, Handled
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.custom_initialization import CustomInitialization
from rayserve_hooks.testing import RunStack


def at(folder: Path, **arguments: Any) -> dict[str, Any]:
    return {
        "callback": CustomInitialization,
        "kwargs": {"model_path": str(folder), **arguments},
    }


def test_it_takes_over_with_its_own_model(run_stack: RunStack, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    outcome = run_stack(at(tmp_path), nodes=2).assert_succeeded()
    assert outcome.ctx is not None
    assert outcome.ctx.handled == Handled(str(tmp_path), f"model is at {tmp_path}")
    assert outcome.model_path == str(tmp_path)
    assert not outcome.nodes


def test_a_missing_file_is_named_with_the_node(run_stack: RunStack, tmp_path: Path) -> None:
    outcome = run_stack(at(tmp_path, required_files=["config.json", "model.safetensors"]))
    error = outcome.assert_failed(
        r"on node node-1 \(10.0.0.1\) has no config.json, model.safetensors; mount the folder"
    )
    assert isinstance(error.__cause__, FileNotFoundError)


def test_its_doctor_says_before_whether_the_model_is_there(tmp_path: Path) -> None:
    callback = CustomInitialization(str(tmp_path))
    detail = f"{str(tmp_path)!r} has no config.json"
    advice = "mount the folder there, or correct model_path"
    assert list(callback.doctor({})) == [Finding("model", "problem", detail, advice)]
    (tmp_path / "config.json").write_text("{}")
    assert list(callback.doctor({})) == [Finding("model", "ok", f"{str(tmp_path)!r} is there")]


RELATIVE = (
    r"^CustomInitialization\(model_path='models/x'\): give an absolute path, which means the same "
    "in every process$"
)


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(CallbackConfigError, match=RELATIVE):
        CustomInitialization("models/x")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"model_path": "/x", "required_files": "config.json"},
            "(required_files='config.json'): write a list, even of one item",
        ),
        ({"model_path": "/x", "required_files": ["a", 1]}, "(required_files[1]=1): write a string"),
        ({"model_path": "/x", "required_files": 7}, "(required_files=7): write a list"),
        ({"model_path": 7}, "(model_path=7): write a path"),
        ({"model_path": ""}, "(model_path=''): give an absolute path, which means the same"),
        ({}, " has no argument 'model_path'; add it"),
        (
            {"model_path": "/x", "required_file": []},
            " has unknown argument 'required_file'; did you mean 'required_files'?",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"^CustomInitialization{re.escape(text)}"):
        CustomInitialization(**arguments)


def test_a_path_is_as_good_as_its_text(tmp_path: Path) -> None:
    assert CustomInitialization(tmp_path).model_path == tmp_path
    assert CustomInitialization(str(tmp_path)).model_path == tmp_path
