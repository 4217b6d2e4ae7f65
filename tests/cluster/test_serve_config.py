"""Serve config files of every shape, read without Ray, and Ray's own verdict on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_hooks.cluster import _ray, ray_schema, serve_config
from rayserve_hooks.errors import CallbackConfigError, Problems

FIRST = {
    "callback_class": "rayserve_hooks.HooksCallback",
    "callback_kwargs": {"callbacks": ["startup_metrics"]},
}
KV: dict[str, Any] = {"engine_kwargs": {"kv_transfer_config": {"kv_connector": "NixlConnector"}}}


def llm(model_id: str = "m", **fields: Any) -> dict[str, Any]:
    return {"model_loading_config": {"model_id": model_id}, "callback_config": FIRST, **fields}


def app(kind: str, name: str = "app", **args: Any) -> dict[str, Any]:
    builder = f"ray.serve.llm:build_{kind}openai_app"
    return {"name": name, "route_prefix": f"/{name}", "import_path": builder, "args": args}


def read(folder: Path, loaded: object) -> serve_config.ServeConfig:
    path = folder / "serve.yaml"
    path.write_text(loaded if isinstance(loaded, str) else yaml.safe_dump(loaded))
    problems = Problems()
    found = serve_config.read(str(path), problems)
    problems.raise_all()
    return found


def read_apps(folder: Path, *applications: object) -> serve_config.ServeConfig:
    return read(folder, {"applications": list(applications)})


@pytest.mark.parametrize(
    ("application", "names"),
    [
        (app("", llm_configs=[llm("a"), llm("b")]), ["app/a", "app/b"]),
        (app("dp_", llm_config=llm()), ["app/m"]),
        (
            app("pd_", prefill_config=llm(**KV), decode_config=llm(**KV)),
            ["app/Prefill:m", "app/Decode:m"],
        ),
        (
            app("", llm_configs=[llm(lora_config={"dynamic_lora_loading_path": "s3://b/l"})]),
            ["app/m"],
        ),
        ({"import_path": "my_app:build", "args": {"llm_config": llm()}}, ["default/m"]),
        (
            {"import_path": "ray.serve.llm.build_dp_openai_app", "args": {"llm_config": llm()}},
            ["default/m"],
        ),
    ],
)
def test_every_shape_is_read(application: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    found = read_apps(tmp_path, application)
    assert [name for name, _ in found.stacks] == names
    assert [entry.name for _, stack in found.stacks for entry in stack.entries] == [
        "startup_metrics"
    ] * len(names)


@pytest.mark.parametrize(
    ("kind", "keys"), [("dp_", ["llm_config"]), ("pd_", ["prefill_config", "decode_config"])]
)
def test_files_are_read_wherever_a_config_may_stand(
    kind: str, keys: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "llm.yaml"
    file.write_text(yaml.safe_dump(llm(**KV)))
    assert len(read_apps(tmp_path, app(kind, **dict.fromkeys(keys, str(file)))).stacks) == len(keys)


def test_several_applications_of_which_one_is_python(tmp_path: Path) -> None:
    python = {"name": "web", "route_prefix": "/web", "import_path": "my_app:app"}
    found = read_apps(tmp_path, app("", llm_configs=[llm()]), python)
    assert [name for name, _ in found.stacks] == ["app/m"]
    (unseen,) = found.unseen
    assert unseen == (
        "web: 'my_app:app' is Python, which is not run here; callbacks of an LLMConfig that is "
        "made there are checked when it is made"
    )


@pytest.mark.parametrize(
    ("loaded", "text"),
    [
        ("", "holds no mapping; name a Serve config file"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ({"applications": []}, "has no LLM config: looked in the args of each application for llm"),
        ({"applications": [{"import_path": "my_app:app"}]}, "'my_app:app' is Python, which is not"),
        ({"applications": [app("")]}, "app: args has no key 'llm_configs'; add it"),
        ({"applications": [app("", llm_configs=[])]}, "app: llm_configs is []; add an LLM config"),
        ({"applications": [app("", llm_config=llm())]}, "'llm_config'.*args"),
        ({"applications": [app("dp_", llm_configs=[llm()])]}, "args has no key 'llm_config'"),
        ({"applications": [app("pd_", prefill_config=llm(**KV))]}, "has no key 'decode_config'"),
    ],
)
def test_no_llm_config_is_an_error(loaded: object, text: str, tmp_path: Path) -> None:
    with pytest.raises(CallbackConfigError, match=text.replace("[", r"\[")):
        read(tmp_path, loaded)


def ours(kind: str = "", **args: Any) -> dict[str, Any]:
    return {**app(kind, **args), "import_path": f"rayserve_hooks:build_{kind}openai_app"}


def bare(**fields: Any) -> dict[str, Any]:
    return {"model_loading_config": {"model_id": "m"}, **fields}


@pytest.mark.parametrize(
    ("application", "names"),
    [
        (ours(llm_configs=[bare(callbacks=["startup_metrics"])]), ["app/m"]),
        (ours(llm_configs=[{"model_id": "m", "callback": "startup_metrics"}]), ["app/m"]),
        (ours("dp_", llm_config=bare(callbacks="startup_metrics", time_limits={})), ["app/m"]),
        (
            ours("pd_", prefill_config=llm(**KV), decode_config=llm(**KV)),
            ["app/Prefill:m", "app/Decode:m"],
        ),
    ],
)
def test_our_builders_take_callbacks_in_each_config(
    application: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    found = read_apps(tmp_path, application)
    assert [name for name, _ in found.stacks] == names
    assert {entry.name for _, stack in found.stacks for entry in stack.entries} == {
        "startup_metrics"
    }
    assert [deployment.left_out for deployment in found.deployments] == [{}] * len(names)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (llm(callbacks=["startup_metrics"]), "app/m: both callbacks and callback_config are given"),
        (bare(callbacks=[{"callbak": "startup_metrics"}]), "callbacks[0]"),
        (bare(callbacks=[], callback="x", model_id="n"), "'n' and model_loading_config's model_id"),
        (bare(callbacks=["startup_metrics"], callback="x"), "both callback and callbacks are"),
        (bare(callbackz=[]), "app/m has unknown key 'callbackz'; did you mean 'callbacks'?"),
        (bare(callbacks=["startup_metrics"], time_limits={"totl": 1}), "totl"),
    ],
)
def test_what_our_builders_refuse(config: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(CallbackConfigError) as caught:
        read_apps(tmp_path, ours(llm_configs=[config]))
    assert text in str(caught.value)


def test_rays_builder_leaves_hooks_out_unless_the_file_names_our_engine(tmp_path: Path) -> None:
    (found,) = read_apps(tmp_path, app("", llm_configs=[llm()])).deployments
    assert sorted(found.left_out) == [
        "on_before_engine_init",
        "on_configure",
        "on_engine_ready",
        "on_init_failed",
        "on_shutdown",
    ]
    named = {"RAYLLM_VLLM_ENGINE_CLS": "rayserve_hooks.cluster.engine.HooksEngine"}
    config = llm(runtime_env={"env_vars": named})
    (found,) = read_apps(tmp_path, app("", llm_configs=[config])).deployments
    assert sorted(found.left_out) == ["on_configure"]


def without_class(**settings: Any) -> dict[str, Any]:
    return {"applications": [app("", llm_configs=[llm(callback_config=settings)])]}


def with_llm(**fields: Any) -> dict[str, Any]:
    return {"applications": [app("", llm_configs=[llm(**fields)])]}


def with_app(**fields: Any) -> dict[str, Any]:
    return {"applications": [{**app("", llm_configs=[llm()]), **fields}]}


REFUSED = [  # by Ray, too
    (with_llm(callbacks=["x"]), "app/m has unknown key 'callbacks', which belongs to callback_kw"),
    (
        with_llm(engine_kwarg={}),
        "app/m has unknown key 'engine_kwarg'; did you mean 'engine_kwargs",
    ),
    (
        with_llm(model_source="m"),
        "'model_source', which belongs to model_loading_config of an LLM config",
    ),
    (with_llm(llm_engine="vllm"), "app/m: llm_engine is 'vllm'; use one of vLLM"),
    (with_llm(engine_kwargs=None), "app/m: engine_kwargs is None; write a mapping"),
    (with_llm(model_loading_config={"model_id": 3}), "model_id is 3; write a string"),
    (with_llm(lora_config={"dynamic_lora_loading_path": "/x"}), "dynamic_lora_loading_path is '/x"),
    (with_llm(engine_kwargs={"disable_log_stats": True}), "disable_log_stats is set; set log_eng"),
    (with_llm(experimental_configs={"num_router_replicas": 1}), "write num_ingress_replicas"),
    (
        without_class(callback_clas="a:B"),
        "callback_config has unknown key 'callback_clas'; did you",
    ),
    (without_class(**{**FIRST, "callback_kwargs": ["a:B"]}), "callback_kwargs is ['a:B']; write a"),
    (
        without_class(**{**FIRST, "callbacks": []}),
        "callback_config has unknown key 'callbacks', whi",
    ),
    (with_llm(accelerator_config={}), "app/m: accelerator_config has no key 'kind'; add it"),
    (
        with_llm(model_loading_config={"model_id": "m", "model_source": {"bucket_url": "s3://b"}}),
        "app/m: model_source has unknown key 'bucket_url'; did you mean 'bucket_uri'?",
    ),
    (
        with_llm(model_loading_config={"model_id": "m", "model_source": {"bucket_uri": "/b"}}),
        "app/m: model_source: bucket_uri is '/b'",
    ),
    (
        with_app(args={"llm_configs": [llm()], "ingress_cls_config": {"ingress_class": "a:B"}}),
        "app: args: ingress_cls_config has unknown key 'ingress_class'; did you mean 'ingress_cls'",
    ),
    (with_app(import_path="my_app"), "app: import_path is 'my_app'"),
    (with_app(args=[1]), "app: args is [1]; write a mapping"),
    (with_app(name=""), "name is ''; write at least 1 characters"),
    (with_app(port=1), "app has key 'port'; set it in http_options, for all applications"),
    (with_app(args={"llm_configs": [llm(), llm()]}), "model_id 'm' is there more than once; give"),
    ({**with_app(), "proxy_location": "everynode"}, "proxy_location is 'everynode'; use one of"),
]
LORA = {"dynamic_lora_loading_path": "s3://b/l"}


def pair(prefill: dict[str, Any], decode: dict[str, Any]) -> dict[str, Any]:
    return {"applications": [app("pd_", prefill_config=prefill, decode_config=decode)]}


PAIRS_REFUSED = [
    (pair(llm("a", **KV), llm("b", **KV)), "app: model_id of prefill_config and decode_config dif"),
    (pair(llm(), llm(**KV)), "app: prefill_config: engine_kwargs has no key 'kv_transfer_config'"),
    (pair(llm(**KV), llm(engine_kwargs={})), "app: decode_config: engine_kwargs has no key 'kv_t"),
    (
        pair(llm(**KV), llm(engine_kwargs={"kv_transfer_config": None})),
        "app: decode_config: engine_kwargs has no key 'kv_transfer_config'",
    ),
]
ADAPTERS_DIFFER = [
    (pair(llm(**KV, lora_config=LORA), llm(**KV)), "app: lora_config of prefill_config and decode"),
    (
        pair(
            llm(**KV, lora_config=LORA), llm(**KV, lora_config={"dynamic_lora_loading_path": None})
        ),
        "app: lora_config of prefill_config and decode_config differ",
    ),
]
PAIRS_ACCEPTED = [
    pair(llm(**KV), llm(**KV)),
    pair(llm(**KV, lora_config=LORA), llm(**KV, lora_config={**LORA, "max_download_tries": 2})),
    pair(llm(**KV, lora_config={}), llm(**KV, lora_config={"max_download_tries": 2})),
]
RUNS_NOTHING = [  # Ray accepts it
    (without_class(callback_kwargs=FIRST["callback_kwargs"]), "no key 'callback_class', and Ray's"),
    (
        with_app(callbacks=["x"]),
        "app has unknown key 'callbacks', which belongs to callback_kwargs",
    ),
    (
        {**with_app(), "application": []},
        "has unknown key 'application'; did you mean 'applications",
    ),
    (
        with_llm(placement_group_config={"bundle": []}),
        "placement_group_config has unknown key 'bundle'; did you mean 'bundles'?",
    ),
]
ACCEPTED = [
    with_llm(),
    {**with_app(), "x-common": 1},
    with_app(unknown_of_a_later_ray=1),
    with_llm(log_engine_metrics="no", accelerator_config={"kind": "cpu"}, server_cls=None),
    with_llm(placement_group_config={"bundles": [{"CPU": 1}]}, runtime_env=None),
    with_llm(model_loading_config={"model_id": "m", "model_source": {"bucket_uri": "s3://b/m"}}),
    with_llm(
        model_loading_config={
            "model_id": "m",
            "model_source": {"extra_files": [{"bucket_uri": "gs://b/x", "destination_path": "/x"}]},
        }
    ),
    with_app(args={"llm_configs": [llm()], "ingress_cls_config": {"ingress_extra_kwargs": {}}}),
]


@pytest.mark.parametrize(("loaded", "text"), [*REFUSED, *PAIRS_REFUSED, *RUNS_NOTHING])
def test_what_ray_refuses_or_runs_nothing_of_is_an_error(
    loaded: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(CallbackConfigError) as caught:
        read(tmp_path, loaded)
    assert text in str(caught.value)


@pytest.mark.parametrize("loaded", [*ACCEPTED, *PAIRS_ACCEPTED])
def test_what_ray_accepts_is_read(loaded: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, loaded).stacks


@pytest.mark.parametrize(("loaded", "text"), ADAPTERS_DIFFER)
def test_adapters_that_differ_are_refused_where_ray_refuses_them(
    loaded: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ray, "compares_adapters", lambda: True)
    with pytest.raises(CallbackConfigError, match=text):
        read(tmp_path, loaded)
    monkeypatch.setattr(_ray, "compares_adapters", lambda: False)
    assert len(read(tmp_path, loaded).stacks) == 2


@pytest.mark.parametrize("key", ["proxy_cls_config", "proxy_deployment_config"])
def test_what_configured_a_proxy_is_taken_where_ray_takes_it(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until Ray 2.59, which ignores it."""

    def pair_with(value: object, decode: str = "m") -> dict[str, Any]:
        args: dict[str, Any] = {"prefill_config": llm(**KV), "decode_config": llm(decode, **KV)}
        return app("pd_", **args | {key: value})

    monkeypatch.setattr(_ray, "takes_a_proxy", lambda: True)
    assert len(read_apps(tmp_path, pair_with({"a": 1})).stacks) == 2
    with pytest.raises(CallbackConfigError, match=f"{key} is 3; write a mapping"):
        read_apps(tmp_path, pair_with(3))
    with pytest.raises(CallbackConfigError, match="model_id of prefill_config and decode_config"):
        read_apps(tmp_path, pair_with({}, "n"))
    monkeypatch.setattr(_ray, "takes_a_proxy", lambda: False)
    with pytest.raises(CallbackConfigError, match=f"app: args has unknown key '{key}'"):
        read_apps(tmp_path, pair_with({}))


SGLANG: dict[str, Any] = {
    "engine_kwargs": {"tp_size": 1},
    "placement_group_config": {"placement_group_bundles": []},
}


@pytest.mark.parametrize(
    "server", ["rayserve_hooks.SGLangServer", "rayserve_hooks:SGLangServer", "my_servers.Mine"]
)
def test_a_config_for_another_engines_server(server: str, tmp_path: Path) -> None:
    config = llm(server_cls=server, **SGLANG)
    assert len(read_apps(tmp_path, app("", llm_configs=[config])).stacks) == 1


@pytest.mark.parametrize("separator", [".", ":"])
def test_rays_own_server_for_sglang_runs_no_callbacks(separator: str, tmp_path: Path) -> None:
    server = f"ray.llm._internal.serve.engines.sglang{separator}SGLangServer"
    with pytest.raises(
        CallbackConfigError,
        match=r"app/m: server_cls names Ray's own server for SGLang, which runs no callbacks; name "
        r"'rayserve_hooks\.SGLangServer'$",
    ):
        read_apps(tmp_path, app("", llm_configs=[llm(server_cls=server, **SGLANG)]))
    without = llm(server_cls=server, callback_config={}, **SGLANG)
    assert len(read_apps(tmp_path, app("", llm_configs=[without])).stacks) == 1


@pytest.mark.slow  # it imports Ray's own classes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_comes_to_the_same_verdicts() -> None:
    assert [accepted_by_ray(loaded) for loaded, _ in REFUSED] == [False] * len(REFUSED)
    for loaded in [*ACCEPTED, *(loaded for loaded, _ in RUNS_NOTHING)]:
        assert accepted_by_ray(loaded), loaded


@pytest.mark.slow  # it imports Ray's own classes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_comes_to_the_same_verdicts_on_pairs() -> None:
    from ray.llm._internal.serve.serving_patterns.prefill_decode.builder import PDServingArgs

    def accepted(loaded: dict[str, Any]) -> bool:
        try:
            PDServingArgs.model_validate(loaded["applications"][0]["args"])
        except (ValueError, TypeError):
            return False
        return True

    assert [accepted(loaded) for loaded, _ in PAIRS_REFUSED] == [False] * len(PAIRS_REFUSED)
    differ = [accepted(loaded) for loaded, _ in ADAPTERS_DIFFER]
    assert differ == [not _ray.compares_adapters()] * len(ADAPTERS_DIFFER)
    assert [accepted(loaded) for loaded in PAIRS_ACCEPTED] == [True] * len(PAIRS_ACCEPTED)


def accepted_by_ray(loaded: dict[str, Any]) -> bool:
    from ray.serve.llm import LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    try:
        config = ServeDeploySchema.model_validate(loaded)
        LLMServingArgs.model_validate(config.applications[0].args)
    except (ValueError, TypeError):
        return False
    return True


@pytest.mark.slow  # it imports Ray's own classes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_names_are_rays() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.llm._internal.common.placement import PlacementGroupConfig
    from ray.llm._internal.common.utils.cloud_utils import CloudMirrorConfig
    from ray.llm._internal.serve.core.ingress.builder import IngressClsConfig, LLMServingArgs
    from ray.llm._internal.serve.serving_patterns.data_parallel.builder import DPOpenAiServingArgs
    from ray.llm._internal.serve.serving_patterns.prefill_decode.builder import PDServingArgs
    from ray.serve.llm import LLMConfig, LoraConfig, ModelLoadingConfig
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    newer = {"ServeDeploy": {"tracing_config"}}  # since Ray 2.59; older ones ignore the key
    of_pairs = serve_config.arguments_of("ray.serve.llm:build_pd_openai_app")
    assert of_pairs is not None
    pairs: list[tuple[type, Any]] = [
        (ray_schema.ServeDeploy, ServeDeploySchema),
        (ray_schema.Application, ServeApplicationSchema),
        (ray_schema.OpenAIArgs, LLMServingArgs),
        (ray_schema.DataParallelArgs, DPOpenAiServingArgs),
        (of_pairs, PDServingArgs),
        (ray_schema.LLMConfig, LLMConfig),
        (ray_schema.ModelLoadingConfig, ModelLoadingConfig),
        (ray_schema.LoraConfig, LoraConfig),
        (ray_schema.PlacementGroupConfig, PlacementGroupConfig),
    ]
    for ours, rays in pairs:
        known = set(rays.model_fields) - {"host", "port"}
        assert names(ours) - known <= newer.get(ours.__name__, set()), ours
        assert known <= names(ours), ours
    assert names(ray_schema.CallbackConfig) == names(CallbackConfig)
    assert names(ray_schema.ModelSource) == set(CloudMirrorConfig.model_fields)
    assert names(ray_schema.IngressCls) == set(IngressClsConfig.model_fields)


def names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
