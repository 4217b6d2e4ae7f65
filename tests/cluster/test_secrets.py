"""What a failed deployment shows of secrets, and how a person reads it: a real Serve replica.

What needs Ray is imported inside the functions: collecting these tests must stay quick.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from apps import without_ingress
from secretive_callbacks import TOKEN

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

PASSWORD = "0f9c5d1b-S3cretWord"


def written(secret: str) -> list[str]:
    """List how a text can have a secret, or a part of it that is enough."""
    ways = [secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], repr(secret.encode())[2:-1]]
    ways += [urllib.parse.quote(secret, safe=""), secret.encode().hex()]
    ways += [base64.b64encode(secret.encode()).decode()[:-4], secret[:12], secret[-8:]]
    return ways


def deployed(name: str, *callbacks: Any, **fields: Any) -> str:
    """Deploy what fails, and return the status's message."""
    from ray import serve
    from ray.serve.llm import build_openai_app

    from rayserve_hooks import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": "/no/such/model"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"max_constructor_retry_count": 1},
        callbacks=callbacks,
        **fields,
    )
    with pytest.raises(RuntimeError):
        serve.run(build_openai_app(without_ingress(config)), name=name, route_prefix=f"/{name}")
    status = serve.status().applications[name]
    message = status.deployments["LLMServer:tiny"].message
    everything = json.dumps([message, status.message, repr(serve.status())], ensure_ascii=False)
    for secret in (TOKEN, PASSWORD):
        assert not [way for way in written(secret) if way in everything]
    serve.delete(name)
    return message


def logs(ray_cluster: Any) -> dict[str, str]:
    folder = Path(ray_cluster.cluster.head_node.get_session_dir_path()) / "logs"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text(errors="replace") for path in files}


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download"])
def test_a_failed_deployment_shows_no_secret_and_is_for_people(hook: str, ray_cluster: Any) -> None:
    kwargs = {"hf_token": TOKEN, "hook": hook}
    callback = {"callback": "secretive_callbacks:ShowsSecrets", "kwargs": kwargs}
    env = {"env_vars": {"A_PASSWORD": PASSWORD}}
    message = deployed(hook.replace("_", "-"), callback, runtime_env=env)
    said = rf"callback 'ShowsSecrets' failed in hook {hook} on node .*RuntimeError: 401 for \*\*\*"
    lines = message.splitlines()
    assert re.search(said, "\n".join(lines[:14])), "the first lines are for people"
    assert re.search(said, "\n".join(lines[-2:])), "and the last"
    assert "in raise_with" in message, "the callback's own frames are there"
    assert "core/calls.py" not in message
    assert len(lines) < 80
    read = logs(ray_cluster)
    assert any("worker-" in name for name in read)
    assert any(name.startswith("serve/replica") for name in read)
    assert any(name.startswith("serve/controller") for name in read)
    for secret in (TOKEN, PASSWORD):
        # Ray itself writes the variables of a runtime environment to its agent's log.
        shown = [
            name
            for name, text in read.items()
            if not name.startswith("runtime_env_")
            for way in written(secret)
            if way in text
        ]
        assert not shown
