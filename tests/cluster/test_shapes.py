"""Deployments of every shape, with the real engine, and the callbacks of each replica of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from test_end_to_end import chat, settings
from waiting import until

from rayserve_hooks.impls.startup_metrics import RUNS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

NOTE = "shape_callbacks:Note"


@pytest.fixture(autouse=True)
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name)


def note(folder: Path, name: str = "Note") -> dict[str, Any]:
    return {"callback": NOTE, "name": name, "kwargs": {"folder": str(folder)}}


def llm_config(model: Path, *callbacks: Any, **fields: Any) -> Any:
    from rayserve_hooks import LLMConfig

    return LLMConfig(callbacks=["startup_metrics", *callbacks], **{**settings(model), **fields})


def notes(folder: Path) -> list[dict[str, Any]]:
    """Return what the replicas have written, by deployment."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda note: (note["deployment"], note["pid"]))


def assert_told_apart(replicas: list[dict[str, Any]], ray_cluster: Any) -> None:
    """Assert that each replica's log lines and metrics are known as its own."""
    logs = Path(ray_cluster.cluster.head_node.get_session_dir_path(), "logs", "serve")
    for replica in replicas:
        (file,) = logs.glob(f"*{replica['replica']}.log")
        lines = [line for line in file.read_text().splitlines() if "start-up of " in line]
        assert lines
        for line in lines:  # Serve's format
            assert f" shape_{replica['deployment']} {replica['replica']} " in line
    expected = {(replica["deployment"], replica["rank"]) for replica in replicas}
    assert len(expected) == len(replicas)
    until(lambda: expected <= series())  # Ray's agent collects in intervals


def series() -> set[tuple[str, str]]:
    """Return the deployments, with the rank of a replica, whose starts have a metric."""
    import ray

    found: set[tuple[str, str]] = set()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for family in text_string_to_metric_families(requests.get(url, timeout=10).text):
            for sample in family.samples:
                labels = sample.labels
                if sample.name == f"ray_{RUNS}":
                    found.add((labels["deployment"], labels["replica"]))
    return found


def served(app: Any, ray_cluster: Any) -> str:
    from ray import serve

    serve.run(app, name="shape", route_prefix="/shape")
    return f"http://127.0.0.1:{ray_cluster.http_port}/shape"


@pytest.mark.matrix
def test_several_replicas_on_a_node(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    from ray.serve.llm import build_openai_app

    config = llm_config(tiny_model, note(tmp_path), deployment_config={"num_replicas": 2})
    url = served(build_openai_app({"llm_configs": [config]}), ray_cluster)
    assert chat(url, "hello").status_code == 200
    one, other = notes(tmp_path)
    assert one["replica"] != other["replica"]
    assert [one["nodes"], other["nodes"]] == [[ray_cluster.head_id]] * 2
    assert_told_apart([one, other], ray_cluster)


def test_two_models_in_one_app(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Whose engines' processes, all on one node, are kept apart as well."""
    from ray.serve.llm import build_openai_app

    told = {name: tmp_path / f"told by {name}" for name in ("a", "b")}
    for folder in told.values():
        folder.mkdir()
    configs = [
        llm_config(
            tiny_model,
            note(tmp_path, f"of_{name}"),
            {"callback": "engine_callbacks:Tell", "kwargs": {"folder": str(folder)}},
            model_loading_config={"model_id": name, "model_source": str(tiny_model)},
        )
        for name, folder in told.items()
    ]
    url = served(build_openai_app({"llm_configs": configs}), ray_cluster)
    assert [chat(url, "hello", model=name).status_code for name in told] == [200, 200]
    found = notes(tmp_path)
    assert [n["deployment"] for n in found] == ["LLMServer:a", "LLMServer:b"]
    assert ["of_a" in n["callbacks"] for n in found] == [True, False]
    assert ["of_b" in n["callbacks"] for n in found] == [False, True]
    assert_told_apart(found, ray_cluster)
    seen = {name: [json.loads(p.read_text()) for p in told[name].iterdir()] for name in told}
    for name, processes in seen.items():
        # On CPUs vLLM has a worker of its own also for one rank.
        assert {one["process"] for one in processes} == {"replica", "engine core", "worker 0"}
        assert {one["model_id"] for one in processes} == {name}
    pids = [one["pid"] for processes in seen.values() for one in processes]
    assert len(set(pids)) == len(pids) == 6


@pytest.mark.matrix
def test_from_zero(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    from ray.serve.llm import build_openai_app

    scaled = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1, "upscale_delay_s": 0}
    config = llm_config(
        tiny_model, note(tmp_path), deployment_config={"autoscaling_config": scaled}
    )
    url = served(build_openai_app({"llm_configs": [config]}), ray_cluster)
    assert notes(tmp_path) == []
    assert chat(url, "hello").status_code == 200
    (replica,) = notes(tmp_path)
    assert replica["nodes"] == [ray_cluster.head_id]


@pytest.mark.matrix
def test_an_adapter_beside_the_model(
    ray_cluster: Any, tiny_model: Path, tmp_path: Path, moto_url: str
) -> None:
    import boto3
    from ray.serve.llm import build_openai_app

    variables = {
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    store: Any = boto3.client("s3", endpoint_url=moto_url, region_name="us-east-1", **keys)
    store.create_bucket(Bucket="adapters")
    for file in make_adapter(tmp_path / "adapter").iterdir():
        store.upload_file(str(file), "adapters", f"mine/{file.name}")
    fields = settings(tiny_model)
    fields["engine_kwargs"] |= {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    fields["runtime_env"]["env_vars"] |= variables
    fields["lora_config"] = {"dynamic_lora_loading_path": "s3://adapters"}
    config = llm_config(tiny_model, note(tmp_path), **fields)
    url = served(build_openai_app({"llm_configs": [config]}), ray_cluster)
    assert chat(url, "hello").status_code == 200
    answer = chat(url, "hello", model="tiny:mine")
    assert answer.status_code == 200, answer.text
    assert len(notes(tmp_path)) == 1


def make_adapter(folder: Path) -> Path:
    """Write a LoRA of rank 8 for the attention of the tiny model."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.ones(8, 64) * 0.01
        weights[f"{name}.lora_B.weight"] = torch.ones(160, 8) * 0.01
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.matrix
def test_prefill_and_decode(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    from ray.serve.llm import build_pd_openai_app

    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
    }
    fields = settings(tiny_model)
    fields["engine_kwargs"] |= {"kv_transfer_config": transfer}
    roles = ("prefill", "decode")
    configs = {
        f"{role}_config": llm_config(tiny_model, note(tmp_path, role), **fields) for role in roles
    }
    served(build_pd_openai_app(configs), ray_cluster)
    found = notes(tmp_path)
    assert [n["deployment"] for n in found] == ["Decode:tiny", "Prefill:tiny"]
    assert ["decode" in n["callbacks"] for n in found] == [True, False]
    assert ["prefill" in n["callbacks"] for n in found] == [False, True]
    assert_told_apart(found, ray_cluster)


@pytest.mark.matrix
def test_data_parallel(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A CPU's vLLM starts it, and fails at the first request."""
    from ray.serve.llm import build_dp_openai_app

    model = make_mixture(tmp_path / "mixture", tiny_model)
    fields = settings(model)
    fields["engine_kwargs"] |= {"data_parallel_size": 2, "enable_expert_parallel": True}
    # By default a rank has a NUMA node of its own, and this machine may have one.
    fields["runtime_env"]["env_vars"]["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    config = llm_config(model, note(tmp_path), **fields)
    served(build_dp_openai_app({"llm_config": config}), ray_cluster)
    found = notes(tmp_path)
    assert [n["bundles"] for n in found] == [2, 2]
    assert [n["nodes"] for n in found] == [[ray_cluster.head_id]] * 2
    assert_told_apart(found, ray_cluster)


def make_mixture(folder: Path, tiny_model: Path) -> Path:
    """Write a mixture of experts with the tiny model's tokenizer."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=2048,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder
