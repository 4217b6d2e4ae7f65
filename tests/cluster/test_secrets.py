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
        serve.run(build_openai_app({"llm_configs": [config]}), name=name, route_prefix=f"/{name}")
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


def test_probe(ray_cluster: Any) -> None:
    callback = {"callback": "secretive_callbacks:ShowsSecrets", "kwargs": {"hf_token": TOKEN}}
    env = {"env_vars": {"A_PASSWORD": PASSWORD}}
    message = deployed("secrets", callback, runtime_env=env)
    print(message)
    for name, text in logs(ray_cluster).items():
        for secret in (TOKEN, PASSWORD):
            for way in written(secret):
                if way in text:
                    i = text.index(way)
                    print("LEAK", name, way, text[max(0, i - 200) : i + 100].replace("\n", "|"))
    print(sorted(logs(ray_cluster)))
