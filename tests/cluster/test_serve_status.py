"""What ``serve status`` says of a deployment whose callback fails, in a real replica."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import rayserve_hooks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture
def failed(ray_cluster: Any) -> Iterator[str]:
    """Deploy what initializes as a server of Ray's does, and fails; return the status' text."""
    from ray import serve

    fail = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_before_download"}}
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["startup_metrics", {**fail, "name": "fetch the weights"}],
        placement_group_config={"bundles": [{"CPU": 1}]},
    )

    class Server:
        async def __init__(self) -> None:  # type: ignore[misc] # Serve awaits it
            callback: Any = config.get_or_create_callback()
            await callback.run_callback("on_before_node_init")

    options = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    deployment: Any = serve.deployment(
        Server, ray_actor_options=options, max_constructor_retry_count=1
    )
    with pytest.raises(RuntimeError):
        serve.run(deployment.bind(), name="failing", route_prefix="/failing")
    command = [str(Path(sys.executable).with_name("serve")), "status", "--address"]
    done = subprocess.run(
        [*command, ray_cluster.dashboard], check=True, capture_output=True, text=True, timeout=60
    )
    yield done.stdout
    serve.delete("failing")


def test_the_errors_first_line_is_there_whole(ray_cluster: Any, failed: str) -> None:
    (status,) = yaml.safe_load(failed)["applications"]["failing"]["deployments"].values()
    address = ray_cluster.cluster.head_node.node_ip_address
    line = (
        f"callback 'fetch the weights' failed in hook on_before_download on node "
        f"{ray_cluster.head_id} ({address}) (phase: before download): RuntimeError: no such "
        "bucket; fix the callback, or set 'on_error: warn' on it to go on without it; set "
        "RAYSERVE_HOOKS_DISABLE='fetch the weights' to start once without it"
    )
    lines = status["message"].splitlines()
    assert f"rayserve_hooks.errors.HookError: {line}" in lines
