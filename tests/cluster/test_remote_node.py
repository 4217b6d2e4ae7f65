"""Failures of nodes, on a real cluster of three."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import s3
from waiting import until, until_async

import rayserve_hooks
from rayserve_hooks import CallbackCtx, HookError
from rayserve_hooks.cluster import remote_node
from rayserve_hooks.errors import RemoteCause

if TYPE_CHECKING:
    from rayserve_hooks import LLMConfig

pytestmark = pytest.mark.ray

RECORD = "failing_callbacks:Record"
ON_NODE = "failing_callbacks:OnNode"
MODE = "MODEL_AND_TOKENIZER"
LEAVES = ["other", "leaves"]


@pytest.fixture(scope="module")
def third(ray_cluster: Any) -> Iterator[Any]:
    node = ray_cluster.cluster.add_node(num_cpus=0, resources={"third": 4})
    yield node
    ray_cluster.cluster.remove_node(node)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def config(log: Path, *callbacks: Any, **fields: Any) -> LLMConfig:
    fields.setdefault("model_loading_config", {"model_id": "tiny"})
    resources = fields.pop("resources", ["other", "third"])
    spread = {"callback": "failing_callbacks:SpreadOver", "kwargs": {"resources": resources}}
    record = {"callback": RECORD, "kwargs": {"path": str(log)}}
    return rayserve_hooks.LLMConfig(callbacks=[spread, record, *callbacks], **fields)


def on(node: str, what: str, file: Path | None = None, name: str = "") -> dict[str, Any]:
    kwargs = {"node": node, "what": what, "file": str(file or "")}
    return {"callback": ON_NODE, "name": name or what, "kwargs": kwargs}


def initialize(llm_config: LLMConfig) -> CallbackCtx:
    return asyncio.run(rayserve_hooks.initialize_node(llm_config))


def calls(log: Path, hook: str) -> list[dict[str, Any]]:
    lines = map(json.loads, log.read_text().splitlines())
    return [line for line in lines if line["hook"] == hook]


def begun_on(log: Path) -> int:
    return len(calls(log, "on_before_download")) if log.exists() else 0


def test_the_trace_of_three_nodes_is_in_order_and_each_sends_its_data_back(
    ray_cluster: Any, third: Any, log: Path
) -> None:
    ctx = initialize(config(log, on(third.node_id, "say")))
    nodes = [ray_cluster.head_id, ray_cluster.other_id, third.node_id]
    assert [(call.node_id, call.hook, call.callback) for call in ctx.trace] == [
        (nodes[0], "on_before_init", "SpreadOver"),
        (nodes[0], "on_before_init", "Record"),
        *(
            (node, "on_before_download", callback)
            for node in nodes
            for callback in ("Record", "say")
        ),
    ]
    assert list(ctx.nodes) == nodes
    pids = {call["node"]: call["pid"] for call in calls(log, "on_before_download")}
    assert {node: ctx.nodes[node].custom_data["pid"] for node in nodes} == pids
    assert len(set(pids.values())) == len(nodes)
    assert [node for node in nodes if ctx.nodes[node].custom_data.get("said")] == [third.node_id]


def test_a_killed_process_is_started_again_and_counted(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path
) -> None:
    ctx = initialize(config(log, on(third.node_id, "kill_once", tmp_path / "killed")))
    attempts = {
        call.node_id: call.attempt for call in ctx.trace if call.hook == "on_before_download"
    }
    assert attempts == {ray_cluster.head_id: 1, ray_cluster.other_id: 1, third.node_id: 2}
    assert set(ctx.nodes) == set(attempts)


def test_a_process_that_is_always_killed_names_node_callback_and_phase(
    ray_cluster: Any, third: Any, log: Path
) -> None:
    with pytest.raises(
        HookError,
        match=rf"callback 'kill' failed in hook on_before_download on node {third.node_id} \(.*\) "
        r"\(phase: before download\): its process was killed or the node died: .*ActorDiedError",
    ):
        initialize(config(log, on(third.node_id, "kill")))
    cleaned = calls(log, "on_init_failed")
    assert {call["node"] for call in cleaned} == {
        ray_cluster.head_id,
        ray_cluster.other_id,
        third.node_id,
    }
    assert cleaned[-1]["node"] == ray_cluster.head_id, "the replica's process comes last"


@pytest.mark.parametrize("how", ["exit", "segfault", "close_files"])
def test_nodes_that_crash_at_the_same_time_are_all_cleaned_up(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path, how: str
) -> None:
    nodes = [ray_cluster.other_id, third.node_id]
    kwargs = {"nodes": nodes, "how": how, "folder": str(tmp_path)}
    with pytest.raises(
        HookError,
        match=r"^callback 'CrashTogether' failed in hook on_before_download on node \w+ \(.*\) "
        r"\(phase: before download\): its process was killed or the node died: ",
    ) as caught:
        initialize(config(log, {"callback": "failing_callbacks:CrashTogether", "kwargs": kwargs}))
    assert caught.value.cleanup_errors == []
    # Where a process is asked to clean up just before it crashes, the next one cleans up again.
    cleaned = {call["node"] for call in calls(log, "on_init_failed")}
    assert cleaned == {*nodes, ray_cluster.head_id}


@pytest.mark.parametrize("names", [["First"], ["First", "Second"]])
def test_a_crash_in_a_clean_up_is_reported_and_the_others_clean_up(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path, names: list[str]
) -> None:
    nodes = [third.node_id]
    kwargs = {"nodes": nodes, "how": "exit", "folder": str(tmp_path), "hook": "on_init_failed"}
    crash = {"callback": "failing_callbacks:CrashTogether", "kwargs": kwargs}
    fails = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}}
    with pytest.raises(HookError, match="callback 'Fail' failed") as caught:
        initialize(config(log, *({**crash, "name": name} for name in names), fails))
    # Each has a second try in a new process, and the last in the list comes first.
    for failure, name in zip(caught.value.cleanup_errors, reversed(names), strict=True):
        assert re.match(
            rf"callback '{name}' failed in hook on_init_failed on node {third.node_id} \(.*\) "
            r"\(phase: clean-up\): its process was killed or the node died; see the log of that "
            "process$",
            str(failure),
        )
    cleaned = [call["node"] for call in calls(log, "on_init_failed")]
    assert sorted(cleaned) == sorted([ray_cluster.head_id, ray_cluster.other_id, third.node_id])


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_node, "_STOP_S", 3.0)


@pytest.mark.usefixtures("_impatient")
def test_a_process_that_does_not_stop_is_killed_and_cleaned_up_after(
    ray_cluster: Any, third: Any, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = log.with_name("begun")
    with pytest.raises(
        HookError, match="callback 'fail_when_the_other_has_begun' failed"
    ) as caught:
        initialize(
            config(
                log,
                on(ray_cluster.other_id, "hang_in_native_code", begun),
                on(third.node_id, "fail_when_the_other_has_begun", begun),
                time_limits={"on_init_failed": 5},
            )
        )
    assert re.search(
        rf"killing the process on node {ray_cluster.other_id} \(.*\), which does not stop",
        caplog.text,
    )
    (cleaned,) = (c for c in calls(log, "on_init_failed") if c["node"] == ray_cluster.other_id)
    (before,) = (c for c in calls(log, "on_before_download") if c["node"] == ray_cluster.other_id)
    assert cleaned["pid"] != before["pid"], "its own process was killed"
    assert caught.value.cleanup_errors == []


def test_the_trace_after_a_failure_has_the_calls_of_all_nodes(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(HookError):
        initialize(
            config(
                log,
                on(ray_cluster.other_id, "hang", begun),
                on(third.node_id, "fail_when_the_other_has_begun", begun),
            )
        )
    # Ray's loggers may hand the one record over twice.
    (text,) = {r.getMessage() for r in caplog.records if "what ran until then" in r.getMessage()}
    _, _, *lines = text.splitlines()[1:]
    rows = [re.split(" {2,}", line) for line in lines]
    outcomes = {(hook, name, node): rest for hook, name, _, _, node, *rest in rows}
    head, other = ray_cluster.head_id[:8], ray_cluster.other_id[:8]
    failed = third.node_id[:8]
    assert outcomes["on_before_init", "Record", head][-1] == "returned"
    assert outcomes["on_before_download", "hang", other] == ["interrupted"]
    assert outcomes["on_before_download", "fail_when_the_other_has_begun", failed][-1] == "failed"
    assert {(hook, node) for hook, _, node in outcomes if hook == "on_init_failed"} >= {
        ("on_init_failed", head),
        ("on_init_failed", failed),
    }


def test_a_callback_that_cannot_be_built_on_a_node(ray_cluster: Any, third: Any, log: Path) -> None:
    refuse = "failing_callbacks:RefuseToBeBuilt"
    with pytest.raises(
        HookError,
        match=r"^node initialization failed on node \w+ \(.*\) \(phase: before download\): "
        r"rayserve_hooks.errors.CallbackConfigError: callback 'RefuseToBeBuilt': "
        r"failing_callbacks.RefuseToBeBuilt\(head: .*\) refused kwargs \['head'\]: OSError: "
        "libstore.so: no such file$",
    ):
        initialize(config(log, {"callback": refuse, "kwargs": {"head": ray_cluster.head_id}}))


def test_an_actor_that_somebody_else_kills_is_started_again(
    third: Any, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    started: list[Any] = []

    class Known(remote_node.RemoteNode):
        def _start(self, *args: Any) -> Any:
            started.append(super()._start(*args))
            return started[-1]

    async def main() -> CallbackCtx:
        begun = log.with_name("begun")
        llm_config = config(log, on(third.node_id, "hang_once", begun), resources=["third"])
        running = asyncio.create_task(rayserve_hooks.initialize_node(llm_config))
        await until_async(begun.exists)
        ray.kill(started[0].actor)
        return await running

    monkeypatch.setattr("rayserve_hooks.cluster.initialize.RemoteNode", Known)
    ctx = asyncio.run(main())
    calls_there = [(c.callback, c.attempt, c.outcome) for c in ctx.trace if c.role == "node"]
    assert calls_there == [
        ("Record", 1, "returned"),
        ("hang_once", 1, "interrupted"),
        ("Record", 2, "returned"),
        ("hang_once", 2, "returned"),
    ]


def test_the_process_of_a_node_ends_with_the_initialization(third: Any, log: Path) -> None:
    ctx = initialize(config(log, on(third.node_id, "say"), resources=["third"]))
    (pid,) = (call.pid for call in ctx.trace if call.callback == "say" and call.role == "node")
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=30)
    assert not psutil.pid_exists(pid)


def test_a_hang_is_cut_off_by_its_limit(ray_cluster: Any, third: Any, log: Path) -> None:
    with pytest.raises(
        HookError,
        match=rf"callback 'hang' failed in hook on_before_download on node {third.node_id} \(.*\) "
        r"\(phase: before download\): not done after 2 s, the time limit 'on_before_download'; "
        "see what it waits for, or raise the limit in time_limits",
    ):
        initialize(config(log, on(third.node_id, "hang"), time_limits={"on_before_download": 2}))
    by_node = {call["node"]: call for call in calls(log, "on_init_failed")}
    assert set(by_node) == {ray_cluster.head_id, ray_cluster.other_id, third.node_id}
    assert by_node[third.node_id]["same_instance"]
    before = {call["node"]: call["pid"] for call in calls(log, "on_before_download")}
    assert by_node[ray_cluster.other_id]["pid_before"] == before[ray_cluster.other_id], (
        "a node that had ended gets back what it had left in custom_data"
    )


def test_the_limit_of_the_whole_names_what_is_still_running(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        HookError,
        match=r"node initialization failed on node .* \(phase: .*\): not done after 8 s, the time "
        r"limit 'total'; .*; still running: before download on node "
        rf"{third.node_id} \(.*\), callback 'hang' for \d+ s",
    ):
        initialize(config(log, on(third.node_id, "hang"), time_limits={"total": 8}))
    assert len(calls(log, "on_init_failed")) == 3


def test_a_failure_stops_the_other_nodes_and_lets_them_clean_up(
    ray_cluster: Any, third: Any, log: Path, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    with pytest.raises(HookError, match="callback 'fail_when_the_other_has_begun' failed"):
        initialize(
            config(
                log,
                on(ray_cluster.other_id, "hang", begun),
                on(third.node_id, "fail_when_the_other_has_begun", begun),
            )
        )
    by_node = {call["node"]: call for call in calls(log, "on_init_failed")}
    assert by_node[third.node_id]["same_instance"]
    assert "no such bucket" in by_node[third.node_id]["error"]
    assert by_node[ray_cluster.other_id]["same_instance"]
    assert re.search(
        r"HookError: node initialization failed on node .* stopped, because the initialization has "
        "failed elsewhere or was cancelled",
        by_node[ray_cluster.other_id]["error"],
    )


def test_clean_up_errors_of_all_nodes_are_collected(
    ray_cluster: Any, third: Any, log: Path
) -> None:
    failing = {"callback": RECORD, "name": "lease", "kwargs": {"path": str(log), "fail": True}}
    begun = log.with_name("begun")
    with pytest.raises(HookError, match="no such bucket") as caught:
        initialize(
            config(
                log,
                failing,
                on(ray_cluster.other_id, "hang", begun),
                on(third.node_id, "fail_when_the_other_has_begun", begun),
            )
        )
    failed = caught.value.cleanup_errors
    assert {error.node.partition(" ")[0] for error in failed} == {
        ray_cluster.head_id,
        ray_cluster.other_id,
        third.node_id,
    }
    assert str(caught.value).count(
        "the clean-up failed too: callback 'lease' failed in hook on_init_failed"
    ) == len(failed)
    assert "RuntimeError: cannot delete the lease" in str(caught.value)


def test_a_failure_after_the_nodes_are_ready_shows_each_call_once(
    third: Any, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fails = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}}
    with pytest.raises(HookError, match="no such bucket"):
        initialize(config(log, fails, resources=["third"]))
    (text,) = {r.getMessage() for r in caplog.records if "what ran until then" in r.getMessage()}
    rows = [re.split(" {2,}", line)[:3] for line in text.splitlines()[3:]]
    assert [(hook, role) for hook, callback, role in rows if callback == "Record"] == [
        ("on_before_init", "driver"),
        ("on_before_download", "driver"),
        ("on_before_download", "node"),
        ("on_init_failed", "node"),
        ("on_init_failed", "driver"),
    ]
    by_node = {call["node"]: call for call in calls(log, "on_init_failed")}
    assert by_node[third.node_id]["same_instance"], "its process was kept until all is ready"


def test_a_background_task_that_fails_on_a_node_names_its_callback(third: Any, log: Path) -> None:
    with pytest.raises(
        HookError,
        match=r"callback 'fail_in_background' failed in hook on_before_download on node "
        rf"{third.node_id} .*: its background task '_restore' raised RuntimeError: no compile ",
    ) as caught:
        initialize(config(log, on(third.node_id, "fail_in_background")))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(("text", "times"), [("raises", 1), ("exits", 1), ("long ", 10_000_000)])
def test_an_exception_that_cannot_be_rebuilt_here_keeps_its_names(
    third: Any, log: Path, text: str, times: int
) -> None:
    kwargs = {"node": third.node_id, "text": text, "times": times}
    started = time.monotonic()
    with pytest.raises(
        HookError,
        match=rf"^callback 'Raises' failed in hook on_before_download on node {third.node_id} "
        rf"\(.*\) \(phase: before download\): failing_callbacks.HereOnlyError: {text}",
    ) as caught:
        initialize(config(log, {"callback": "failing_callbacks:Raises", "kwargs": kwargs}))
    assert type(caught.value.__cause__) is RemoteCause
    assert "HereOnlyError" in str(caught.value.__cause__)
    assert "in on_before_download" in "".join(caught.value.__cause__.__notes__)
    assert len(str(caught.value)) < 25_000
    assert time.monotonic() - started < 15
    assert calls(log, "on_init_failed")


@contextlib.contextmanager
def removed_when(condition: Callable[[], bool], node: Any, ray_cluster: Any) -> Iterator[None]:
    """Take a node out of the cluster as soon as something holds, while the block runs."""

    def remove() -> None:
        until(condition)
        ray_cluster.cluster.remove_node(node, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    yield
    remover.join()


def test_a_node_that_leaves_names_node_callback_and_phase(
    ray_cluster: Any, log: Path, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    node = ray_cluster.cluster.add_node(num_cpus=0, resources={"leaves": 1})
    with (
        removed_when(begun.exists, node, ray_cluster),
        pytest.raises(
            HookError,
            match=rf"callback 'hang' failed in hook on_before_download on node {node.node_id} "
            r"\(.*\) \(phase: before download\): its process was killed or the node died",
        ) as caught,
    ):
        initialize(config(log, on(node.node_id, "hang", begun), resources=LEAVES))
    (failure,) = caught.value.cleanup_errors
    assert re.match(
        rf"node initialization failed on node {node.node_id} \(.*\) \(phase: clean-up\): "
        r"on_init_failed did not run: ray.exceptions.ActorUnschedulableError: .* The node "
        "specified via NodeAffinitySchedulingStrategy doesn't exist any more",
        str(failure),
    ), str(failure)
    assert {call["node"] for call in calls(log, "on_init_failed")} == {
        ray_cluster.head_id,
        ray_cluster.other_id,
    }


def test_a_node_that_leaves_in_mid_download(
    ray_cluster: Any, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_bytes(bytes(10_000_000))
    node = ray_cluster.cluster.add_node(
        num_cpus=0, resources={"leaves": 1}, env_vars={"HF_HUB_CACHE": str(tmp_path / "third")}
    )
    with s3.serving(tmp_path) as server:
        server.rate = 500_000
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        only_there = {
            "callback": "download_policy",
            "kwargs": {"local": "NONE", "workers": "NONE", "nodes": {node.node_id: MODE}},
        }
        with (
            removed_when(lambda: bool(server.sent), node, ray_cluster),
            pytest.raises(
                HookError,
                match=rf"node initialization failed on node {node.node_id} \(.*\) \(phase: "
                r"download\): its process was killed or the node died",
            ),
        ):
            initialize(
                config(
                    log,
                    only_there,
                    resources=LEAVES,
                    model_loading_config={
                        "model_id": "tiny",
                        "model_source": "s3://anonymous@models/tiny",
                    },
                    runtime_env={"env_vars": {"AWS_ENDPOINT_URL": server.url}},
                )
            )
    assert not list((tmp_path / "third").rglob("snapshots/*/config.json"))
    assert not list((tmp_path / "third").rglob("main"))


def test_cancelling_cleans_up_everywhere(ray_cluster: Any, third: Any, log: Path) -> None:
    async def main() -> None:
        llm_config = config(log, on(third.node_id, "hang"))
        task = asyncio.create_task(rayserve_hooks.initialize_node(llm_config))
        await until_async(lambda: begun_on(log) == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    errors = {call["node"]: call["error"] for call in calls(log, "on_init_failed")}
    assert len(errors) == 3
    assert errors[ray_cluster.head_id].startswith("CancelledError")


ENDS = 20


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_nothing_is_left_behind(
    ray_cluster: Any, log: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group

    bundles = [{"CPU": 1.0, "node:__internal_head__": 0.001}, {"other": 1.0}]
    group = placement_group(bundles, "STRICT_SPREAD")
    waits = {
        "callback": "failing_callbacks:Waits",
        "kwargs": {"path": str(log), "fail": how == "failed"},
    }
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    llm_config = rayserve_hooks.LLMConfig(
        model_id="tiny", callbacks=[waits], runtime_env={"env_vars": {"TMPDIR": str(temporary)}}
    )

    def pids() -> list[int]:
        return list(map(int, log.read_text().split())) if log.exists() else []

    async def end(number: int) -> None:
        call = rayserve_hooks.initialize_node(llm_config, placement_group=group)
        task = asyncio.create_task(call)
        await until_async(lambda: len(pids()) > number)
        if how == "cancelled":
            task.cancel()
        with pytest.raises((asyncio.CancelledError, HookError)):
            await task

    asyncio.run(end(0))  # what is made once, such as the callbacks' loop, and torch's folder
    files, threads = set(temporary.iterdir()), _own_threads()
    for number in range(1, ENDS + 1):
        asyncio.run(end(number))
    for pid in pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=30)
    assert set(temporary.iterdir()) == files
    assert not [path for path in files if "torch" not in path.name]
    assert _own_threads() == threads


def _own_threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("rayserve_hooks"))


def test_no_group_that_was_made_here_is_left_after_a_limit(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from ray.util.placement_group import placement_group_table

    def created() -> int:
        return [group["state"] for group in placement_group_table().values()].count("CREATED")

    before = created()
    llm_config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["failing_callbacks:HangInReplica"],
        placement_group_config={"bundles": [{"CPU": 1}]},
        time_limits={"on_before_init": 1},
    )
    with pytest.raises(
        HookError,
        match=r"callback 'HangInReplica' failed in hook on_before_init .*the time limit "
        "'on_before_init'",
    ):
        initialize(llm_config)
    assert created() == before
