"""The schema that ``rayserve-hooks schema`` prints, as an editor uses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rayserve_hooks.cluster.schema import config_schema

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> Any:
    return jsonschema.Draft202012Validator(config_schema())


def config(*callbacks: object, **settings: object) -> dict[str, Any]:
    return with_callback_config(
        callback_class="rayserve_hooks.HooksCallback",
        callback_kwargs={"callbacks": list(callbacks), **settings},
    )


def with_callback_config(**settings: object) -> dict[str, Any]:
    llm_config = {"model_loading_config": {"model_id": "m"}, "callback_config": settings}
    return {"applications": [{"name": "llm", "args": {"llm_configs": [llm_config]}}]}


@pytest.mark.parametrize("where", ["llm_configs", "llm_config", "prefill_config", "decode_config"])
def test_what_our_builders_take_in_each_config_is_checked(schema: Any, where: str) -> None:
    def found(**fields: Any) -> list[str]:
        model = {"model_id": "m", **fields}
        args = {where: [model] if where == "llm_configs" else model}
        return list(reasons(schema, {"applications": [{"name": "llm", "args": args}]}))

    assert found(callbacks=["a:B", {"callback": "c:D"}], time_limits={"total": 9}) == []
    assert found(callback="startup_metrics") == []
    assert found(callback={"callback": "a:B", "kwarg": {}})
    assert found(time_limits={"totl": 9})


def reasons(schema: Any, loaded: object) -> Iterator[str]:
    """Yield what is wrong, of alternatives what is wrong with each."""
    pending = list(schema.iter_errors(loaded))
    while pending:
        error = pending.pop()
        pending.extend(error.context)
        yield error.message


def test_the_command_prints_a_schema() -> None:
    command = Path(sys.executable).with_name("rayserve-hooks")
    done = subprocess.run([command, "schema"], capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(printed)
    assert printed == json.loads(json.dumps(config_schema()))


def test_there_are_examples() -> None:
    assert {"prepare_node.yaml", "serve_config.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_examples_are_valid(schema: Any, path: Path) -> None:
    assert not list(reasons(schema, yaml.safe_load(path.read_text())))


@pytest.mark.parametrize(
    "entry",
    [
        "pkg.module:Class",
        {"callback": "pkg.module:Class", "kwargs": {"any": [1]}, "name": "n", "on_error": "warn"},
        {"callback": "pkg.module", "only_on_cluster": True},
        {"callback": "download_policy", "kwargs": {"local": "NONE", "nodes": {"10.0.0.1": "NONE"}}},
        {"callback": "custom_placement_group", "kwargs": {"bundles": [{"CPU": 1}]}},
        {"callback": "custom_initialization", "kwargs": {"model_path": "/models/tiny"}},
        {"callback": "startup_metrics", "kwargs": {}},
    ],
)
def test_an_entry_is_valid(schema: Any, entry: object) -> None:
    assert not list(reasons(schema, config(entry)))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (config({"callback": "a:B", "kwarg": {}}), "'kwarg' was unexpected"),
        (config({"kwargs": {}}), "'callback' is a required property"),
        (config(7), "7 is not of type 'string'"),
        (config({"callback": "a:B", "on_error": "wran"}), "'wran' is not one of"),
        (config({"callback": "a:B", "only_on_cluster": "yes"}), "'yes' is not of type 'boolean'"),
        (
            config({"callback": "download_policy", "kwargs": {"local": "NOEN"}}),
            "'NOEN' is not one of",
        ),
        (
            config({"callback": "download_policy", "kwargs": {"locl": "NONE"}}),
            "'locl' was unexpected",
        ),
        (
            config({"callback": "custom_placement_group", "kwargs": {"bundles": [{"CPU": "1"}]}}),
            "'1' is not of type 'number'",
        ),
        (
            config({"callback": "custom_initialization", "kwargs": {"model_path": "models"}}),
            "'models' does not match",
        ),
        (
            config({"callback": "startup_metrics", "kwargs": {"port": 1}}),
            "'port' was unexpected",
        ),
        (config(time_limits={"totl": 60}), "'totl' was unexpected"),
        (config(time_limits={"total": 0}), "0 is less than or equal to the minimum of 0"),
        (config(time_limit={"total": 60}), "'time_limit' was unexpected"),
    ],
)
def test_a_mistake_is_found(schema: Any, wrong: object, reason: str) -> None:
    assert any(reason in text for text in reasons(schema, wrong))


def test_what_is_rays_is_left_open(schema: Any) -> None:
    rays = with_callback_config(callback_class="pkg.RayCallback", callback_kwargs={"any": 1})
    rays["applications"][0]["args"]["llm_configs"].append("a/file.yaml")
    rays["proxy_location"] = "EveryNode"
    assert not list(reasons(schema, rays))


@pytest.mark.parametrize("name", ["llm_config", "prefill_config", "decode_config"])
def test_a_mistake_is_found_wherever_an_llm_config_stands(schema: Any, name: str) -> None:
    whole = config(7)
    args = whole["applications"][0]["args"]
    args[name] = args.pop("llm_configs")[0]
    assert any("7 is not of type 'string'" in text for text in reasons(schema, whole))
    args[name] = "a/file.yaml"
    assert not list(reasons(schema, whole))
