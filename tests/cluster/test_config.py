"""`LLMConfig` with callbacks. It imports Ray Serve LLM; one test needs a cluster."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import rayserve_hooks
from rayserve_hooks import get_plugin_manager
from rayserve_hooks.cluster.stacks import stack_of

pytestmark = pytest.mark.ray


class Callback:
    def __init__(self, token: str = "") -> None:
        self.token = token

    def on_before_init(self, ctx: Any) -> None:
        self.stream = (number for number in range(1))


def make(**fields: Any) -> Any:
    fields.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    return rayserve_hooks.LLMConfig(**fields)


def order(config: Any) -> list[str]:
    return get_plugin_manager(config).run_order()["on_before_init"]


def test_model_id_and_one_callback() -> None:
    config = make(model_id="m", callback="test_config.Callback")
    assert config.model_id == "m"
    assert order(config) == ["Callback"]


def test_model_id_fills_in_the_loading_config() -> None:
    config = make(model_id="m", model_loading_config={"model_source": "org/model"})
    assert config.model_loading_config.model_id == "m"
    assert config.model_loading_config.model_source == "org/model"


def test_it_is_rays_config() -> None:
    from ray.serve.llm import LLMConfig

    config = make(model_id="m", engine_kwargs={"max_model_len": 64}, callback=Callback)
    assert isinstance(config, LLMConfig)
    engine: Any = config.get_engine_config()
    assert engine.engine_kwargs == {"max_model_len": 64}


def test_without_callbacks_it_is_as_in_ray() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    assert make(model_id="m").callback_config == CallbackConfig()


def test_callbacks_in_every_form_keep_list_order() -> None:
    module = __import__("plugins_for_tests")
    config = make(
        model_id="m",
        callbacks=[
            Callback,
            {"callback": Callback(), "name": "instance"},
            {"callback": "test_config:Callback", "name": "string", "kwargs": {"token": "x"}},
            "download_policy",
        ],
    )
    assert module
    assert order(config) == ["Callback", "instance", "string", "download_policy"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"callback": "no_such_module.X"}, "callback 'no_such_module.X': no module named"),
        (
            {"callbacks": [{"callback": Callback, "kwargs": {"tokne": "x"}}]},
            r"Callback\(token: 'str' = ''\) refused kwargs \['tokne'\]: TypeError: .*'tokne'",
        ),
        (
            {"callbacks": [{"callback": "download_policy", "kwargs": {"local": "ALL"}}]},
            r"DownloadPolicy\(local=...\): 'ALL' is not a download mode; use one of EXCLUDE_SAFE",
        ),
        (
            {"callback": Callback, "callbacks": [Callback]},
            "both callback and callbacks are given; list all of them in callbacks",
        ),
        (
            {"callback": Callback, "model_loading_config": {"model_id": "other"}},
            "model_id 'm' and model_loading_config's model_id 'other' differ; give one of them",
        ),
        (
            {"callback": Callback, "callback_config": {"callback_kwargs": {"callbacks": [1]}}},
            "both callbacks and callback_config are given; list all callbacks in callbacks",
        ),
    ],
)
def test_what_is_wrong_is_said_where_the_config_is_made(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        make(model_id="m", **fields)


def test_an_instance_that_cannot_travel() -> None:
    callback = Callback()
    callback.on_before_init(None)
    with pytest.raises(
        ValidationError,
        match="callback 'Callback' cannot be sent to another process: TypeError: its attribute "
        "'stream', a generator: cannot pickle 'generator' object; name the class with kwargs and "
        "open such things in its hooks, or leave them out in __getstate__",
    ):
        make(model_id="m", callback=callback)


def test_secrets_among_kwargs_reach_no_error_and_no_repr() -> None:
    secret = {"callback": Callback, "kwargs": {"token": "hf_secret"}}
    assert "hf_secret" not in repr(make(model_id="m", callbacks=[secret]).callbacks)
    wrong = {"callback": Callback, "kwargs": {"token": "hf_secret", "tokne": "hf_secret"}}
    with pytest.raises(ValidationError) as caught:
        make(model_id="m", callbacks=[wrong])
    assert "hf_secret" not in str(caught.value)


def test_it_pickles_after_its_callbacks_have_run() -> None:
    callback = Callback("configured")
    config = make(model_id="m", callback=callback)
    callback.on_before_init(None)
    copy = pickle.loads(pickle.dumps(config))
    assert order(copy) == ["Callback"]


def test_a_config_of_ray_that_names_a_ray_callback_is_a_list_of_one() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackConfig
    from ray.serve.llm import LLMConfig

    class Foreign(CallbackBase):
        async def on_before_node_init(self) -> None:
            pass

    config = LLMConfig(
        model_loading_config={"model_id": "m"},
        callback_config=CallbackConfig(callback_class=Foreign),
    )
    assert order(config) == ["Foreign"]


def test_limits_travel_with_the_callbacks() -> None:
    config = make(model_id="m", callback=Callback, time_limits={"total": 60})
    assert get_plugin_manager(config).stack.time_limits.total == 60
    copy = pickle.loads(pickle.dumps(config))
    assert get_plugin_manager(copy).stack.time_limits.total == 60


def test_limits_need_no_callback() -> None:
    config = make(model_id="m", time_limits={"download": 60})
    assert get_plugin_manager(config).stack.time_limits.download == 60


def test_wrong_limits_are_reported_with_wrong_callbacks() -> None:
    with pytest.raises(ValidationError) as caught:
        make(model_id="m", callbacks=[None], time_limits={"total": 0})
    assert "2 problems:\n- callbacks[0] is None; write" in str(caught.value)
    assert "- time_limits: total is 0; write seconds, more than 0, or null" in str(caught.value)


ABSENT = {"callback": "only_there:Fetch", "only_on_cluster": True}


def test_a_callback_that_is_only_on_the_cluster_is_not_imported_here() -> None:
    config = make(model_id="m", callbacks=[ABSENT, Callback])
    assert [entry.name for entry in config.callbacks] == ["Fetch", "Callback"]
    assert pickle.loads(pickle.dumps(config)).callbacks[0].only_on_cluster


def test_the_others_are_checked_beside_it() -> None:
    with pytest.raises(ValidationError, match=r"callback 'no_such_module\.X': no module named"):
        make(model_id="m", callbacks=[ABSENT, "no_such_module.X"])


def test_what_is_only_on_the_cluster_can_still_not_hold_what_cannot_travel() -> None:
    kwargs = {"stream": (number for number in range(1))}
    with pytest.raises(ValidationError, match="callback 'Fetch' cannot be sent to another process"):
        make(model_id="m", callbacks=[{**ABSENT, "kwargs": kwargs}])


def test_all_problems_are_reported_together() -> None:
    callbacks = [
        "no_such_module.X",
        {"callback": Callback, "kwargs": {"tokne": 1}},
        {"callback": Callback, "nmae": "x"},
    ]
    with pytest.raises(ValidationError) as caught:
        make(model_id="m", callbacks=callbacks)
    text = str(caught.value)
    assert "3 problems:\n- callbacks[2] has unknown key 'nmae'; did you mean 'name'?" in text
    assert "- callback 'no_such_module.X': no module named 'no_such_module'" in text
    assert "refused kwargs ['tokne']" in text


def test_a_callback_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(model_id="m", callbacks=[Callback, "download_policy"])
    monkeypatch.setenv("RAYSERVE_HOOKS_DISABLE", "Callback")
    assert order(config) == ["download_policy"]


def test_an_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSERVE_HOOKS_DISABLE", "Callbak")
    with pytest.raises(
        ValidationError,
        match=r"RAYSERVE_HOOKS_DISABLE names 'Callbak', which is no callback of this deployment; "
        r"use names of its callbacks \(known: Callback, download_policy\)",
    ):
        make(model_id="m", callbacks=[Callback, "download_policy"])


def test_a_config_of_ray_with_instances_keeps_one_manager() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "m"},
        callback_config=CallbackConfig("rayserve_hooks.HooksCallback", {"callbacks": [Callback()]}),
    )
    assert get_plugin_manager(config) is get_plugin_manager(config)


def test_unknown_callback_kwargs() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "m"},
        callback_config=CallbackConfig("rayserve_hooks.HooksCallback", {"callback": "x"}),
    )
    with pytest.raises(ValueError, match="callback_kwargs has unknown key 'callback'"):
        get_plugin_manager(config)


def config_of_ray(callback: Callback) -> Any:
    from ray.serve.llm import LLMConfig

    settings: Any = {
        "callback_class": "rayserve_hooks.HooksCallback",
        "callback_kwargs": {"callbacks": [callback]},
    }
    return LLMConfig(model_loading_config={"model_id": "m"}, callback_config=settings)


def test_an_instance_in_a_config_of_ray_travels_too() -> None:
    config = config_of_ray(Callback())
    (entry,) = pickle.loads(pickle.dumps(stack_of(config))).entries
    assert isinstance(entry.create(), Callback)


def test_an_instance_in_a_config_of_ray_that_cannot_travel() -> None:
    callback = Callback()
    callback.on_before_init(None)
    config = config_of_ray(callback)
    with pytest.raises(ValueError, match="its attribute 'stream', a generator"):
        stack_of(config)


@dataclass
class Uncomparable:  # noqa: PLW1641 - as a dataclass is
    size: int = 1

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("do not compare")

    def __bool__(self) -> bool:
        raise RuntimeError("do not ask")

    def on_before_init(self, ctx: Any) -> None: ...


EVERY_FORM: list[list[Any]] = [
    ["test_config:Callback"],
    [
        {"callback": "test_config.Callback", "kwargs": {"token": "x"}, "name": "a"},
        "download_policy",
    ],
    [Callback, {"callback": Callback, "name": "b", "on_error": "warn"}],
    [{"callback": "only_there:Fetch", "only_on_cluster": True}],
]
INSTANCES: list[list[Any]] = [[Callback("x")], [Uncomparable(2)]]


WAYS: dict[str, Callable[[Any], Any]] = {
    "model_dump": lambda config: type(config).model_validate(config.model_dump()),
    "model_copy": lambda config: config.model_copy(),
    "deep model_copy": lambda config: config.model_copy(deep=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "model_dump_json": lambda config: type(config).model_validate_json(config.model_dump_json()),
    "yaml": lambda config: type(config)(
        **yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    ),
}
IN_PYTHON = list(WAYS)[:5]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("callbacks", EVERY_FORM)
def test_a_config_is_dumped_and_copied_with_its_callbacks(how: str, callbacks: list[Any]) -> None:
    config = make(model_id="m", callbacks=callbacks, time_limits={"total": 60})
    again = WAYS[how](config)
    assert [entry.name for entry in again.callbacks] == [e.name for e in config.callbacks]
    assert stack_of(again).time_limits == stack_of(config).time_limits
    for here, there in zip(config.callbacks, again.callbacks, strict=True):
        assert (here.kwargs, here.on_error) == (there.kwargs, there.on_error)
        assert here.only_on_cluster == there.only_on_cluster
    assert WAYS[how](again).model_dump(mode="json") == config.model_dump(mode="json")


@pytest.mark.parametrize("how", IN_PYTHON)
@pytest.mark.parametrize("callbacks", INSTANCES)
def test_instances_are_dumped_and_copied_in_python(how: str, callbacks: list[Any]) -> None:
    config = make(model_id="m", callbacks=callbacks)
    again = WAYS[how](config)
    assert order(again) == order(config)
    assert get_plugin_manager(again) is get_plugin_manager(config)


@pytest.mark.parametrize("callbacks", INSTANCES)
def test_an_instance_is_described_in_a_file_and_refused_by_who_reads_it(
    callbacks: list[Any],
) -> None:
    text = make(model_id="m", callbacks=callbacks).model_dump_json()
    with pytest.raises(
        ValidationError, match="was an instance, which no file can hold; name the class with kwargs"
    ):
        rayserve_hooks.LLMConfig.model_validate_json(text)


def test_what_is_dumped_runs_in_rays_own_config() -> None:
    from ray.serve.llm import LLMConfig

    config = make(model_id="m", callbacks=[Callback, "download_policy"], time_limits={"total": 60})
    dumped = config.model_dump(mode="json", exclude={"callbacks", "time_limits"})
    ray_config = LLMConfig.model_validate(dumped)
    assert order(ray_config) == order(config)
    assert get_plugin_manager(ray_config).stack.time_limits.total == 60


def test_a_copy_with_other_callbacks_has_those() -> None:
    config = make(model_id="m", callback=Callback)
    other = config.model_copy(update={"callbacks": ["download_policy"]})
    assert (order(config), order(other)) == (["Callback"], ["download_policy"])
    assert order(config.model_copy(update={"callbacks": []})) == []
    with pytest.raises(ValueError, match=r"callback 'no_such\.X': no module named 'no_such'"):
        config.model_copy(update={"callbacks": ["no_such.X"]})


def test_a_config_that_is_gone_keeps_nothing() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    references = []
    for index in range(20):
        callback = Callback("x" * index)
        references.append(weakref.ref(callback))
        make(model_id=f"m{index}", callback=callback)
        kwargs = {"callbacks": [callback]}
        settings = CallbackConfig("rayserve_hooks.HooksCallback", kwargs)
        config = LLMConfig(model_loading_config={"model_id": "m"}, callback_config=settings)
        assert get_plugin_manager(config) is get_plugin_manager(config)
    del callback, config, settings, kwargs
    gc.collect()
    assert [reference() for reference in references] == [None] * 20


def test_two_ways_to_give_callbacks_are_refused_whatever_they_are() -> None:
    with pytest.raises(ValidationError, match="both callback and callbacks are given"):
        make(model_id="m", callback=Callback, callbacks=Uncomparable())
    settings = {"callback_kwargs": {"callbacks": [Uncomparable()]}}
    with pytest.raises(ValidationError, match="both callbacks and callback_config are given"):
        make(model_id="m", callbacks=[Uncomparable()], callback_config=settings)


@pytest.mark.parametrize(
    "fields",
    [
        {"callbacks": Uncomparable()},
        {"callbacks": {1: 2, "a": 3}},
        {"callbacks": b"s3cret"},
        {"callback": Uncomparable, "time_limits": Uncomparable()},
        {"callback": {"callback": Uncomparable, "kwargs": {1: "s3cret", "a": 2}}},
        {"time_limits": {1: 2, "total": "s3cret"}},
        {"callback": Callback, "model_loading_config": 3},
        {"callback": Callback, "callback_config": {"callback_kwargs": {"callbacks": 3}}},
        {"callback": Callback, "callback_config": 3},
    ],
)
def test_a_field_of_any_shape_is_a_validation_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        make(model_id="m", **fields)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["callback", "callbacks"])
def test_rays_own_config_refuses_what_the_readme_says(name: str) -> None:
    from ray.serve.llm import LLMConfig

    with pytest.raises(ValidationError) as caught:
        LLMConfig.model_validate({"model_id": "tiny", name: ["startup_metrics"]})
    assert {error["loc"][0]: error["msg"] for error in caught.value.errors()} == {
        "model_loading_config": "Field required",
        "model_id": "Extra inputs are not permitted",
        name: "Extra inputs are not permitted",
    }


def test_ray_logs_the_environment_of_a_config_and_no_arguments_of_callbacks(
    ray_cluster: Any,  # or Ray's builder starts one
    caplog: pytest.LogCaptureFixture,
) -> None:
    from ray.serve.llm import build_openai_app

    callback = {"callback": Callback, "kwargs": {"token": "of-the-callback"}}
    environment = {"env_vars": {"TOKEN": "of-the-environment"}}
    build_openai_app(
        {"llm_configs": [make(model_id="tiny", callbacks=[callback], runtime_env=environment)]}
    )
    assert "of-the-environment" in caplog.text
    assert "of-the-callback" not in caplog.text


class InEngine:
    def on_before_engine_init(self, ctx: Any) -> None:
        pass


def test_vllm_plugins_that_leaves_our_hook_out_is_refused() -> None:
    env = {"env_vars": {"VLLM_PLUGINS": "lora_filesystem_resolver"}}
    with pytest.raises(ValidationError) as caught:
        make(model_id="m", callbacks=[InEngine], runtime_env=env)
    assert (
        "on_before_engine_init of 'InEngine' would not run: VLLM_PLUGINS is "
        "'lora_filesystem_resolver', so that vLLM does not load the plugin 'rayserve_hooks' in the "
        "engine's processes; set VLLM_PLUGINS=lora_filesystem_resolver,rayserve_hooks, or remove it"
    ) in str(caught.value)
    make(model_id="m", callbacks=[Callback], runtime_env=env)
