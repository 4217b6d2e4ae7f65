"""``on_configure``: what it sets, where it fails, and what of it reaches the replica."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import pytest
from plugins_for_tests import hook_log

import rayserve_hooks
from rayserve_hooks import CallbackCtx, HookError
from rayserve_hooks.cluster.builders import _Checked
from rayserve_hooks.errors import CallbackConfigError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def configured(*callbacks: Any, **fields: Any) -> Any:
    """Return a config as our builders hand it to Ray's."""
    fields.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    config = rayserve_hooks.LLMConfig(model_id="tiny", callbacks=callbacks, **fields)
    before = config.model_copy(deep=True)
    done = _Checked(config).configured("")
    assert config == before  # nothing writes back into a config that is read
    return done


def sets(**fields: Any) -> dict[str, Any]:
    return {"callback": "life_callbacks:Configure", "kwargs": fields}


def variable(value: str, name: str = "SetVariable") -> dict[str, Any]:
    kwargs = {"name": "GREETING", "value": value}
    return {"callback": "life_callbacks:SetVariable", "name": name, "kwargs": kwargs}


def fails(on_error: str = "raise", **kwargs: Any) -> dict[str, Any]:
    kwargs = {"hook": "on_configure", **kwargs}
    return {"callback": "life_callbacks:Trouble", "kwargs": kwargs, "on_error": on_error}


def test_what_is_set_is_in_the_config_that_serve_deploys() -> None:
    bundles = [{"CPU": 2}, {"CPU": 3}]
    config = configured(
        sets(placement_group_config={"bundles": bundles, "strategy": "SPREAD"}),
        sets(extra_init_kwargs={"max_model_len": 64, "seed": 1}) | {"name": "arguments"},
        variable("hello"),
        engine_kwargs={"seed": 0, "max_num_seqs": 4},
        runtime_env={"env_vars": {"A": "1"}},
    )
    assert config.runtime_env["env_vars"] == {"A": "1", "GREETING": "hello"}
    assert config.engine_kwargs == {"seed": 1, "max_num_seqs": 4, "max_model_len": 64}
    engine = config.get_engine_config()
    assert engine.placement_bundles == bundles
    assert engine.placement_strategy == "SPREAD"
    assert engine.engine_kwargs["max_model_len"] == 64


def test_without_the_hook_nothing_changes() -> None:
    config = configured("life_callbacks:Old")
    assert config.runtime_env is None
    assert config.callback_config.callback_kwargs["stack"].configured.trace == ()


def test_the_accelerator_is_that_of_the_bundles_that_are_set() -> None:
    config = configured(
        sets(placement_group_config={"bundles": [{"CPU": 1}]}), placement_group_config=None
    )
    assert config.accelerator_config.kind == "cpu"
    assert (
        config.get_engine_config().get_initialization_kwargs()["distributed_executor_backend"]
        == "mp"
    )


def test_variables_that_serve_takes_from_elsewhere_stay() -> None:
    options = {"ray_actor_options": {"runtime_env": {"env_vars": {"A": "1"}}}}
    config = configured(variable("hello"), deployment_config=options)
    assert config.runtime_env["env_vars"] == {"A": "1", "GREETING": "hello"}


def test_custom_data_and_the_trace_are_in_front_of_the_replicas() -> None:
    config = configured(sets(custom_data={"seen": [1]}), variable("hello"), "life_callbacks:Old")
    ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    assert ctx.custom_data["seen"] == [1]
    assert [(call.role, call.hook, call.callback) for call in ctx.trace] == [
        ("driver", "on_configure", "Configure"),
        ("driver", "on_configure", "SetVariable"),
        ("driver", "on_after_init", "Old"),
    ]
    assert ctx.trace[1].changed == ("runtime_env.env_vars.GREETING",)
    assert ctx.trace.who_changed("custom_data.seen") is ctx.trace[0]
    assert {call.pid for call in ctx.trace} == {os.getpid()}


def test_a_conflict_is_warned_of_also_with_a_later_hook(caplog: pytest.LogCaptureFixture) -> None:
    later = {
        "callback": "lifecycle_callbacks:Set",
        "kwargs": {
            "hook": "on_before_init",
            "values": {"runtime_env": {"env_vars": {"GREETING": "later"}}},
        },
    }
    with hook_log(caplog):
        config = configured(variable("hello"), variable("hi", "Second"), later)
        asyncio.run(rayserve_hooks.initialize_node(config))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    ran_last = "ran last and has the last word"
    assert warnings[:2] == [
        (
            "callbacks 'SetVariable' and 'Second' both set ctx.runtime_env.env_vars.GREETING; "
            f"'Second' {ran_last}"
        ),
        (
            "callbacks 'Second' and 'Set' both set ctx.runtime_env.env_vars.GREETING; "
            f"'Set' {ran_last}"
        ),
    ]


def test_a_failure_names_the_callback() -> None:
    with pytest.raises(
        HookError,
        match=r"^callback 'Trouble' failed in hook on_configure on node .* \(phase: configure\): "
        "RuntimeError: no such bucket; fix the callback, or set 'on_error: warn'",
    ):
        configured(fails())


def test_one_that_warns_is_gone_on_after() -> None:
    assert configured(fails("warn"), variable("hello")).runtime_env["env_vars"]


def test_the_limit_counts() -> None:
    with pytest.raises(HookError, match=r"not done after 0\.2 s, the time limit 'on_configure'"):
        configured(fails(how="hang"), time_limits={"on_configure": 0.2})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"extra_init_kwargs": {"max_modle_len": 8}},
            (
                "'Configure' failed in hook on_configure .*ctx.extra_init_kwargs.max_modle_len"
                ": ValueError: Unknown engine argument"
            ),
        ),
        (
            {"placement_group_config": {"bundles": [{"CPU": "many"}]}},
            r"callback 'Configure' failed in hook on_configure (.|\n)*ctx.placement_group_config: ",
        ),
        (
            {"custom_data": {"client": (number for number in range(1))}},
            "cannot be sent",
        ),
    ],
)
def test_what_cannot_be_deployed_names_who_has_set_it(fields: dict[str, Any], text: str) -> None:
    class Sets:
        def on_configure(self, ctx: CallbackCtx) -> None:
            for name, value in fields.items():
                getattr(ctx, name).update(value)

    callback = {"callback": Sets, "name": "Configure"}
    if "custom_data" in fields:
        callback = {"callback": "test_configure:Client"}
    with pytest.raises(HookError, match=text) as caught:
        configured(callback)
    assert caught.value.phase == "configure"


class Client:
    def on_configure(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["client"] = (number for number in range(1))


def test_vllm_plugins_that_leave_us_out_are_refused() -> None:
    in_engine = {
        "callback": "life_callbacks:LifeOfAll",
        "kwargs": {"name": "x", "log": "/dev/null"},
    }
    plugins = {
        "callback": "life_callbacks:SetVariable",
        "kwargs": {"name": "VLLM_PLUGINS", "value": "theirs"},
    }
    with pytest.raises(CallbackConfigError, match="VLLM_PLUGINS is 'theirs'"):
        configured(in_engine, plugins)


def test_a_callback_that_is_switched_off_does_not_configure() -> None:
    off = {"env_vars": {"RAYSERVE_HOOKS_DISABLE": "SetVariable"}}
    config = configured(variable("hello"), runtime_env=off)
    assert "GREETING" not in config.runtime_env["env_vars"]


def test_it_runs_where_an_event_loop_runs() -> None:
    async def build() -> Any:
        return configured(sets(extra_init_kwargs={"seed": 7}))

    assert asyncio.run(build()).engine_kwargs == {"seed": 7}


class Background:
    def on_configure(self, ctx: CallbackCtx) -> None:
        def fill() -> None:
            ctx.runtime_env["env_vars"]["FILLED"] = "1"

        ctx.run_in_background(fill)


def test_work_beside_it_has_ended() -> None:
    config = configured("test_configure:Background")
    assert config.runtime_env["env_vars"] == {"FILLED": "1"}


def test_its_fields_are_fixed_later() -> None:
    late = {
        "callback": "lifecycle_callbacks:Set",
        "kwargs": {"hook": "on_before_init", "values": {"placement_group_config": {"a": 1}}},
    }
    with pytest.raises(HookError, match="placement_group_config counts in on_configure only"):
        asyncio.run(rayserve_hooks.initialize_node(configured(late)))
