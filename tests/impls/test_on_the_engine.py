"""The callbacks of a start on the real engine.

What needs Ray is imported inside the functions: collecting these tests must stay quick.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import own_model
import pytest
import requests
from test_notify import Webhook, serving
from test_shapes import make_adapter
from test_startup_timeline import Page
from waiting import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(800)]

MODEL = "org/tiny"


@pytest.fixture(autouse=True)
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name)


@pytest.fixture
def hf_url(tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    """Serve the tiny model under an architecture's name that vLLM does not know."""
    folder = shutil.copytree(tiny_model, tmp_path / "hub" / MODEL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": [own_model.ARCHITECTURE]})
    )
    with hub.serving(tmp_path / "hub") as running:
        yield running.url


@pytest.fixture
def adapter(tmp_path: Path, moto: str) -> str:
    """Return the name of a LoRA adapter in the bucket ``adapters``; Ray keeps one per name."""
    import boto3

    name = f"adapter-{uuid.uuid4().hex}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    store: Any = boto3.client("s3", endpoint_url=moto, region_name="us-east-1", **keys)
    store.create_bucket(Bucket="adapters")
    for file in make_adapter(tmp_path / "adapter").iterdir():
        store.upload_file(str(file), "adapters", f"{name}/{file.name}")
    return name


def deploy(name: str, model: str, callbacks: list[Any], **fields: Any) -> None:
    from ray import serve

    from rayserve_hooks import LLMConfig, build_openai_app

    engine_kwargs = {"max_model_len": 512, "max_num_seqs": 4, **fields.pop("engine_kwargs", {})}
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "CACHE_KEY": "k" * 32, **fields.pop("env_vars", {})}
    config = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": model},
        placement_group_config=fields.pop("placement_group_config", {"bundles": [{"CPU": 1}]}),
        engine_kwargs=engine_kwargs,
        log_engine_metrics=False,
        runtime_env={"env_vars": variables},
        callbacks=callbacks,
        **fields,
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name=name, route_prefix=f"/{name}")


def chat(ray_cluster: Any, name: str, model: str = "tiny") -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "ignore_eos": True,
    }
    url = f"http://127.0.0.1:{ray_cluster.http_port}/{name}/v1/chat/completions"
    answer = requests.post(url, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    message: dict[str, Any] = answer.json()["choices"][0]["message"]
    return message


def shipped(name: str, **kwargs: Any) -> dict[str, Any]:
    """Return a config's entry for a shipped callback."""
    return {"callback": name, "kwargs": kwargs}


def test_all_of_them_in_one_stack_start_answer_and_shut_down(
    ray_cluster: Any, hf_url: str, adapter: str, moto: str, tmp_path: Path
) -> None:
    """With a model and a parser that vLLM does not know.

    All but ``custom_initialization``, after which nothing of the others' nodes would run.
    """
    from ray import serve

    pages, extra, store = (tmp_path / name for name in ("pages", "extra", "store"))
    (tmp_path / "notes.txt").write_text("read me")
    store.mkdir(mode=0o700)
    with serving(Webhook()) as webhook:
        stack = [
            shipped("startup_metrics"),
            shipped("startup_timeline", folder=str(pages)),
            shipped("notify", url=webhook.url),
            shipped("custom_placement_group", bundles=[{"CPU": 1}]),
            shipped("download_policy", local="MODEL_AND_TOKENIZER"),
            shipped("cloud_files", paths=[[f"file://{tmp_path}/notes.txt", f"{extra}/notes.txt"]]),
            shipped("lora_prefetch", adapters=[adapter], required=True),
            shipped("hf_prefetch", repo_id=MODEL, revision="main"),
            shipped(
                "compile_cache",
                store=str(store),
                key_variable="CACHE_KEY",
                folder=str(tmp_path / "cache"),
            ),
            shipped("engine_modules", modules=["own_model:register", "own_model:register_parser"]),
            shipped("warm_up", requests=3, on_failure="raise", timeout_s=240.0),
        ]
        deploy(
            "own",
            MODEL,
            stack,
            placement_group_config=None,
            engine_kwargs={
                "enforce_eager": True,
                "reasoning_parser": own_model.PARSER,
                "enable_lora": True,
                "max_lora_rank": 8,
                "max_loras": 1,
            },
            lora_config={"dynamic_lora_loading_path": "s3://adapters"},
            env_vars={
                "HF_ENDPOINT": hf_url,
                "HF_HOME": str(tmp_path / "home"),
                "AWS_ENDPOINT_URL": moto,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        )
        for model in ("tiny", f"tiny:{adapter}"):
            message = chat(ray_cluster, "own", model)
            reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
            assert reasoning.startswith("thought: "), message
        until(lambda: webhook.events == ["start", "ready"])
        serve.delete("own")
        until(lambda: webhook.events == ["start", "ready", "shutdown"])
    ready = webhook.messages[1]
    assert ready["app"] == "own"
    assert "tiny" in ready["deployment"]
    assert 1 < ready["seconds"] < 300
    assert (extra / "notes.txt").read_text() == "read me"
    (page,) = pages.glob("startup-*.html")
    titles = [title for _, title in Page(page.read_text()).bars]
    for call in ("warm_up on_engine_ready", "lora_prefetch on_before_download"):
        assert any(title.startswith(f"{call}: ") for title in titles)
    trace = json.loads(page.with_suffix(".json").read_text())
    lanes = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert any(lane.startswith("replica, ") for lane in lanes)
    assert any(lane.startswith("engine core, ") for lane in lanes)
    registered = [e for e in trace["traceEvents"] if "engine_modules " in e["name"]]
    assert {lanes[event["pid"] - 1].split(",")[0] for event in registered} >= {
        "replica",
        "engine core",
    }
    lines = log_lines(ray_cluster, "own")
    assert any("compile cache: inert; vLLM has written no compile cache" in line for line in lines)
    assert not [line for line in lines if " ERROR " in line]


def log_lines(ray_cluster: Any, app: str) -> list[str]:
    """Return what an app's replicas have logged."""
    logs = Path(ray_cluster.cluster.head_node.get_logs_dir_path())
    files = logs.glob(f"serve/replica_{app}_LLMServer*.log")
    return [line for path in files for line in path.read_text().splitlines()]


def test_a_compile_cache_is_saved_and_hit_by_the_next_replica(
    ray_cluster: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from ray import serve

    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    outcomes = []
    for machine in ("one", "two"):
        folder = str(tmp_path / machine)
        cache = shipped("compile_cache", store=str(store), key_variable="CACHE_KEY", folder=folder)
        deploy(machine, str(tiny_model), [cache])
        chat(ray_cluster, machine)
        until(lambda: list(store.glob("*.archive")))
        serve.delete(machine)
        lines = log_lines(ray_cluster, machine)
        outcomes.append([line for line in lines if "compile cache" in line])
    first, second = outcomes
    assert any("compile cache: miss; the store holds no archive yet" in line for line in first)
    assert any("restored the compile cache: " in line for line in second)
    assert any(line.endswith("compile cache: hit") for line in second), second
    assert len(list(store.glob("*.archive"))) == 1
