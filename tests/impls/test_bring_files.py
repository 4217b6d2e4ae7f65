"""The callbacks that bring files, stacked on a real cluster of two nodes."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from pathlib import Path
from typing import Any

import hub
import pytest
import s3

pytestmark = pytest.mark.ray

IMPLS = "rayserve_hooks.impls"


def test_all_three_on_two_nodes(ray_cluster: Any, tiny_model: Path, tmp_path: Path) -> None:
    import ray

    # Ray's folder for adapters is one for the whole machine, and so the name is new each time.
    adapter = f"adapter-{uuid.uuid4().hex}"
    bucket = tmp_path / "buckets" / "bucket"
    (bucket / "templates").mkdir(parents=True)
    (bucket / "templates" / "chat.jinja").write_text("{{ x }}")
    (bucket / "loras" / adapter).mkdir(parents=True)
    (bucket / "loras" / adapter / "adapter_config.json").write_text("{}")
    shutil.copytree(tiny_model, tmp_path / "models" / "org" / "tiny")
    templates = tmp_path / "templates"

    def there(env: dict[str, str]) -> dict[str, Any]:
        import rayserve_hooks

        config = rayserve_hooks.LLMConfig(
            model_id="org/tiny",
            lora_config={"dynamic_lora_loading_path": "s3://anonymous@bucket/loras"},
            runtime_env={"env_vars": env},
            placement_group_config={"bundles": [{"CPU": 1}]},
            callbacks=[
                "lifecycle_callbacks:SpreadOverNodes",
                {  # in front, though it ends the chain: it runs last
                    "callback": f"{IMPLS}.hf_prefetch:HfPrefetch",
                    "kwargs": {"repo_id": "org/tiny", "revision": "main"},
                },
                {
                    "callback": f"{IMPLS}.cloud_files:CloudFiles",
                    "kwargs": {"paths": [["s3://anonymous@bucket/templates", str(templates)]]},
                },
                f"{IMPLS}.lora_prefetch:LoraPrefetch",
            ],
        )
        ctx = asyncio.run(rayserve_hooks.initialize_node(config))
        return {
            "paths": {node_id: node.model_path for node_id, node in ctx.nodes.items()},
            "calls": [(call.node_id, call.hook, call.callback, call.outcome) for call in ctx.trace],
            "adapters": ctx.custom_data["lora_prefetch"],
        }

    with s3.serving(tmp_path / "buckets") as store, hub.serving(tmp_path / "models") as models:
        env = {
            "AWS_ENDPOINT_URL": store.url,
            "HF_ENDPOINT": models.url,
            "HF_HOME": str(tmp_path / "home"),
            "RAYSERVE_HOOKS_LOCK_DIR": str(tmp_path / "locks"),
        }
        task: Any = ray.remote(there).options(num_cpus=1, runtime_env={"env_vars": env})
        result = ray.get(task.remote(env))
    nodes = {ray_cluster.head_id, ray_cluster.other_id}
    (snapshot,) = set(result["paths"].values())
    assert result["paths"].keys() == nodes
    assert Path(snapshot).name == hub.COMMIT
    assert (Path(snapshot) / "model.safetensors").exists()
    for node in nodes:
        assert [
            call[2:] for call in result["calls"] if call[:2] == (node, "on_before_download")
        ] == [
            ("CloudFiles", "returned"),
            ("LoraPrefetch", "returned"),
            ("HfPrefetch", "handled"),
        ]
    assert (templates / "chat.jinja").read_text() == "{{ x }}"
    (folder,) = result["adapters"].values()
    try:
        assert Path(folder).name == adapter
        assert (Path(folder) / "adapter_config.json").read_text() == "{}"
    finally:
        shutil.rmtree(folder)
    # Once per node is once here, where both have one disk.
    assert len([r for r in models.requests if r.startswith("GET") and "model.safet" in r]) == 1
