"""The adapter, driven as a replica drives it, without an engine."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

import rayserve_hooks
from rayserve_hooks import HookError
from rayserve_hooks.core.stack import CallbackStack

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> None:
    pass


def make(*callbacks: Any) -> Any:
    return rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=callbacks,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )


def test_get_or_create_callback_gives_the_adapter_once() -> None:
    config = make("lifecycle_callbacks:Plain")
    callback = config.get_or_create_callback()
    assert isinstance(callback, rayserve_hooks.HooksCallback)
    assert config.get_or_create_callback() is callback


def test_it_runs_the_path_and_switches_rays_own_step_off() -> None:
    config = make("lifecycle_callbacks:Plain", setting(extra_init_kwargs={"max_model_len": 64}))
    callback = config.get_or_create_callback()
    group = callback.ctx.placement_group
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert callback.ctx.run_init_node is False
    assert callback.ctx.placement_group is group
    assert config.get_engine_config().engine_kwargs["max_model_len"] == 64
    asyncio.run(callback.run_callback("on_after_node_init"))


def setting(**values: Any) -> dict[str, Any]:
    return {
        "callback": "lifecycle_callbacks:Set",
        "kwargs": {"hook": "on_before_init", "values": values},
    }


def test_rays_context_gets_what_the_engine_reads() -> None:
    config = make(setting(runtime_env={"env_vars": {"A_VARIABLE": "1"}}))
    callback = config.get_or_create_callback()
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert callback.ctx.runtime_env["env_vars"]["A_VARIABLE"] == "1"


def test_an_error_comes_through_as_it_is() -> None:
    config = make({"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}})
    callback = config.get_or_create_callback()
    with pytest.raises(HookError, match="'Fail' failed in hook on_after_init"):
        asyncio.run(callback.run_callback("on_before_node_init"))


def test_raise_error_on_callback_false_warns() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    config = make()
    fail = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}}
    config.callback_config = CallbackConfig(
        "rayserve_hooks.HooksCallback", {"callbacks": [fail]}, raise_error_on_callback=False
    )
    asyncio.run(config.get_or_create_callback().run_callback("on_before_node_init"))


def test_the_config_pickles_while_its_callbacks_hold_what_does_not() -> None:
    config = make("lifecycle_callbacks:Unpicklable")
    callback = config.get_or_create_callback()
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert pickle.loads(pickle.dumps(config)).model_id == "tiny"


def test_a_wrong_list_in_yaml_is_an_error_when_the_replica_builds_the_adapter() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    config = make()
    config.callback_config = CallbackConfig(
        "rayserve_hooks.HooksCallback", {"callbacks": ["lifecycle_callbacks:Plian"]}
    )
    with pytest.raises(ValueError, match="has no 'Plian'; did you mean 'Plain'"):
        config.get_or_create_callback()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Note each reading of a callback list."""
    noted: list[object] = []
    parse = CallbackStack.parse

    def noting(callbacks: object, *args: Any, **kwargs: Any) -> CallbackStack:
        noted.append(callbacks)
        return parse(callbacks, *args, **kwargs)

    monkeypatch.setattr(CallbackStack, "parse", noting)
    return noted


def run(config: Any) -> None:
    callback = pickle.loads(pickle.dumps(config)).get_or_create_callback()
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert "greeting" in callback.ctx.runtime_env["env_vars"]


GREETS = setting(runtime_env={"env_vars": {"greeting": "hello"}})


def test_a_list_is_read_once_where_our_config_is_made(parsed: list[object]) -> None:
    run(make(GREETS))
    assert parsed == [[GREETS]]


def test_a_list_of_yaml_is_read_once_in_the_replica_and_not_written_to(
    parsed: list[object],
) -> None:
    from ray.serve.llm import LLMConfig

    settings: Any = {
        "callback_class": "rayserve_hooks.HooksCallback",
        "callback_kwargs": {"callbacks": [GREETS]},
    }
    config = LLMConfig(
        model_loading_config={"model_id": "tiny"},
        callback_config=settings,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    run(config)
    assert parsed == [[GREETS]]
    assert config.callback_config.callback_kwargs == {"callbacks": [GREETS]}
