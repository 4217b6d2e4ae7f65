"""Our builders: what they take, what they refuse, and what Serve deploys then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from apps import without_ingress
from waiting import until

import rayserve_hooks
from rayserve_hooks import build_dp_openai_app, build_openai_app, build_pd_openai_app
from rayserve_hooks.errors import CallbackConfigError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

CALLBACK = {"callback": "life_callbacks:SetVariable", "kwargs": {"name": "A", "value": "1"}}
KV = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}


def fields(model_id: str = "m", **more: Any) -> dict[str, Any]:
    group = {"bundles": [{"CPU": 1}]}
    return {
        "model_loading_config": {"model_id": model_id},
        "placement_group_config": group,
        **more,
    }


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what Ray's builders are called with."""
    noted: dict[str, Any] = {}
    for name in ("build_openai_app", "build_dp_openai_app", "build_pd_openai_app"):
        monkeypatch.setattr(f"ray.serve.llm.{name}", noted.update)
    return noted


def rays_config(**more: Any) -> Any:
    from ray.serve.llm import LLMConfig

    return LLMConfig(**fields(**more))


def settings(*callbacks: Any) -> dict[str, Any]:
    kwargs = {"callbacks": list(callbacks)}
    return {"callback_class": "rayserve_hooks.HooksCallback", "callback_kwargs": kwargs}


def as_file(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "llm.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize(
    "form", ["mapping", "short", "callback_config", "ours", "rays", "file", "serving_args"]
)
def test_each_form_of_a_config_is_configured(
    form: str, built: dict[str, Any], tmp_path: Path
) -> None:
    from ray.serve.llm import LLMServingArgs

    ours = rayserve_hooks.LLMConfig(callbacks=[CALLBACK], **fields())
    config = {
        "mapping": fields(callbacks=[CALLBACK]),
        "short": fields(callback=CALLBACK, time_limits={"total": 60}),
        "callback_config": fields(callback_config=settings(CALLBACK)),
        "ours": ours,
        "rays": rays_config(callback_config=settings(CALLBACK)),
        "file": as_file(tmp_path, fields(callbacks=[CALLBACK])),
        "serving_args": ours,
    }[form]
    args: Any = {"llm_configs": [config], "ingress_deployment_config": {"num_replicas": 1}}
    build_openai_app(LLMServingArgs(**args) if form == "serving_args" else args)
    (made,) = built["llm_configs"]
    assert isinstance(made, rayserve_hooks.LLMConfig)
    assert made.runtime_env == {"env_vars": {"A": "1"}}
    assert [call.callback for call in stack(made).configured.trace] == ["SetVariable"]
    assert built["ingress_deployment_config"] == {"num_replicas": 1}
    assert ours.runtime_env is None


def stack(config: Any) -> Any:
    return config.callback_config.callback_kwargs["stack"]


def test_data_parallel_and_prefill_and_decode(built: dict[str, Any]) -> None:
    build_dp_openai_app({"llm_config": fields(callback=CALLBACK)})
    assert built["llm_config"].runtime_env == {"env_vars": {"A": "1"}}
    pair = fields(callback=CALLBACK, engine_kwargs=KV)
    build_pd_openai_app({"prefill_config": pair, "decode_config": pair})
    for key in ("prefill_config", "decode_config"):
        assert built[key].runtime_env == {"env_vars": {"A": "1"}}


def test_a_config_without_callbacks_of_ours_is_as_in_ray(built: dict[str, Any]) -> None:
    rays = {"callback_class": "ray_callbacks.Everything", "callback_kwargs": {"greeting": "x"}}
    build_openai_app({"llm_configs": [fields("a"), fields("b", callback_config=rays)]})
    assert [c.callback_config.callback_kwargs for c in built["llm_configs"]] == [
        {},
        {"greeting": "x"},
    ]


def test_all_problems_of_all_configs_are_reported_together() -> None:
    with pytest.raises(CallbackConfigError) as caught:
        build_openai_app(
            {
                "llm_configs": [
                    fields(callbacks=["life_callbacks:Lief", "no_such_module:X"]),
                    fields("b", callbacks=["life_callbacks:Trouble"], time_limits={"totl": 1}),
                    fields("c", engine_kwarg={}),
                    fields("d", callback_config=settings({"callbak": "x"})),
                    7,
                    "no_such_file.yaml",
                ]
            }
        )
    texts = caught.value.problems
    assert [text.partition(":")[0] for text in texts] == [
        "llm_configs[0]",
        "llm_configs[0]",
        "llm_configs[1]",
        "llm_configs[1]",
        "llm_configs[2]",
        "llm_configs[3]",
        "llm_configs[4]",
        "llm_configs[5]",
    ]
    for text, part in zip(
        texts,
        [
            "'Lief'",
            "no_such_module",
            "",
            "",
            "engine_kwarg",
            "callbacks[0]",
            "is 7; give",
            "cannot",
        ],
        strict=True,
    ):
        assert part in text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], r"^the builder's argument is \[\]; give a mapping$"),
        ({"llm_configs": "x.yaml"}, r"^llm_configs is 'x.yaml'; give a list$"),
        ({"llm_configs": {}}, r"^llm_configs is {}; give a list$"),
    ],
)
def test_what_is_no_argument_of_a_builder(args: Any, text: str) -> None:
    with pytest.raises(CallbackConfigError, match=text):
        build_openai_app(args)


def test_a_failing_on_configure_deploys_nothing() -> None:
    trouble = {"callback": "life_callbacks:Trouble", "kwargs": {"hook": "on_configure"}}
    with pytest.raises(rayserve_hooks.HookError, match="'Trouble' failed in hook on_configure"):
        build_openai_app({"llm_configs": [fields(callback=trouble)]})


def test_serve_deploy_fails_before_a_replica_starts(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve

    trouble = {"callback": "life_callbacks:Trouble", "kwargs": {"hook": "on_configure"}}
    wrong = {
        "misspelt": ["life_callbacks:Lief", "no_such_module:X"],
        "failing": [trouble],
    }
    texts = {
        "misspelt": ["has no 'Lief'; did you mean 'Life'", "no_such_module"],
        "failing": [
            "callback 'Trouble' failed in hook on_configure on node",
            "RuntimeError: no such buck",
        ],
    }
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "rayserve_hooks:build_openai_app",
            "args": {"llm_configs": [fields(callbacks=callbacks)]},
        }
        for name, callbacks in wrong.items()
    ]
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump({"applications": applications}))
    command = [str(Path(sys.executable).with_name("serve")), "deploy"]
    subprocess.run([*command, "--address", ray_cluster.dashboard, str(config)], check=True)

    def all_failed() -> Any:
        found = serve.status().applications
        return found if {found[name].status for name in wrong} == {"DEPLOY_FAILED"} else None

    try:
        found = until(all_failed, 180)
        for name, expected in texts.items():
            for text in expected:
                assert text in found[name].message
            assert not found[name].deployments
    finally:
        for name in wrong:
            serve.delete(name)


def test_what_is_set_is_seen_from_outside(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve
    from ray.util.placement_group import placement_group_table

    env = tmp_path / "environment"
    before = placement_group_table().keys()
    config = {
        "model_loading_config": {"model_id": "tiny"},
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": {"RAYLLM_VLLM_ENGINE_CLS": "fake_engine.Engine"}},
        "callbacks": [
            CALLBACK,
            {
                "callback": "custom_placement_group",
                "kwargs": {"bundles": [{"CPU": 2}, {"other": 1}], "strategy": "STRICT_SPREAD"},
            },
            {"callback": "life_callbacks:Environment", "kwargs": {"path": str(env)}},
        ],
    }
    serve.run(build_openai_app(without_ingress(config)), name="built", route_prefix="/built")
    try:
        assert json.loads(env.read_text())["A"] == "1"
        table = placement_group_table()
        (group,) = (table[name] for name in table.keys() - before)
        assert group["strategy"] == "STRICT_SPREAD"
        # The replica's own actor is in the first bundle.
        assert list(group["bundles"].values()) == [{"CPU": 3.0}, {"other": 1.0}]
        assert group["state"] == "CREATED"
    finally:
        serve.delete("built")
