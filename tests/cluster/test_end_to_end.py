"""Serve the tiny model with the real engine, and look at it from outside.

What needs Ray is imported inside the functions: collecting these tests must stay quick.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml
from waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent
READY_S = 240


@pytest.fixture(autouse=True)
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    for name in serve.status().applications:
        serve.delete(name)


def callbacks(trace: Path, model: Path) -> list[Any]:
    """List wrappers, tryfirst, trylast, async, adapted, failing ones, and one that takes over."""
    return [
        {"callback": "trace_writer:TraceWriter", "kwargs": {"path": str(trace)}},
        "lifecycle_callbacks:Wraps",
        "lifecycle_callbacks:Last",
        "lifecycle_callbacks.Plain",
        {"callback": "my_module.MyCallback", "name": "mine", "kwargs": {"max_model_len": 192}},
        "lifecycle_callbacks:First",
        {"callback": "ray_callbacks:Everything", "name": "Rays", "kwargs": {"greeting": "hello"}},
        {
            "callback": "lifecycle_callbacks:Fail",
            "kwargs": {"hook": "on_before_init"},
            "on_error": "warn",
        },
        {"callback": "lifecycle_callbacks:BringModel", "kwargs": {"path": str(model)}},
        {"callback": "lifecycle_callbacks:Plain", "name": "PlainAgain"},
    ]


# The one complete list of what a start runs, in order: process, hook, callback, outcome.
LIFECYCLE = [
    ("replica", "on_before_init", "Wraps", "returned"),
    ("replica", "on_before_init", "mine", "returned"),
    ("replica", "on_before_init", "First", "returned"),
    ("replica", "on_before_init", "Plain", "returned"),
    ("replica", "on_before_init", "Rays", "returned"),
    ("replica", "on_before_init", "Fail", "warned"),
    ("replica", "on_before_init", "PlainAgain", "returned"),
    ("replica", "on_before_init", "Last", "returned"),
    ("replica", "on_before_download", "mine", "returned"),
    ("replica", "on_before_download", "First", "returned"),
    ("replica", "on_before_download", "Plain", "returned"),
    ("replica", "on_before_download", "Rays", "returned"),
    ("replica", "on_before_download", "Fail", "returned"),
    ("replica", "on_before_download", "BringModel", "handled"),
    ("replica", "on_before_download", "PlainAgain", "skipped"),
    ("replica", "on_after_init", "TraceWriter", "running"),  # it is the one that writes this
    ("replica", "on_after_init", "Wraps", "returned"),
    ("replica", "on_after_init", "Plain", "returned"),
    ("replica", "on_after_init", "Rays", "returned"),
    ("replica", "on_after_init", "Fail", "returned"),
    ("replica", "on_after_init", "PlainAgain", "returned"),
    ("replica", "on_after_init", "Last", "returned"),
    ("replica", "on_after_init", "mine", "returned"),
]


def settings(model: Path) -> dict[str, Any]:
    return {
        "model_loading_config": {"model_id": "tiny", "model_source": str(model)},
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "engine_kwargs": {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
    }


def assert_served_through_callbacks(url: str, trace: Path) -> None:
    calls = json.loads(trace.read_text())
    keys = ("role", "hook", "callback", "outcome")
    assert [tuple(call[key] for key in keys) for call in calls] == LIFECYCLE
    assert len({(call["node_id"], call["pid"]) for call in calls}) == 1
    assert chat(url, "hello world").status_code == 200
    refused = chat(url, "hello " * 300)
    assert refused.status_code == status_of_a_wrong_request()
    assert "192" in refused.text


def status_of_a_wrong_request() -> int:
    """Return 500 where Ray takes a wrong request for a failure of its own, stock Ray too.

    Before 2.59 it knows a wrong request by a ``ValueError``; the vLLM that is there for a CPU has
    an error of its own.
    """
    from ray.llm._internal.serve.engines.vllm import vllm_engine
    from vllm import exceptions

    known = hasattr(vllm_engine, "VLLMClientError")
    return 400 if known or issubclass(exceptions.VLLMValidationError, ValueError) else 500


def chat(url: str, prompt: str, model: str = "tiny") -> requests.Response:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": 8}
    return requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def test_configured_in_python(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    from ray import serve
    from ray.serve.llm import build_openai_app

    from rayserve_hooks import LLMConfig

    trace = tmp_path / "trace.json"
    config = LLMConfig(callbacks=callbacks(trace, tiny_model), **settings(tiny_model))
    serve.run(build_openai_app({"llm_configs": [config]}), name="python", route_prefix="/python")
    assert_served_through_callbacks(f"http://127.0.0.1:{ray_cluster.http_port}/python", trace)


def test_configured_in_yaml_through_stock_ray(
    ray_cluster: Any, tiny_model: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    llm_config = {
        **settings(tiny_model),
        "callback_config": {
            "callback_class": "rayserve_hooks.HooksCallback",
            "callback_kwargs": {"callbacks": callbacks(trace, tiny_model)},
        },
    }
    application = {
        "name": "yaml",
        "route_prefix": "/yaml",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [llm_config]},
    }
    config = tmp_path / "serve_config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    serve = str(Path(sys.executable).with_name("serve"))
    command = [serve, "deploy", "--address", ray_cluster.dashboard, str(config)]
    subprocess.run(command, check=True)
    wait_until_running("yaml")
    assert_served_through_callbacks(f"http://127.0.0.1:{ray_cluster.http_port}/yaml", trace)


def wait_until_running(name: str) -> None:
    """Poll, since Serve offers nothing to wait on for an application somebody else deploys."""
    from ray import serve

    def runs() -> bool:
        application = serve.status().applications.get(name)
        assert application is None or application.status != "DEPLOY_FAILED", application
        return application is not None and application.status == "RUNNING"

    until(runs, READY_S)
