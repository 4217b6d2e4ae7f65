"""The adapter, driven as a replica drives it, without an engine."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from plugins_for_tests import hook_log

import rayserve_hooks
from rayserve_hooks import HookError
from rayserve_hooks.cluster.configure import configured
from rayserve_hooks.cluster.stacks import stack_of
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


def rays_config() -> Any:
    from ray.serve.llm import LLMConfig

    settings: Any = {
        "callback_class": "rayserve_hooks.HooksCallback",
        "callback_kwargs": {"callbacks": ["lifecycle_callbacks:Plain"]},
    }
    return LLMConfig(
        model_loading_config={"model_id": "tiny"},
        callback_config=settings,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )


def groups() -> set[str]:
    from ray.util.placement_group import placement_group_table

    return set(placement_group_table())


@pytest.mark.parametrize("kind", ["ours", "without callbacks", "rays"])
@pytest.mark.parametrize("before", [True, False])
def test_outside_of_a_replica_there_is_one_group_and_one_callback(kind: str, before: bool) -> None:
    already = groups()
    config = {
        "ours": lambda: make("lifecycle_callbacks:Plain"),
        "without callbacks": make,
        "rays": rays_config,
    }[kind]()
    # Of a config of Ray's own class its own method would make the callback, and a group.
    callback = config.get_or_create_callback() if before and kind != "rays" else None
    assert groups() == already
    ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    assert len(groups() - already) == 1
    found = config.get_or_create_callback()
    assert callback in (found, None)
    assert config.get_or_create_callback() is found
    assert found.ctx.placement_group == ctx.placement_group
    assert found.ctx.run_init_node is False
    assert len(groups() - already) == 1


def test_the_group_that_rays_method_has_made_is_used() -> None:
    already = groups()
    config = rays_config()
    group = config.get_or_create_callback().ctx.placement_group
    assert asyncio.run(rayserve_hooks.initialize_node(config)).placement_group == group
    assert len(groups() - already) == 1


def test_a_copied_config_and_one_that_was_sent_make_their_own_callback() -> None:
    config = make("lifecycle_callbacks:Plain")
    callback = config.get_or_create_callback()
    assert pickle.loads(pickle.dumps(config)).get_or_create_callback() is not callback
    changed = config.model_copy(update={"callbacks": ["lifecycle_callbacks:First"]})
    assert changed.get_or_create_callback() is not callback


def test_it_runs_the_path_and_switches_rays_own_step_off() -> None:
    config = make("lifecycle_callbacks:Plain", setting(extra_init_kwargs={"max_model_len": 64}))
    callback: Any = config.get_or_create_callback()
    group = callback.ctx.placement_group
    assert group is None
    asyncio.run(callback.run_callback("on_before_node_init"))
    assert callback.ctx.run_init_node is False
    assert callback.ctx.placement_group.bundle_specs == [{"CPU": 1.0}]
    assert config.get_engine_config().engine_kwargs["max_model_len"] == 64
    asyncio.run(callback.run_callback("on_after_node_init"))


class Ends:
    def on_configure(self, ctx: Any) -> None:
        pass

    def on_shutdown(self, ctx: Any) -> None:
        pass


@pytest.mark.parametrize("built_by_us", [True, False])
def test_before_ray_2_58_on_shutdown_is_among_what_does_not_run(
    built_by_us: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rayserve_hooks.cluster._ray.awaits_shutdown", lambda: False)
    config = make("test_slot:Ends")
    if built_by_us:
        config = configured(config, stack_of(config), "m")
    callback = config.get_or_create_callback()
    callback.begin()
    with hook_log(caplog):
        asyncio.run(callback.run_callback("on_before_node_init"))
    (text,) = (message for message in caplog.messages if message.startswith("not all hooks run"))
    needs = "on_shutdown needs Ray 2.58 or newer"
    builder = "build the app with rayserve_hooks:build_openai_app, or its other forms"
    assert text.partition(": ")[2] == (
        f"on_shutdown of 'Ends'; {needs}"
        if built_by_us
        else f"on_configure of 'Ends'; on_shutdown of 'Ends'; {builder}; {needs}"
    )


def test_one_that_is_only_on_the_cluster_has_not_configured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = make({"callback": "test_slot:Ends", "only_on_cluster": True})
    callback = configured(config, stack_of(config), "m").get_or_create_callback()
    callback.begin()
    with hook_log(caplog):
        asyncio.run(callback.run_callback("on_before_node_init"))
    assert caplog.messages[0] == (
        "not all hooks run in this replica: on_configure of 'Ends'; have these callbacks, switched "
        "on, where the app is built, too"
    )


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


def test_outside_of_a_replica_the_cause_of_a_wrong_list_is_its_own() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    config = rays_config()
    config.callback_config = CallbackConfig(
        "rayserve_hooks.HooksCallback", {"callbacks": ["failing_callbacks:NoSuch", "no_such:X"]}
    )
    with pytest.raises(ValueError, match="2 problems") as caught:
        asyncio.run(rayserve_hooks.initialize_node(config))
    assert isinstance(caught.value.__cause__, ValueError)


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
