"""What a replica's own log file has of a start, with Serve's JSON logs, in a real replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import hook_log

import rayserve_hooks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

LOGS = "lifecycle_callbacks:Logs"


@pytest.fixture(autouse=True)
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    serve.delete("logs")


def records(folder: Path, *callbacks: Any, level: str, **variables: str) -> list[dict[str, Any]]:
    """Initialize in a replica, and return the records of its log file."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    settings = LoggingConfig(encoding="JSON", log_level=level, logs_dir=str(folder))

    # Made here, so that the replica imports vLLM before it opens its log file, as one of Ray Serve
    # LLM does: vLLM's import closes all handlers.
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=list(callbacks),
        placement_group_config={"bundles": [{"CPU": 1}]},
    )

    class Initializes:
        async def __call__(self) -> None:
            await rayserve_hooks.initialize_node(config)

    deployment: Any = serve.deployment(
        Initializes,
        logging_config=settings.model_dump(),
        ray_actor_options={
            "num_cpus": 0,
            "resources": {"node:__internal_head__": 0.001},
            "runtime_env": {"env_vars": variables},
        },
    )
    serve.run(deployment.bind(), name="logs", route_prefix="/logs").remote().result()
    (file,) = folder.rglob("*.log")
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_replicas_json_log_has_the_callbacks_lines_and_fields(
    ray_cluster: Any, tmp_path: Path
) -> None:
    found = records(tmp_path, {"callback": LOGS, "name": "mine"}, level="INFO")
    mine = {record["message"]: record for record in found if record.get("callback") == "mine"}
    assert {message: record["hook"] for message, record in mine.items()} == {
        "in a hook": "on_before_init",
        "in the background": "on_before_init",
        "in a coroutine": "on_before_download",
        "after": "on_after_init",
    }
    for record in mine.values():
        assert record["node"] == ray_cluster.head_id
        assert record["phase"] == record["hook"].removeprefix("on_").replace("_", " ")
        assert record["seconds"] >= 0
        assert record["filename"] == "lifecycle_callbacks.py"
    order = "on_before_init: mine; on_before_download: mine; on_after_init: mine"
    own = [record for record in found if record["levelname"] == "INFO" and "phase" in record]
    assert own[0]["message"] == (
        f"rayserve_hooks {rayserve_hooks.__version__} initializes logs/Initializes: {order}"
    )
    (summary,) = (r for r in found if r["message"].startswith("initialized logs/Initializes"))
    assert summary["seconds"] > 0
    assert not any("what ran" in record["message"] for record in found)


def test_a_take_over_is_a_record_with_fields(ray_cluster: Any, tmp_path: Path) -> None:
    found = records(tmp_path, "lifecycle_callbacks:TakeOver", LOGS, level="INFO")
    (record,) = (r for r in found if "took over" in r["message"])
    assert record["message"].endswith(
        ": it is baked into the image; skipped: the default download; on_before_init of 'Logs'; "
        "on_before_download of 'Logs'"
    )
    assert (record["callback"], record["phase"]) == ("TakeOver", "before init")


@pytest.mark.parametrize(
    ("level", "variables"), [("DEBUG", {}), ("INFO", {"RAYSERVE_HOOKS_LOG_TRACE": "1"})]
)
def test_the_trace_of_a_start_is_logged(
    level: str, variables: dict[str, str], ray_cluster: Any, tmp_path: Path
) -> None:
    found = records(tmp_path, LOGS, level=level, **variables)
    (record,) = (r for r in found if r["message"].startswith("what ran"))
    assert record["levelname"] == level
    assert "on_after_init" in record["message"]


def test_on_another_node_it_is_in_the_log_of_the_worker_process(
    ray_cluster: Any, tmp_path: Path
) -> None:
    config = rayserve_hooks.LLMConfig(
        model_id="logs", callbacks=["lifecycle_callbacks:SpreadOverNodes", LOGS]
    )
    ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    (pid,) = {call.pid for call in ctx.trace if call.node_id == ray_cluster.other_id}
    folder = Path(ray_cluster.cluster.head_node.get_logs_dir_path())
    (log,) = folder.glob(f"worker-*-{pid}.err")
    assert "in a coroutine" in log.read_text()


def test_a_take_over_on_another_node_is_told_and_traced(
    ray_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    taking = "lifecycle_callbacks:TakeOverElsewhere"
    config = rayserve_hooks.LLMConfig(
        model_id="logs", callbacks=["lifecycle_callbacks:SpreadOverNodes", taking, LOGS]
    )
    with hook_log(caplog):
        ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    download = [call for call in ctx.trace if call.hook == "on_before_download"]
    assert [(call.node_id, call.callback, call.outcome) for call in download] == [
        (ray_cluster.head_id, "TakeOverElsewhere", "returned"),
        (ray_cluster.head_id, "Logs", "returned"),
        (ray_cluster.other_id, "TakeOverElsewhere", "handled"),
        (ray_cluster.other_id, "Logs", "skipped"),
    ]
    assert download[-2].reason == "it is there already"
    assert download[-1].reason == "'TakeOverElsewhere' took over"
    (line,) = {r.getMessage() for r in caplog.records if " took over in " in r.getMessage()}
    assert line.startswith(
        f"callback 'TakeOverElsewhere' took over in on_before_download on node "
        f"{ray_cluster.other_id} ("
    )
    assert line.endswith(
        ": it is there already; skipped: the default download; on_before_download of 'Logs'"
    )
