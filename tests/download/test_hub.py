"""What can be told of a model in the cache without a Hub; test_hf_prefetch.py asks one."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.download import hub


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_part_that_an_index_names_and_that_is_not_there(snapshot: Path) -> None:
    assert hub._gaps(snapshot, lambda _: True) == []
    (snapshot / "two.safetensors").unlink()
    assert hub._gaps(snapshot, lambda _: True) == ["two.safetensors"]
    assert hub._gaps(snapshot, lambda name: not name.startswith("two")) == []


def test_a_link_that_leads_nowhere(snapshot: Path) -> None:
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to("../blobs/gone")
    assert hub._gaps(snapshot, lambda _: True) == ["one.safetensors"]


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_says_nothing(text: str, snapshot: Path) -> None:
    (snapshot / "model.safetensors.index.json").write_text(text)
    assert hub._gaps(snapshot, lambda _: True) == []


def test_a_file_of_another_size_is_damaged(snapshot: Path) -> None:
    sizes = {"one.safetensors": 7, "two.safetensors": 8, "three.safetensors": 1}
    assert hub._damaged(snapshot, sizes) == ["three.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("a.json", "*.json", True),
        ("sub/a.json", "*.json", True),
        ("sub/a", "sub/", True),
        ("a.json", "*.JSON", False),
        ("a.json", "b*", False),
    ],
)
def test_patterns_mean_what_the_client_means(name: str, pattern: str, matches: bool) -> None:
    utils: Any = importlib.import_module("huggingface_hub.utils")
    assert hub._matches(name, [pattern]) == matches
    assert list(utils.filter_repo_objects([name], allow_patterns=[pattern])) == [name] * matches


@pytest.mark.parametrize(
    ("environment", "token"),
    [
        ({}, False),
        ({"HF_TOKEN": " "}, False),
        ({"HF_TOKEN": "one\n", "HUGGING_FACE_HUB_TOKEN": "two"}, "one"),
        ({"HUGGING_FACE_HUB_TOKEN": "two"}, "two"),
    ],
)
def test_the_token_is_the_environments(
    environment: dict[str, str], token: str | bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub._token() == token
