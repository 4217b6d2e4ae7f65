"""The node-initialization path on a real cluster of two nodes, without an engine.

What needs Ray is imported inside the functions: collecting these tests must stay quick.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import s3
from plugins_for_tests import hook_log
from waiting import until

import rayserve_hooks
from rayserve_hooks import CallbackCtx, Handled, HookError
from rayserve_hooks.cluster import placement, supervision
from rayserve_hooks.errors import CallbackConfigError

if TYPE_CHECKING:
    from rayserve_hooks import LLMConfig

pytestmark = pytest.mark.ray

TESTS = Path(__file__).parent.parent
SPREAD = "lifecycle_callbacks:SpreadOverNodes"


def config(*callbacks: Any, **fields: Any) -> LLMConfig:
    fields.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    model_id = fields.pop("model_id", "tiny")
    return rayserve_hooks.LLMConfig(model_id=model_id, callbacks=callbacks, **fields)


def mirrored(store: s3.Server, *callbacks: Any) -> LLMConfig:
    source = "s3://anonymous@models/tiny"
    return config(
        *callbacks,
        model_loading_config={"model_id": "tiny", "model_source": source},
        runtime_env={"env_vars": {"AWS_ENDPOINT_URL": store.url}},
    )


def initialize(llm_config: LLMConfig) -> CallbackCtx:
    return asyncio.run(rayserve_hooks.initialize_node(llm_config))


def group_states() -> list[str]:
    from ray.util.placement_group import placement_group_table

    return [group["state"] for group in placement_group_table().values()]


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> None:
    pass


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    with s3.serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "head_cache"))
        yield server


@pytest.fixture
def busy_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """Return the log, which says ten times a second what is still running."""
    for module in (placement, supervision):
        monkeypatch.setattr(module, "_LOG_EVERY_S", 0.1)
    with hook_log(caplog):
        yield caplog


def test_the_whole_path_runs_in_order_on_two_nodes(ray_cluster: Any) -> None:
    ctx = initialize(
        config(
            SPREAD,
            "lifecycle_callbacks:Last",
            "lifecycle_callbacks:Plain",
            "lifecycle_callbacks:First",
        )
    )
    head, other = ray_cluster.head_id, ray_cluster.other_id
    assert [(call.role, call.node_id, call.hook, call.callback) for call in ctx.trace] == [
        ("driver", head, "on_before_init", "First"),
        ("driver", head, "on_before_init", "SpreadOverNodes"),
        ("driver", head, "on_before_init", "Plain"),
        ("driver", head, "on_before_init", "Last"),
        ("driver", head, "on_before_download", "First"),
        ("driver", head, "on_before_download", "Plain"),
        ("node", other, "on_before_download", "First"),
        ("node", other, "on_before_download", "Plain"),
        ("driver", head, "on_after_init", "Plain"),
        ("driver", head, "on_after_init", "Last"),
    ]
    assert {call.outcome for call in ctx.trace} == {"returned"}
    assert all(call.duration_s is not None for call in ctx.trace)


def test_custom_data_goes_out_as_a_copy_and_comes_back_per_node(ray_cluster: Any) -> None:
    ctx = initialize(config(SPREAD, "lifecycle_callbacks:Plain"))
    local = ctx.nodes[ray_cluster.head_id].custom_data
    other = ctx.nodes[ray_cluster.other_id].custom_data
    assert local["set_before"] == other["set_before"] == 1
    assert local["pid"] == os.getpid() != other["pid"]
    assert ctx.custom_data["pid"] == os.getpid()


def test_one_instance_keeps_its_state_over_the_hooks_of_a_process(ray_cluster: Any) -> None:
    ctx = initialize(config(SPREAD, "lifecycle_callbacks:Plain", model_id="state"))
    assert ctx.custom_data["seen_after"] == [
        "on_before_init",
        "on_before_download",
        "on_after_init",
    ]
    assert ctx.nodes[ray_cluster.other_id].custom_data["seen"] == ["on_before_download"]


def test_a_node_task_imports_nothing_heavy(ray_cluster: Any) -> None:
    ctx = initialize(config(SPREAD, "lifecycle_callbacks:Plain", model_id="light"))
    assert ctx.nodes[ray_cluster.other_id].custom_data["heavy"] == []


def test_a_node_task_loads_the_config_when_a_callback_asks(ray_cluster: Any) -> None:
    ctx = initialize(config(SPREAD, "lifecycle_callbacks:ReadConfig"))
    assert ctx.nodes[ray_cluster.other_id].custom_data["model_id"] == "tiny"


def test_a_node_task_is_named_after_deployment_and_node(ray_cluster: Any) -> None:
    from ray.util.state import list_tasks

    ctx = initialize(config(SPREAD, model_id="named"))
    name = f"rayserve_hooks:named:{ctx.nodes[ray_cluster.other_id].node.address}"
    # The dashboard hears of a task some time later.
    until(lambda: list_tasks(ray_cluster.dashboard, filters=[("name", "=", name)]))


def test_download_modes_count_per_node(ray_cluster: Any, store: s3.Server) -> None:
    ctx = initialize(mirrored(store, SPREAD, policy("EXCLUDE_SAFETENSORS", "NONE")))
    local = files_of(ctx.nodes[ray_cluster.head_id].model_path)
    assert "config.json" in local
    assert "model.safetensors" not in local
    assert files_in(ray_cluster.other_cache) == []

    ctx = initialize(mirrored(store, SPREAD, policy("NONE", "MODEL_AND_TOKENIZER")))
    assert ctx.nodes[ray_cluster.head_id].model_path is None
    assert "model.safetensors" in files_in(ray_cluster.other_cache)
    assert ctx.nodes[ray_cluster.other_id].download_s > 0


def policy(local: str, workers: str) -> dict[str, Any]:
    return {"callback": "download_policy", "kwargs": {"local": local, "workers": workers}}


def test_a_mode_set_in_the_per_node_hook_counts(ray_cluster: Any, store: s3.Server) -> None:
    shutil.rmtree(ray_cluster.other_cache / "hub", ignore_errors=True)
    nodes = {ray_cluster.head_id: "NONE", ray_cluster.other_id: "TOKENIZER_ONLY"}
    ctx = initialize(
        mirrored(store, SPREAD, {"callback": "download_policy", "kwargs": {"nodes": nodes}})
    )
    assert ctx.nodes[ray_cluster.head_id].model_path is None
    assert "tokenizer.json" in files_in(ray_cluster.other_cache)
    assert "model.safetensors" not in files_in(ray_cluster.other_cache)


def test_an_engine_that_streams_gets_the_uri_and_nothing_is_downloaded(store: s3.Server) -> None:
    streaming = mirrored(store).model_copy(
        update={"engine_kwargs": {"load_format": "runai_streamer"}}, deep=True
    )
    ctx = initialize(streaming)
    assert [result.model_path for result in ctx.nodes.values()] == [None]
    engine: Any = streaming.get_engine_config()
    assert engine.actual_hf_model_id == "s3://anonymous@models/tiny"


def test_a_failed_download_names_node_and_phase(store: s3.Server, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(
        HookError,
        match=r"node initialization failed on node \w+ \(.*\) \(phase: download\): .*"
        r"cannot list s3://anonymous@models/tiny: .*404.*check bucket, path and endpoint",
    ):
        initialize(mirrored(store))
    assert not (tmp_path / "head_cache" / "models--tiny" / "refs").exists()


def files_of(path: str | None) -> list[str]:
    assert path is not None
    return sorted(file.name for file in Path(path).iterdir())


def files_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("hub/models--tiny/snapshots/*/*"))


def test_handled_skips_nodes_and_sets_the_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    llm_config = config("lifecycle_callbacks:TakeOver", "lifecycle_callbacks:Plain")
    with pytest.raises(HookError, match="has no attribute 'seen'"):
        initialize(llm_config)  # Plain.on_before_init was skipped, its on_after_init was not
    llm_config = config("lifecycle_callbacks:TakeOver", "lifecycle_callbacks:Last")
    ctx = initialize(llm_config)
    assert [(call.hook, call.callback, call.outcome) for call in ctx.trace] == [
        ("on_before_init", "TakeOver", "handled"),
        ("on_before_init", "Last", "skipped"),
        ("on_after_init", "Last", "returned"),
    ]
    assert not ctx.nodes
    assert ctx.trace[0].reason == "it is baked into the image"
    assert "handled: it is baked into the image" in ctx.trace.table()
    assert re.search(
        r"callback 'TakeOver' took over in on_before_init on node .*: it is baked into the image; "
        r"skipped: the default download; on_before_init of 'Last'",
        caplog.text,
    )
    assert re.search(
        r"initialized tiny in .* s: 0 node\(s\), callbacks that ran: TakeOver, Last; skipped: "
        "on_before_init of 'Last'",
        caplog.text,
    )
    engine: Any = llm_config.get_engine_config()
    assert engine.hf_model_id == "models/taken-over"


def test_on_after_init_sees_who_took_over_and_what_a_node_brought() -> None:
    see = "lifecycle_callbacks:SeeHandled"
    ctx = initialize(config("lifecycle_callbacks:TakeOver", see, model_id="taken"))
    assert ctx.custom_data["handled"] == Handled("models/taken-over", "it is baked into the image")
    assert ctx.custom_data["brought"] == []
    path = str(TESTS)
    bring = {"callback": "lifecycle_callbacks:BringModel", "kwargs": {"path": path}}
    ctx = initialize(config(bring, see, model_id="brought"))
    assert ctx.custom_data["handled"] is None
    assert ctx.custom_data["brought"] == [(path, Handled(path))]


def test_engine_arguments_reach_the_engine_and_its_front_end() -> None:
    llm_config = config(
        setting("on_before_download", extra_init_kwargs={"max_model_len": 192}),
        setting("on_after_init", "Late", extra_init_kwargs={"enable_auto_tool_choice": True}),
    )
    initialize(llm_config)
    engine: Any = llm_config.get_engine_config()
    assert engine.engine_kwargs == {"max_model_len": 192}
    assert engine.frontend_kwargs == {"enable_auto_tool_choice": True}


def test_engine_arguments_come_back_from_other_nodes(caplog: pytest.LogCaptureFixture) -> None:
    llm_config = config(
        SPREAD,
        setting("on_before_download", extra_init_kwargs={"seed": 1}),
        setting("on_before_download", "NoEffect", runtime_env={"working_dir": "x"}),
    )
    ctx = initialize(llm_config)
    assert ctx.extra_init_kwargs == {"seed": 1}
    assert re.search(
        r"callback 'NoEffect' set ctx.runtime_env.working_dir in on_before_download on node .*, "
        r"where it has no effect; set it in on_before_init",
        caplog.text,
    )


def test_engine_arguments_that_differ_between_nodes_are_logged(
    ray_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = initialize(config(SPREAD, "lifecycle_callbacks:SeedPerNode"))
    assert ctx.extra_init_kwargs == {"seed": 1}
    assert re.search(
        r"callback 'SeedPerNode' set ctx.extra_init_kwargs.seed to another value on node "
        rf"{ray_cluster.other_id} \(.*\) than is set already; the earlier value stays",
        caplog.text,
    )


def setting(hook: str, name: str = "Set", **values: Any) -> dict[str, Any]:
    return {
        "callback": "lifecycle_callbacks:Set",
        "name": name,
        "kwargs": {"hook": hook, "values": values},
    }


def test_an_unknown_engine_argument_names_the_callback_and_leaves_nothing() -> None:
    before = group_states().count("CREATED")
    llm_config = config(setting("on_before_init", extra_init_kwargs={"max_modle_len": 1}))
    with pytest.raises(
        HookError,
        match=r"callback 'Set' failed in hook on_before_init on node .* \(phase: engine "
        r"arguments\): ctx.extra_init_kwargs.max_modle_len: ValueError: Unknown engine argument",
    ):
        initialize(llm_config)
    assert "max_modle_len" not in llm_config.engine_kwargs
    assert group_states().count("CREATED") == before


def test_runtime_env_reaches_this_process_and_the_node_tasks(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_A_CALLBACK", "old")
    ctx = initialize(
        config(
            SPREAD,
            setting("on_before_init", runtime_env={"env_vars": {"FROM_A_CALLBACK": "new"}}),
            {
                "callback": "lifecycle_callbacks:ReadEnvironment",
                "kwargs": {"name": "FROM_A_CALLBACK"},
            },
        )
    )
    assert ctx.nodes[ray_cluster.head_id].custom_data["environment"] == "new"
    assert ctx.nodes[ray_cluster.other_id].custom_data["environment"] == "new"


def test_the_config_keeps_its_own_runtime_env() -> None:
    llm_config = config(
        setting("on_before_init", runtime_env={"env_vars": {"A": "2"}}),
        runtime_env={"env_vars": {"A": "1"}},
    )
    initialize(llm_config)
    assert llm_config.runtime_env == {"env_vars": {"A": "1"}}


def test_a_failure_on_another_node_names_it_and_keeps_the_cause(ray_cluster: Any) -> None:
    with pytest.raises(
        HookError,
        match=rf"callback 'FailOnOtherNode' failed in hook on_before_download on node "
        rf"{ray_cluster.other_id} \(.*\) \(phase: before download\): RuntimeError: no such bucket; "
        "fix the callback, or set 'on_error: warn' on it to go on without it; "
        "set RAYSERVE_HOOKS_DISABLE=FailOnOtherNode to start once without it$",
    ) as caught:
        initialize(config(SPREAD, "lifecycle_callbacks:FailOnOtherNode"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "lifecycle_callbacks.py" in "".join(caught.value.__cause__.__notes__)


def test_on_error_warn_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    fail = {
        "callback": "lifecycle_callbacks:Fail",
        "kwargs": {"hook": "on_before_init"},
        "on_error": "warn",
    }
    ctx = initialize(config(fail, "lifecycle_callbacks:Plain"))
    assert ctx.trace[0].outcome == "warned"
    assert "seen_after" in ctx.custom_data
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download", "on_after_init"])
def test_a_failure_removes_the_group_that_was_created(hook: str) -> None:
    before = group_states().count("CREATED")
    fail = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": hook}}
    with pytest.raises(HookError, match=f"'Fail' failed in hook {hook}"):
        initialize(config(fail))
    assert group_states().count("CREATED") == before


def test_a_value_that_cannot_travel_names_key_and_callback() -> None:
    with pytest.raises(
        HookError,
        match=r"callback 'Unpicklable' failed in hook on_before_init .*ctx.custom_data\['client'\] "
        r"cannot be sent to another process: TypeError: cannot pickle 'generator' object; store "
        "plain data there and keep the object on the callback",
    ):
        initialize(config(SPREAD, "lifecycle_callbacks:Unpicklable"))


def test_a_value_that_cannot_come_back_names_key_and_callback() -> None:
    from ray.serve._private.utils import ensure_serialization_context

    ensure_serialization_context()  # as in a replica
    with pytest.raises(
        HookError,
        match=r"callback 'Lock' failed in hook on_before_init .*ctx.custom_data\['lock'\] cannot",
    ):
        initialize(config(SPREAD, "lifecycle_callbacks:Lock"))


def test_different_paths_on_nodes_are_an_error_naming_both(ray_cluster: Any) -> None:
    with pytest.raises(
        HookError,
        match=rf"the engine needs one model path on all nodes, got {ray_cluster.head_id} .*: "
        rf"'{TESTS}', {ray_cluster.other_id} .*: '{TESTS.parent}'; return the same path",
    ):
        initialize(config(SPREAD, "lifecycle_callbacks:PathPerNode"))


@pytest.mark.parametrize("path", ["/models/typo", "models/of/nobody", "./models", "~/models"])
def test_a_path_that_is_not_there_is_an_error_on_that_node(ray_cluster: Any, path: str) -> None:
    bring = {
        "callback": "lifecycle_callbacks:BringModel",
        "kwargs": {"path": str(TESTS), "other_path": path},
    }
    with pytest.raises(
        HookError,
        match=rf"^callback 'BringModel' failed in hook on_before_download on node "
        rf"{ray_cluster.other_id} \(.*\) .*: Handled\(model_path='{path}'\) "
        "names nothing that is there on this node; put the model there first, or return None to "
        "have it downloaded; set RAYSERVE_HOOKS_DISABLE=BringModel to start once without it$",
    ):
        initialize(config(SPREAD, bring))


def test_a_path_that_is_not_there_is_an_error_before_anything_is_placed() -> None:
    take_over = {"callback": "lifecycle_callbacks:TakeOver", "kwargs": {"path": "/models/typo"}}
    before = len(group_states())
    with pytest.raises(
        HookError,
        match=r"^callback 'TakeOver' failed in hook on_before_init on node .* \(phase: before "
        r"init\): Handled\(model_path='/models/typo'\) names nothing",
    ):
        initialize(config(take_over))
    assert len(group_states()) == before


def test_a_blocking_callback_leaves_the_event_loop_free() -> None:
    import lifecycle_callbacks

    async def main() -> None:
        task = asyncio.create_task(
            rayserve_hooks.initialize_node(config("lifecycle_callbacks:Block"))
        )
        asyncio.get_running_loop().call_later(0.2, lifecycle_callbacks.RELEASE.set)
        await task

    asyncio.run(main())


def test_a_group_supplied_by_a_callback_is_the_only_one() -> None:
    before = len(group_states())
    initialize(config({"callback": "custom_placement_group", "kwargs": {"bundles": [{"CPU": 1}]}}))
    assert len(group_states()) == before + 1


def test_a_group_that_waits_for_resources_says_what_for_and_is_removed(
    ray_cluster: Any, busy_log: pytest.LogCaptureFixture
) -> None:
    from ray.util.placement_group import placement_group

    assert placement_group([{"other": 4}]).wait(30)
    pending = group_states().count("PENDING")
    llm_config = config(
        placement_group_config={"bundles": [{"other": 1}]}, time_limits={"total": 1}
    )
    with pytest.raises(
        HookError,
        match=r"^node initialization failed on node .* \(phase: placement\): not done after 1 s, "
        r"the time limit 'total'; see what it waits for, or raise the limit in time_limits; still "
        rf"running: placement on node {ray_cluster.head_id} \(.*\)$",
    ):
        initialize(llm_config)
    group = r"[0-9a-f]{20,}"
    assert re.search(
        rf"waiting for placement group {group}, bundles \[{{'other': 1.0}}\]; 'ray "
        "status' shows what is free",
        busy_log.text,
    )
    assert re.search(
        rf"removed placement group {group}, which this initialization had made", busy_log.text
    )
    assert group_states().count("PENDING") == pending


NO_AUTOSCALER = (
    r", and no autoscaler runs that would add one: node [0-9a-f]+ \(.*\) has {.*'CPU': 8.0.*}; "
    r"node [0-9a-f]+ \(.*\) has {.*'other': 4.0}; ask for less in placement_group_config, or where "
    "the group is made, or add nodes"
)


@pytest.mark.usefixtures("busy_log")
@pytest.mark.parametrize(
    ("bundles", "strategy", "text"),
    [
        ([{"GPU": 1}], "PACK", "no node can hold bundle {'GPU': 1.0}"),
        ([{"CPU": 1}, {"CPU": 9}], "SPREAD", "no node can hold bundle {'CPU': 9.0}"),
        ([{"CPU": 1, "other": 1}], "PACK", "no node can hold bundle {'CPU': 1.0, 'other': 1.0}"),
        ([{"CPU": 5}] * 2, "PACK", "no nodes can hold all bundles, together {'CPU': 10.0}"),
        (
            [{"CPU": 1}, {"other": 1}],
            "STRICT_PACK",
            "no node can hold all bundles of a STRICT_PACK group, together {'CPU'",
        ),
        (
            [{"CPU": 1}] * 3,
            "STRICT_SPREAD",
            r"no 3 nodes are there for the bundles of a STRICT_SPREAD group, \[{'CPU': 1.0}, ",
        ),
    ],
)
def test_a_group_that_can_never_be_had_is_an_error_at_once(
    bundles: list[dict[str, float]], strategy: str, text: str
) -> None:
    before = group_states().count("PENDING")
    llm_config = config(placement_group_config={"bundles": bundles, "strategy": strategy})
    with pytest.raises(
        HookError,
        match=rf"^node initialization failed on node .* \(phase: placement\): "
        rf"ctx.placement_group: {text}.*{NO_AUTOSCALER}$",
    ):
        initialize(llm_config)
    assert group_states().count("PENDING") == before


@pytest.mark.usefixtures("busy_log")
def test_a_group_of_a_callback_that_can_never_be_had_names_it() -> None:
    mine = {"callback": "custom_placement_group", "kwargs": {"bundles": [{"GPU": 2}]}}
    with pytest.raises(
        HookError,
        match=r"^callback 'custom_placement_group' failed in hook on_before_init .* \(phase: "
        rf"placement\): ctx.placement_group: no node can hold bundle {{'GPU': 2.0}}{NO_AUTOSCALER}"
        "; set RAYSERVE_HOOKS_DISABLE=custom_placement_group to start once without it$",
    ):
        initialize(config(mine))


def test_a_group_that_an_autoscaler_may_bring_is_waited_for(
    busy_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayserve_hooks.cluster._ray.autoscaler_runs", lambda: True)
    llm_config = config(placement_group_config={"bundles": [{"GPU": 1}]}, time_limits={"total": 1})
    with pytest.raises(HookError, match="not done after 1 s, the time limit 'total'"):
        initialize(llm_config)
    assert re.search(
        r"no node can hold bundle {'GPU': 1.0}: node .* has {.*}; waiting for an autoscaler to add "
        "nodes",
        busy_log.text,
    )


def test_a_group_that_is_gone_names_who_set_it() -> None:
    with pytest.raises(
        HookError,
        match=r"^callback 'RemovedGroup' failed in hook on_before_init on node .* \(phase: "
        r"placement\): ctx.placement_group: Exception: Placement group .* does not exist",
    ):
        initialize(config("lifecycle_callbacks:RemovedGroup"))


def test_a_group_that_cannot_be_made_is_an_error_of_that_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise ValueError("bad strategy")

    monkeypatch.setattr("rayserve_hooks.cluster._ray.create_default_placement_group", refuse)
    with pytest.raises(
        HookError,
        match=r"^node initialization failed on node .* \(phase: placement\): ValueError: bad "
        "strategy$",
    ):
        initialize(config())


def test_a_variable_that_the_system_refuses_names_who_set_it() -> None:
    variables = {"env_vars": {"MODE": "a\0b"}}
    with pytest.raises(
        HookError,
        match=r"^callback 'Set' failed in hook on_before_init on node .* \(phase: before init\): "
        "ctx.runtime_env.env_vars.MODE: ValueError: embedded null byte",
    ):
        initialize(config(setting("on_before_init", runtime_env=variables)))


def test_a_log_line_says_what_is_still_running(
    ray_cluster: Any, busy_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lifecycle_callbacks

    pattern = (
        rf"initialization of running after \d+ s: before init on node {ray_cluster.head_id} "
        r"\(.*\), callback 'Block' for \d+ s"
    )

    def release(record: logging.LogRecord) -> bool:
        if re.search(pattern, record.getMessage()):
            lifecycle_callbacks.RELEASE.set()
        return True

    lifecycle_callbacks.RELEASE.clear()
    monkeypatch.setattr(busy_log.handler, "filters", [release])
    initialize(config("lifecycle_callbacks:Block", model_id="running"))
    assert re.search(pattern, busy_log.text), busy_log.text
    assert re.search(
        r"initialized running in .* s: 1 node\(s\), callbacks that ran: Block", busy_log.text
    )


def test_replacing_the_group_this_process_runs_in_is_logged(ray_cluster: Any) -> None:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def in_a_group() -> tuple[str, bool]:
        written = io.StringIO()
        logging.getLogger("ray.serve.rayserve_hooks").addHandler(logging.StreamHandler(written))
        own = ray.util.get_current_placement_group()
        mine = {"callback": "custom_placement_group", "kwargs": {"bundles": [{"CPU": 1}]}}
        llm_config = rayserve_hooks.LLMConfig(model_id="tiny", callbacks=[mine])
        ctx = asyncio.run(rayserve_hooks.initialize_node(llm_config))
        assert ctx.placement_group is not None
        assert own is not None
        return written.getvalue(), ctx.placement_group.id != own.id

    group = placement_group([{"CPU": 1}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    task = ray.remote(in_a_group).options(num_cpus=1, scheduling_strategy=strategy)
    text, replaced = ray.get(task.remote())
    assert replaced
    assert re.search(
        r"callback 'custom_placement_group' replaced the placement group that Ray Serve made for "
        r"this replica; that one, bundles \[\{'CPU': 1.0\}\], stays reserved as long as the "
        "replica lives; to have only one, set placement_group_config of the LLMConfig instead",
        text,
    ), text


def test_a_callback_that_is_only_on_the_cluster(tmp_path: Path) -> None:
    import ray

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "only_there.py").write_text(
        "class There:\n    def on_before_init(self, ctx):\n        ctx.custom_data['there'] = 1\n"
    )
    llm_config = config({"callback": "only_there:There", "only_on_cluster": True})
    with pytest.raises(CallbackConfigError, match="no module named 'only_there'"):
        initialize(llm_config)

    def there(llm_config: LLMConfig) -> object:
        return asyncio.run(rayserve_hooks.initialize_node(llm_config)).custom_data["there"]

    package = shutil.make_archive(str(tmp_path / "package"), "zip", tmp_path, "package")
    task = ray.remote(there).options(runtime_env={"working_dir": f"file://{package}"})
    assert ray.get(task.remote(llm_config)) == 1


BLOCKED_S = 30.0


def test_a_callback_that_blocks_leaves_a_serve_replica_responsive(ray_cluster: Any) -> None:
    from ray import serve

    @serve.deployment(
        ray_actor_options={"num_cpus": 0}, health_check_period_s=1, health_check_timeout_s=10
    )
    class Replica:
        def __init__(self) -> None:
            self.checks: list[float] = []
            self.ticks: list[float] = []

        def check_health(self) -> None:
            self.checks.append(time.monotonic())

        async def initialize(self) -> dict[str, Any]:
            ticker = asyncio.create_task(self._tick())
            block = {"callback": "lifecycle_callbacks:BlockFor", "kwargs": {"seconds": BLOCKED_S}}
            ctx = await rayserve_hooks.initialize_node(config(block))
            ticker.cancel()
            entry = ctx.trace[0]
            ended = time.monotonic()
            return {
                "role": entry.role,
                "seconds": entry.duration_s,
                "silence": [
                    max(self._gaps(times, ended - BLOCKED_S, ended))
                    for times in (self.checks, self.ticks)
                ],
            }

        async def _tick(self) -> None:
            while True:
                self.ticks.append(time.monotonic())
                await asyncio.sleep(0.1)

        @staticmethod
        def _gaps(times: list[float], start: float, end: float) -> list[float]:
            inside = [start, *(t for t in times if start < t < end), end]
            return [later - earlier for earlier, later in itertools.pairwise(inside)]

    deployment: Any = Replica
    handle: Any = serve.run(deployment.bind(), name="blocked", route_prefix="/blocked")
    try:
        result = handle.initialize.remote().result(timeout_s=120)
    finally:
        serve.delete("blocked")
    assert result["role"] == "replica"
    assert result["seconds"] >= BLOCKED_S
    # A blocked loop would be silent for all of the 30 s; this machine may be busy for some.
    assert max(result["silence"]) < BLOCKED_S / 3, result
