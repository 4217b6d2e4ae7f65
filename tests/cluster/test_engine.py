"""The hooks in the processes of a real engine, seen from outside.

What needs Ray is imported inside the functions: collecting these tests must stay quick.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from apps import RUNS, groups_left, none_left, without_ingress

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

HOOK = "on_before_engine_init"
# vLLM gives a core five minutes to come up; a failed hook must not wait for that.
SOON_S = 150


def folders(cluster: Any) -> set[Path]:
    """Return the folders of this cluster's nodes; another cluster may use this machine, too."""
    here = f"rayserve_hooks-engine-{os.geteuid()}-*-{cluster.head_id}"
    return set(Path("/tmp").glob(here))


@pytest.fixture(autouse=True)
def _nothing_left(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name)
    assert folders(ray_cluster) == set(), "a start has left its folder"


def callback(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"callback": f"engine_callbacks:{name}", "kwargs": kwargs}


def config(model: Path, *callbacks: Any, ranks: int = 1) -> dict[str, Any]:
    engine: dict[str, Any] = {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4}
    env_vars = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if ranks > 1:
        # vLLM refuses to start several ranks on CPUs without a variable, which this sets.
        callbacks = (callback("BindThreads", ranks=ranks), *callbacks)
        engine |= {"tensor_parallel_size": ranks, "gpu_memory_utilization": 0.2}
    return {
        "model_loading_config": {"model_id": "tiny", "model_source": str(model)},
        "placement_group_config": {"bundles": [{"CPU": 1}] * ranks},
        "engine_kwargs": engine,
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": env_vars},
        "deployment_config": {"max_constructor_retry_count": 1},
        "callbacks": list(callbacks),
    }


def run(args: dict[str, Any]) -> None:
    from ray import serve

    from rayserve_hooks import build_openai_app

    serve.run(build_openai_app(args), name="app", route_prefix="/app")


def chat(cluster: Any) -> int:
    url = f"http://127.0.0.1:{cluster.http_port}/app/v1/chat/completions"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return requests.post(url, json=body, timeout=120).status_code


def failure(model: Path, *callbacks: Any, ranks: int = 1) -> str:
    """Return what Serve's status says of a replica whose start fails, and leaves nothing."""
    from ray import serve

    fields, mark = config(model, *callbacks, ranks=ranks), uuid.uuid4().hex
    fields["runtime_env"]["env_vars"][RUNS] = mark
    with pytest.raises(RuntimeError):
        run(without_ingress(fields))
    message = str(serve.status().applications["app"].deployments["LLMServer:tiny"].message)
    serve.delete("app")
    none_left(mark)
    assert groups_left() == []
    return message


def seen_in(folder: Path) -> dict[str, Any]:
    """Return by process what `Tell` has seen; each has told once."""
    told = [json.loads(file.read_text()) for file in folder.iterdir()]
    by_process = {seen["process"]: seen for seen in told}
    assert len(by_process) == len(told), "a process has run the hook twice"
    return by_process


def test_the_replica_the_core_and_two_ranks_run_it_once_each(
    ray_cluster: Any, tiny_model: Path, tmp_path: Path
) -> None:
    told, trace = tmp_path / "told", tmp_path / "trace"
    told.mkdir()
    callbacks = [
        callback("Tell", folder=str(told)),
        callback("Only"),
        callback("WriteTrace", path=str(trace)),
    ]
    run({"llm_configs": [config(tiny_model, *callbacks, ranks=2)]})
    assert chat(ray_cluster) == 200
    processes = ["replica", "engine core", "worker 0", "worker 1"]
    seen = seen_in(told)
    assert sorted(seen) == sorted(processes)
    assert len({one["pid"] for one in seen.values()}) == len(processes)
    for process, one in seen.items():
        expected = {
            "process": process,
            "pid": one["pid"],
            "node": ray_cluster.head_id,
            "model_id": "tiny",
            "said": "after",
            "stays": process == "replica",
            "nodes": {ray_cluster.head_id: ["said", "stays"] if process == "replica" else ["said"]},
            "max_model_len": 256,
        }
        assert one == expected
    calls = json.loads(trace.read_text())
    assert [call[:4] for call in calls] == [
        ["replica", "on_before_init", "BindThreads", "returned"],
        ["replica", "on_before_init", "Tell", "returned"],
        ["replica", "on_after_init", "Tell", "returned"],
        ["replica", "on_after_init", "Only", "returned"],
        *([process, HOOK, "Tell", "returned"] for process in processes),
        ["replica", "on_engine_ready", "WriteTrace", "running"],
    ]
    assert [call[4] for call in calls[4:8]] == [seen[process]["pid"] for process in processes]


@pytest.mark.parametrize(
    ("process", "how", "text"),
    [
        ("worker 1", "raise", "RuntimeError: no such parser; fix the callback"),
        ("engine core", "kill", "its process was killed; see the replica's log"),
        ("worker 0", "kill", "its process was killed; see the replica's log"),
    ],
)
def test_a_hook_that_fails_in_a_process_is_in_serves_status_and_soon(
    process: str, how: str, text: str, ray_cluster: Any, tiny_model: Path
) -> None:
    started = time.monotonic()
    message = failure(tiny_model, callback("Trouble", process=process, how=how), ranks=2)
    assert time.monotonic() - started < SOON_S
    where = f"callback 'Trouble' failed in hook {HOOK} on node {ray_cluster.head_id} "
    assert re.search(
        rf"HookError: {re.escape(where)}\(.*\), {process} \(phase: before engine init\): "
        f"{re.escape(text)}",
        message,
    ), message


def test_vllm_plugins_that_a_callback_sets_is_refused_in_the_replica(
    ray_cluster: Any, tiny_model: Path
) -> None:
    trouble = callback("Trouble", process="none")
    message = failure(tiny_model, callback("ChoosePlugins"), trouble)
    assert "on_before_engine_init cannot run in the engine's processes: VLLM_PLUGINS is" in message
    assert "set VLLM_PLUGINS=lora_filesystem_resolver,rayserve_hooks, or remove it" in message
