"""A replica's life from where its app is built to its end, in Serve, seen from outside.

Most tests have an engine that starts nothing, named as a user names one; the last one has vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from apps import RUNS, groups_left, none_left, without_ingress
from waiting import until

import rayserve_hooks
from rayserve_hooks.cluster import _ray

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NAME = "life"
DEPLOYMENT = "LLMServer:tiny"


@pytest.fixture(autouse=True)
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    serve.delete(NAME)


def life(name: str, folder: Path, of_all: bool = False) -> dict[str, Any]:
    kind = "LifeOfAll" if of_all else "Life"
    kwargs = {"name": name, "log": str(folder / "log")}
    return {"callback": f"life_callbacks:{kind}", "name": name, "kwargs": kwargs}


def callbacks(folder: Path, *others: Any, of_all: bool = False) -> list[Any]:
    writes = {"callback": "life_callbacks:WriteTrace", "kwargs": {"folder": str(folder)}}
    old = {"callback": "life_callbacks:Old"}
    return [writes, life("a", folder, of_all), old, life("b", folder, of_all), *others]


def settings(folder: Path, **variables: str) -> dict[str, Any]:
    variables |= {
        "RAYLLM_VLLM_ENGINE_CLS": "fake_engine.Engine",
        "FAKE_ENGINE_LOG": str(folder / "log"),
        RUNS: str(folder),
    }
    bundles = [{"CPU": 1}, {"other": 1}]  # the replica is in the first, and a node in the second
    return {
        "model_loading_config": {"model_id": "tiny"},
        "placement_group_config": {"bundles": bundles, "strategy": "STRICT_SPREAD"},
        "runtime_env": {"env_vars": variables},
        "deployment_config": {"max_constructor_retry_count": 1},
        "log_engine_metrics": False,
    }


def run(app: Any) -> None:
    from ray import serve

    serve.run(app, name=NAME, route_prefix=f"/{NAME}")


def fails(app: Any) -> str:
    """Deploy what fails, and return what Serve says."""
    from ray import serve

    with pytest.raises(RuntimeError):
        run(app)
    return str(serve.status().applications[NAME].deployments[DEPLOYMENT].message)


def delete() -> None:
    from ray import serve

    serve.delete(NAME)


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def trace(folder: Path, name: str = "shutdown") -> list[tuple[str, str, str, str]]:
    written = json.loads((folder / f"{name}.json").read_text())
    keys = ("role", "hook", "callback", "outcome")
    return [
        (
            call["role"] + (f" {call['rank']}" if call["rank"] is not None else ""),
            *tuple(call[key] for key in keys[1:]),
        )
        for call in written["calls"]
    ]


def calls(role: str, hook: str, *names: str, outcome: str = "returned") -> list[tuple[str, ...]]:
    return [(role, hook, name, outcome) for name in names]


NODES = [
    *calls("replica", "on_before_init", "a", "b"),
    *calls("replica", "on_before_download", "a", "b"),
    *calls("node", "on_before_download", "a", "b"),
    *calls("replica", "on_after_init", "a", "Old", "b"),
]
END = [
    *calls("replica", "on_engine_ready", "a", "b"),
    *calls("replica", "on_shutdown", "b", "a"),
    *calls("replica", "on_shutdown", "WriteTrace", outcome="running"),
]
CONFIGURE = calls("driver", "on_configure", "a", "b")


def test_the_whole_life_with_our_builder_and_a_users_engine(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    config = {"callbacks": callbacks(tmp_path), **settings(tmp_path)}
    run(build_openai_app(without_ingress(config)))
    assert log(tmp_path) == ["on_engine_ready a", "on_engine_ready b"]
    (group,) = groups_left()
    assert list(group["bundles"].values()) == [{"CPU": 2.0}, {"other": 1.0}]
    delete()
    assert log(tmp_path)[2:] == ["on_shutdown b", "on_shutdown a", "engine stopped"]
    assert trace(tmp_path) == [*CONFIGURE, *NODES, *END]
    assert groups_left() == []
    none_left(tmp_path)


def test_a_replica_that_an_update_replaces_shuts_down(ray_cluster: Any, tmp_path: Path) -> None:
    from rayserve_hooks import build_openai_app

    config = {"callbacks": callbacks(tmp_path), **settings(tmp_path)}
    run(build_openai_app(without_ingress(config)))
    fields = settings(tmp_path, FAKE_ENGINE_LOG="/dev/null")
    run(build_openai_app(without_ingress({**fields, "callbacks": ["life_callbacks:Old"]})))
    assert log(tmp_path)[2:] == ["on_shutdown b", "on_shutdown a", "engine stopped"]


def test_a_replica_that_is_scaled_away_shuts_down_and_the_other_goes_on(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    fields = settings(tmp_path)
    fields["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    # Nobody asks anything, so that Serve goes down to one: when both are there, not before.
    scaling = {"initial_replicas": 2, "min_replicas": 1, "max_replicas": 2, "downscale_delay_s": 15}
    fields["deployment_config"]["autoscaling_config"] = scaling
    run(build_openai_app(without_ingress({"callbacks": callbacks(tmp_path), **fields})))
    ended = ["on_shutdown b", "on_shutdown a", "engine stopped"]
    until(lambda: log(tmp_path)[4:] == ended)
    assert sorted(log(tmp_path)[:4]) == ["on_engine_ready a"] * 2 + ["on_engine_ready b"] * 2
    delete()
    assert log(tmp_path)[7:] == ended


def test_a_group_of_a_callback_is_given_back_at_the_end(ray_cluster: Any, tmp_path: Path) -> None:
    """By the callback, in the replica: Ray would free it, too, once that process is gone."""
    from ray.serve.llm import build_openai_app

    from rayserve_hooks import LLMConfig

    fields = settings(tmp_path)
    fields["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    states = {"callback": "life_callbacks:GroupStates", "kwargs": {"file": str(tmp_path / "seen")}}
    mine = {"callback": "custom_placement_group", "kwargs": {"bundles": [{"CPU": 1}], "name": NAME}}
    # on_shutdown runs in reverse order: the first of the list sees what the others have done.
    run(build_openai_app(without_ingress(LLMConfig(callbacks=[states, mine], **fields))))
    delete()
    assert json.loads((tmp_path / "seen").read_text()) == {
        "on_engine_ready": ["CREATED"],
        "on_shutdown": ["REMOVED"],
    }
    assert groups_left() == []


def data_parallel(folder: Path) -> tuple[Any, list[str]]:
    from rayserve_hooks import build_dp_openai_app

    fields = settings(folder)
    fields["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    fields["engine_kwargs"] = {"data_parallel_size": 2}
    app = build_dp_openai_app({"llm_config": {"callbacks": callbacks(folder), **fields}})
    return app, ["a", "b"] * 2


def prefill_and_decode(folder: Path) -> tuple[Any, list[str]]:
    from rayserve_hooks import build_pd_openai_app

    fields = settings(folder)
    fields["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    fields["engine_kwargs"] = {"kv_transfer_config": connector}
    one, other = ([life(f"{what} {name}", folder) for name in "ab"] for what in ("p", "d"))
    configs = {
        "prefill_config": {"callbacks": one, **fields},
        "decode_config": {"callbacks": other, **fields},
    }
    return build_pd_openai_app(configs), ["p a", "p b", "d a", "d b"]


@pytest.mark.parametrize("kind", [data_parallel, prefill_and_decode])
def test_the_servers_of_other_patterns_have_the_same_life(
    kind: Callable[[Path], tuple[Any, list[str]]], ray_cluster: Any, tmp_path: Path
) -> None:
    app, names = kind(tmp_path)
    run(app)
    assert sorted(log(tmp_path)) == sorted(f"on_engine_ready {name}" for name in names)
    delete()
    ended = [*(f"on_shutdown {name}" for name in names), *["engine stopped"] * 2]
    assert sorted(log(tmp_path)[len(names) :]) == sorted(ended)


def test_rays_builder_leaves_out_on_configure_and_one_warning_says_so(
    ray_cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray.serve.llm import build_openai_app

    from rayserve_hooks import LLMConfig

    config = LLMConfig(callbacks=callbacks(tmp_path), **settings(tmp_path))
    run(build_openai_app(without_ingress(config)))
    delete()
    assert trace(tmp_path) == [*NODES, *END]
    texts = replica_warnings()
    assert texts == [
        (
            "not all hooks run in this replica: on_configure of 'a', 'b'; build the app with "
            "rayserve_hooks:build_openai_app, or its other forms"
        )
    ]


def replica_warnings() -> list[str]:
    """Return the warnings in the log file of the replica that was last."""
    import ray

    node: Any = ray._private.worker._global_node
    folder = Path(node.get_session_dir_path()) / "logs" / "serve"
    files = sorted(folder.glob("replica_life_LLMServer*"), key=lambda path: path.stat().st_mtime)
    lines = files[-1].read_text().splitlines()
    mark = "not all hooks run"
    return [mark + line.partition(mark)[2] for line in lines if mark in line]


@pytest.mark.parametrize("named", [False, True])
def test_yaml_with_rays_builder_has_the_engines_hooks_where_it_names_our_engine(
    named: bool, ray_cluster: Any, tmp_path: Path
) -> None:
    from ray.serve.llm import build_openai_app

    fields = settings(tmp_path)
    if named:
        fields["runtime_env"]["env_vars"] |= {
            _ray.ENGINE_VARIABLE: _ray.HOOKS_ENGINE,
            _ray.BASE_VARIABLE: "fake_engine:Engine",
        }
    fields["callback_config"] = {
        "callback_class": "rayserve_hooks.HooksCallback",
        "callback_kwargs": {"callbacks": callbacks(tmp_path)},
    }
    run(build_openai_app(yaml.safe_load(yaml.safe_dump(without_ingress(fields)))))
    delete()
    (text,) = replica_warnings()
    if named:
        assert trace(tmp_path) == [*NODES, *END]
        assert "on_configure of 'a', 'b'; build" in text
    else:
        assert log(tmp_path) == ["engine stopped"]
        assert "on_engine_ready of 'a', 'b'; on_shutdown of 'b', 'a', 'WriteTrace'" in text
        assert "on_init_failed of 'b', 'a', 'WriteTrace' (after its nodes are ready)" in text
        assert f"set {_ray.ENGINE_VARIABLE}={_ray.HOOKS_ENGINE} in the config's runtime" in text


FAILED = [
    *calls("node", "on_init_failed", "b", "a"),
    *calls("node", "on_init_failed", "WriteTrace"),
    *calls("replica", "on_init_failed", "b", "a"),
    *calls("replica", "on_init_failed", "WriteTrace", outcome="running"),
]


def test_a_failing_on_engine_ready_cleans_up_on_every_node(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    trouble = {"callback": "life_callbacks:Trouble", "kwargs": {"hook": "on_engine_ready"}}
    config = {"callbacks": callbacks(tmp_path, trouble), **settings(tmp_path)}
    message = fails(build_openai_app(without_ingress(config)))
    assert "callback 'Trouble' failed in hook on_engine_ready on node" in message
    assert "(phase: engine ready): RuntimeError: no such bucket; fix the callback" in message
    found = trace(tmp_path, "failed")
    assert found[-len(FAILED) :] == FAILED
    assert ("replica", "on_engine_ready", "Trouble", "failed") in found
    assert not any(call[1] == "on_shutdown" for call in found)
    none_left(tmp_path)


def test_an_engine_that_fails_to_start_cleans_up_on_every_node(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    fields = settings(tmp_path, FAKE_ENGINE_FAILS="1")
    config = {"callbacks": callbacks(tmp_path), **fields}
    message = fails(build_openai_app(without_ingress(config)))
    assert "(phase: engine start): RuntimeError: no memory left for the cache" in message
    found = trace(tmp_path, "failed")
    assert found == [*CONFIGURE, *NODES, *FAILED]
    none_left(tmp_path)


def test_a_replica_that_is_deleted_while_its_engine_starts_cleans_up(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from ray import serve

    from rayserve_hooks import build_openai_app

    fields = settings(tmp_path, FAKE_ENGINE_HANGS="1")
    app = build_openai_app(without_ingress({"callbacks": callbacks(tmp_path), **fields}))
    serve._run(app, name=NAME, route_prefix=f"/{NAME}", _blocking=False)
    file = tmp_path / "log"
    until(lambda: file.exists() and log(tmp_path) == ["engine starting"])
    delete()
    assert log(tmp_path)[1:] == [*["on_init_failed b", "on_init_failed a"] * 2, "engine stopped"]
    assert trace(tmp_path, "failed") == [*CONFIGURE, *NODES, *FAILED]


def test_a_failing_or_slow_on_shutdown_keeps_nobody_from_shutting_down(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    raises = {"callback": "life_callbacks:Trouble", "kwargs": {"hook": "on_shutdown"}}
    hangs = {"hook": "on_shutdown", "how": "hang"}
    slow = {"callback": "life_callbacks:Trouble", "name": "slow", "kwargs": hangs}
    fields = settings(tmp_path)
    # Of this 21 s are the hook's, and 7 s are left for the engine, on a busy machine too.
    fields["deployment_config"]["graceful_shutdown_timeout_s"] = 30
    fields["time_limits"] = {"on_shutdown": 60}
    config = {"callbacks": [slow, *callbacks(tmp_path, raises)], **fields}
    run(build_openai_app(without_ingress(config)))
    delete()
    assert log(tmp_path)[2:] == ["on_shutdown b", "on_shutdown a", "engine stopped"]
    assert ("replica", "on_shutdown", "Trouble", "failed") in trace(tmp_path)


def test_a_replica_that_is_killed_in_on_engine_ready_leaves_nothing(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from rayserve_hooks import build_openai_app

    file = tmp_path / "pid"
    kwargs = {"hook": "on_engine_ready", "how": "kill", "file": str(file)}
    killed = {"callback": "life_callbacks:Trouble", "kwargs": kwargs}
    config = {"callbacks": callbacks(tmp_path, killed), **settings(tmp_path)}
    message = fails(build_openai_app(without_ingress(config)))
    assert "ActorDiedError" in message  # all that Serve says; its controller's log names the actor
    assert not psutil.pid_exists(int(file.read_text()))
    none_left(tmp_path)
    delete()
    assert groups_left() == []


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("no_such_module.Engine", "names 'no_such_module.Engine', which cannot be imported in"),
        ("fake_engine.NO_ENGINE", "names 'fake_engine.NO_ENGINE', which is no engine class; name"),
    ],
)
def test_an_engine_that_is_none_is_refused_in_words(
    named: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_ray.BASE_VARIABLE, named)
    with pytest.raises(ImportError, match=text):
        _ = _ray.VLLMEngine


def config_of(*names: str, **fields: Any) -> Any:
    fields.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    return rayserve_hooks.LLMConfig(model_id="m", callbacks=list(names), **fields)


def variables_of(config: Any) -> dict[str, str]:
    """Return what a deployment of a config has in its environment."""
    from ray.serve.llm import LLMServer

    options = LLMServer.get_deployment_options(config)
    return dict(options["ray_actor_options"]["runtime_env"].get("env_vars", {}))


def test_the_engine_is_ours_only_where_a_callback_needs_it(ray_cluster: Any) -> None:
    assert _ray.ENGINE_VARIABLE not in variables_of(config_of("life_callbacks:Old"))
    assert _ray.ENGINE_VARIABLE not in variables_of(config_of())
    for name in ("WriteTrace", "Trouble", "LifeOfAll"):
        kwargs = {"folder": "/x"} if name == "WriteTrace" else {"hook": "x"}
        kwargs = {"name": "x", "log": "/x"} if name == "LifeOfAll" else kwargs
        entry = {"callback": f"life_callbacks:{name}", "kwargs": kwargs}
        assert variables_of(config_of(entry))[_ray.ENGINE_VARIABLE] == _ray.HOOKS_ENGINE  # type: ignore[arg-type]


def test_variables_from_elsewhere_stay(ray_cluster: Any) -> None:
    writes = {"callback": "life_callbacks:WriteTrace", "kwargs": {"folder": "/x"}}
    options = {"ray_actor_options": {"runtime_env": {"env_vars": {"A": "1"}}}}
    config = config_of(writes, deployment_config=options)  # type: ignore[arg-type]
    variables = variables_of(config)
    assert variables["A"] == "1"
    assert variables[_ray.ENGINE_VARIABLE] == _ray.HOOKS_ENGINE
    assert variables_of(config) == variables


def test_a_users_engine_becomes_the_base_of_ours(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: Any = {"callback": "life_callbacks:WriteTrace", "kwargs": {"folder": "/x"}}
    monkeypatch.setenv(_ray.ENGINE_VARIABLE, "theirs.Engine")
    assert variables_of(config_of(writes))[_ray.BASE_VARIABLE] == "theirs.Engine"
    env = {"env_vars": {_ray.ENGINE_VARIABLE: "mine:Engine"}}
    assert variables_of(config_of(writes, runtime_env=env))[_ray.BASE_VARIABLE] == "mine:Engine"


@pytest.fixture
def engine_settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    fields = settings(tmp_path)
    del fields["runtime_env"]["env_vars"]["RAYLLM_VLLM_ENGINE_CLS"]
    fields["runtime_env"]["env_vars"] |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    return fields | {
        "model_loading_config": {"model_id": "tiny", "model_source": str(tiny_model)},
        "placement_group_config": {"bundles": [{"CPU": 1}, {"CPU": 1}]},
        "engine_kwargs": {
            "max_model_len": 512,
            "enforce_eager": True,
            "max_num_seqs": 4,
            "tensor_parallel_size": 2,
            "gpu_memory_utilization": 0.2,
        },
    }


ENGINE = [
    *calls("replica", "on_before_init", "a", "b"),
    *calls("replica", "on_before_download", "a", "b"),
    *calls("replica", "on_after_init", "a", "Old", "b"),
    *calls("replica", "on_before_engine_init", "a", "b"),
    *calls("engine core", "on_before_engine_init", "a", "b"),
    *calls("worker 0", "on_before_engine_init", "a", "b"),
    *calls("worker 1", "on_before_engine_init", "a", "b"),
    *END,
]


def in_python_with_our_builder(folder: Path, fields: dict[str, Any]) -> None:
    config = rayserve_hooks.LLMConfig(callbacks=callbacks(folder, of_all=True), **fields)
    run(rayserve_hooks.build_openai_app({"llm_configs": [config]}))


def in_python_with_rays_builder(folder: Path, fields: dict[str, Any]) -> None:
    from ray.serve.llm import build_openai_app

    config = rayserve_hooks.LLMConfig(callbacks=callbacks(folder, of_all=True), **fields)
    run(build_openai_app({"llm_configs": [config]}))


def in_yaml_with_our_builder(folder: Path, fields: dict[str, Any]) -> None:
    config = {**fields, "callbacks": callbacks(folder, of_all=True)}
    deploy_file("rayserve_hooks:build_openai_app", config)


def in_yaml_with_rays_builder(folder: Path, fields: dict[str, Any]) -> None:
    fields["runtime_env"]["env_vars"][_ray.ENGINE_VARIABLE] = _ray.HOOKS_ENGINE
    kwargs = {"callbacks": callbacks(folder, of_all=True)}
    named = {"callback_class": "rayserve_hooks.HooksCallback", "callback_kwargs": kwargs}
    deploy_file("ray.serve.llm:build_openai_app", {**fields, "callback_config": named})


def deploy_file(builder: str, config: dict[str, Any]) -> None:
    """Do as ``serve run`` with a file."""
    from ray._common.utils import import_attr
    from ray.serve import schema
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    args = yaml.safe_load(yaml.safe_dump({"llm_configs": [config]}))
    schema.ServeApplicationSchema(import_path=builder, args=args)
    run(call_user_app_builder_with_args_if_necessary(import_attr(builder), args))


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("deploy", "before"),
    [
        (in_python_with_our_builder, CONFIGURE),
        (in_yaml_with_our_builder, CONFIGURE),
        (in_python_with_rays_builder, []),
        (in_yaml_with_rays_builder, []),
    ],
)
def test_the_whole_life_with_the_real_engine(
    deploy: Callable[[Path, dict[str, Any]], None],
    before: list[Any],
    ray_cluster: Any,
    engine_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    deploy(tmp_path, engine_settings)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    url = f"http://127.0.0.1:{ray_cluster.http_port}/{NAME}/v1/chat/completions"
    assert requests.post(url, json=body, timeout=120).status_code == 200
    assert log(tmp_path) == ["on_engine_ready a", "on_engine_ready b"]
    assert len(groups_left()) == 1
    delete()
    assert trace(tmp_path) == [*before, *ENGINE]
    written = json.loads((tmp_path / "shutdown.json").read_text())
    pids = {(call["role"], call["rank"]): call["pid"] for call in written["calls"]}
    assert len({*pids.values()}) == len(pids)
    assert groups_left() == []
    none_left(tmp_path)


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_an_engine_whose_replica_is_killed_in_on_engine_ready_leaves_nothing(
    ray_cluster: Any, engine_settings: dict[str, Any], tmp_path: Path
) -> None:
    kwargs = {"hook": "on_engine_ready", "how": "kill", "file": str(tmp_path / "pid")}
    killed = {"callback": "life_callbacks:Trouble", "kwargs": kwargs}
    config = {"callbacks": [killed, *callbacks(tmp_path, of_all=True)], **engine_settings}
    message = fails(rayserve_hooks.build_openai_app(without_ingress(config)))
    assert "ActorDiedError" in message
    delete()
    none_left(tmp_path)
    assert groups_left() == []
