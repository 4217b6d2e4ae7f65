"""The hooks in the engine's processes, seen from the replica, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager, refused

from rayserve_hooks import HookError
from rayserve_hooks.cluster import _vllm, engine_folder, engine_processes
from rayserve_hooks.cluster._vllm import check_plugins
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report
from rayserve_hooks.cluster.engine_processes import EngineProcesses
from rayserve_hooks.cluster.vllm_plugin import MARK
from rayserve_hooks.context import CallbackCtx, ProcessInfo
from rayserve_hooks.core.recorder import Recorder, recorder_of
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import Phase
from rayserve_hooks.trace import TraceEntry

HOOK = "on_before_engine_init"


class Config:
    model_id = "tiny"


class Engine:
    """What is asked of vLLM's client: a core and two ranks."""

    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            data_parallel_size=1,
            data_parallel_size_local=1,
            data_parallel_rank=0,
            data_parallel_backend="mp",
            distributed_executor_backend="mp",
            local_world_size=2,
            world_size=2,
        )
    )


class Register:
    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["ran_in"] = str(ctx.process)


class Quiet:
    def on_after_init(self, ctx: CallbackCtx) -> None:
        pass


def processes(*callbacks: object, role: str = "replica") -> tuple[EngineProcesses, CallbackCtx]:
    manager = make_manager(*callbacks)
    ctx = make_ctx(process=ProcessInfo(role), runtime_env={"env_vars": {"A": "1"}})
    ctx._state.llm_config = Config()
    recorder = Recorder(ctx)
    recorder.set_engine(Engine())
    return EngineProcesses(manager, ctx, []), ctx


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine_folder, "_PARENT", tmp_path)
    monkeypatch.setattr(_vllm, "load_general_plugins", lambda: None)
    monkeypatch.setattr(_vllm, "problem_here", lambda: "")
    monkeypatch.setattr(
        "rayserve_hooks.cluster._ray.engine_config_is_made_by_a_task", lambda _: False
    )
    monkeypatch.delenv(MARK, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("callback", "role"), [(Quiet, "replica"), (Register, "driver"), (Register, "node")]
)
def test_nothing_is_made_where_the_hook_would_not_run(
    callback: type, role: str, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vllm, "load_general_plugins", lambda: pytest.fail("loads vLLM's plugins"))
    monkeypatch.setattr(_vllm, "problem_here", lambda: pytest.fail("looks for the entry point"))
    this, ctx = processes(callback, role=role)
    environment, runtime_env = dict(os.environ), ctx.runtime_env

    async def start() -> None:
        await this.prepare()
        await this.collect()
        await this.remove()

    asyncio.run(start())
    assert this.failure() is None
    assert list(parent.iterdir()) == []
    assert os.environ == environment
    assert ctx.runtime_env is runtime_env
    assert runtime_env == {"env_vars": {"A": "1"}}
    assert list(ctx.trace) == []


def test_without_the_hook_watching_never_ends() -> None:
    this, _ = processes(Quiet)
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(this.watch(), 0.01))


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


Say = Callable[..., None]


@contextlib.asynccontextmanager
async def prepared(*callbacks: object) -> AsyncIterator[tuple[EngineProcesses, CallbackCtx, Say]]:
    """Prepare a start, and offer to report as its processes do."""
    this, ctx = processes(*callbacks)
    await this.prepare()
    pids = iter(range(1000, 2000))

    def say(role: str, rank: int | None = None, **fields: Any) -> None:
        folder = EngineFolder.find(os.environ[MARK])
        pid = next(pids)
        name = f"process-{pid}"
        file = engine_folder.ReportFile(folder._open(name, engine_folder._NEW))
        call = TraceEntry("Register", HOOK, role, ctx.node.id, pid=pid, rank=rank)
        if fields.setdefault("ended", True):
            call.finish("failed" if fields.get("error") else "returned")
        file.write(Report(ctx.node, ProcessInfo(role, rank, pid), [call], **fields))
        file.close()
        folder.close()

    try:
        yield this, ctx, say
    finally:
        await this.remove()


@pytest.mark.ray
def test_the_replica_runs_the_hook_and_sets_the_mark(parent: Path) -> None:
    async def start() -> None:
        async with prepared(Register) as (_, ctx, _say):
            mark = os.environ[MARK]
            assert re.fullmatch("[0-9a-f]{32}-n1", mark)
            assert ctx.runtime_env == {"env_vars": {"A": "1", MARK: mark}}
            assert ctx.custom_data == {"ran_in": "replica"}
            assert [(call.process, call.hook) for call in ctx.trace] == [("replica", HOOK)]
            assert recorder_of(ctx).running is None
            assert ctx.trace[0].changed == ("custom_data.ran_in",), "the mark is nobody's change"
            assert names_in(parent) == [f"rayserve_hooks-engine-{os.geteuid()}-{mark}"]
        assert MARK not in os.environ
        assert ctx.runtime_env == {"env_vars": {"A": "1"}}
        assert names_in(parent) == []

    asyncio.run(start())


@pytest.mark.ray
def test_a_failure_in_the_replica_leaves_nothing(parent: Path) -> None:
    trouble = {"callback": "engine_callbacks:Trouble", "kwargs": {"process": "replica"}}
    this, ctx = processes(trouble)
    with pytest.raises(
        HookError, match=r"'Trouble' failed in hook on_before_engine_init .*replica"
    ):
        asyncio.run(this.prepare())
    assert MARK not in os.environ
    assert ctx.runtime_env == {"env_vars": {"A": "1"}}
    assert list(parent.iterdir()) == []


def test_what_vllm_would_not_load_ends_the_start(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_vllm, "problem_here", lambda: "the reason; do this")
    this, _ = processes(Register)
    with pytest.raises(
        HookError,
        match=r"^node initialization failed on node n1 \(10.0.0.1\) \(phase: before engine init\): "
        "on_before_engine_init cannot run in the engine's processes: the reason; do this$",
    ):
        asyncio.run(this.prepare())
    assert list(parent.iterdir()) == []


@pytest.mark.ray
def test_all_calls_are_collected_process_after_process() -> None:
    async def start() -> None:
        async with prepared(Register) as (this, ctx, say):
            say("worker", 1)
            say("engine core")
            say("worker", 0)
            await this.collect()
            assert [call.process for call in ctx.trace] == [
                "replica",
                "engine core",
                "worker 0",
                "worker 1",
            ]

    asyncio.run(start())


@pytest.mark.ray
@pytest.mark.parametrize(
    ("ran", "missing"),
    [
        ([("engine core", None), ("worker", 0)], "worker 1"),
        ([("worker", 0), ("worker", 1)], "engine core"),
        ([], "engine core and worker 0 and worker 1"),
        ([("engine core", None), ("worker", None)], "worker 1"),  # one whose rank is not known
    ],
)
def test_a_process_that_has_not_run_the_hook_is_named(
    ran: list[tuple[str, int | None]], missing: str
) -> None:
    async def start() -> None:
        async with prepared(Register) as (this, _, say):
            for role, rank in ran:
                say(role, rank)
            with pytest.raises(
                HookError, match=f"has not run in {missing}: vLLM has not"
            ) as caught:
                await this.collect()
            assert caught.value.process == missing.partition(" and ")[0]
            assert "VLLM_PLUGINS is set or rayserve_hooks is missing there" in str(caught.value)

    asyncio.run(start())


@pytest.mark.ray
def test_the_task_that_makes_the_config_is_expected_where_ray_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "rayserve_hooks.cluster._ray.engine_config_is_made_by_a_task", lambda _: True
    )

    async def start() -> None:
        async with prepared(Register) as (this, ctx, say):
            for process in (("engine core", None), ("worker", 0), ("worker", 1)):
                say(*process)
            with pytest.raises(HookError, match="has not run in engine config"):
                await this.collect()
            del ctx.trace[1:]
            say("engine config")
            await this.collect()
            assert [call.process for call in ctx.trace][:3] == [
                "replica",
                "engine config",
                "engine core",
            ]

    asyncio.run(start())


def failed(text: str) -> HookError:
    return HookError(
        node="n1", phase=Phase.BEFORE_ENGINE_INIT, detail=text, callback="Register", hook=HOOK
    )


@pytest.mark.ray
def test_watching_ends_with_the_first_failure() -> None:
    async def start() -> None:
        async with prepared(Register) as (this, ctx, say):
            watch = asyncio.ensure_future(this.watch())
            say("engine core")
            assert this.failure() is None
            say("worker", 1, error=failed("no such parser"))
            say("worker", 0, ended=False)  # which vLLM has killed for it
            with pytest.raises(HookError, match="no such parser"):
                await asyncio.wait_for(watch, 10)
            assert str(this.failure()) == str(failed("no such parser"))
            with pytest.raises(HookError, match="no such parser"):
                await this.collect()
            assert len(ctx.trace) == 4

    asyncio.run(start())


@pytest.mark.ray
def test_a_process_that_was_killed_in_a_hook_is_named_with_the_callback() -> None:
    async def start() -> None:
        async with prepared(Register) as (this, _, say):
            say("engine core", ended=False)
            failure = this.failure()
            assert failure is not None
            assert str(failure) == (
                "callback 'Register' failed in hook on_before_engine_init on node n1 (10.0.0.1), "
                "engine core (phase: before engine init): its process was killed; see the "
                "replica's log and the node's memory"
            )

    asyncio.run(start())


@pytest.mark.ray
def test_what_does_not_pickle_stays_in_the_replica_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    this, ctx = processes(Register)
    ctx.custom_data["client"] = (number for number in range(1))

    async def start() -> None:
        await this.prepare()
        await this.remove()

    with hook_log(caplog):
        asyncio.run(start())
    assert "ctx.custom_data['client'], set by callback None, does not pickle" in caplog.text


@pytest.mark.ray
def test_two_starts_on_one_node_keep_theirs_apart() -> None:
    async def start() -> None:
        async with prepared(Register) as (this, _, say):
            say("engine core")
            mark = os.environ[MARK]
            async with prepared(Register) as (other, _, _say):
                assert os.environ[MARK] != mark
                assert len(this._look()[0]) == 1
                assert other._look() == ([], None)

    asyncio.run(start())


@pytest.mark.parametrize("chosen", ["", "other"])
def test_vllm_plugins_without_us_is_refused_where_the_config_is_made(chosen: str) -> None:
    with refused(
        f"on_before_engine_init of 'Register' would not run: VLLM_PLUGINS is {chosen!r}, so that"
    ):
        check_plugins({_vllm.PLUGINS_VARIABLE: chosen}, ["Register"])


@pytest.mark.parametrize(
    ("env_vars", "callbacks"),
    [
        (None, ["Register"]),
        ({}, ["Register"]),
        ({_vllm.PLUGINS_VARIABLE: "rayserve_hooks"}, ["Register"]),
        ({_vllm.PLUGINS_VARIABLE: "other"}, []),
    ],
)
def test_anything_else_is_not(env_vars: dict[str, Any] | None, callbacks: list[str]) -> None:
    check_plugins(env_vars, callbacks)


def test_only_callbacks_with_the_hook_are_built_in_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[CallbackStack] = []

    def pack(_: CallbackCtx, stack: CallbackStack) -> bytes:
        sent.append(stack)
        return b""

    monkeypatch.setattr(engine_processes, "engine_request_for", pack)
    this, _ = processes(Quiet, Register)

    async def start() -> None:
        await this.prepare()
        await this.remove()

    asyncio.run(start())
    assert [entry.name for stack in sent for entry in stack.entries] == ["Register"]


# On a real cluster of two nodes: Ray's workers, and the task that makes the config, as Ray and vLLM
# start them. vLLM's own Ray executor does not run on CPU.


def worker_on_another_node(name: str, runtime_env: dict[str, Any]) -> Any:
    """Return an actor that loads vLLM's plugins as its workers do."""
    import ray

    class Worker:
        def initialize_worker(self) -> None:
            from vllm import plugins

            plugins.load_general_plugins()  # type: ignore[no-untyped-call]

    worker: Any = ray.remote(Worker)
    there = {"other": 0.1}
    return worker.options(name=name, num_cpus=0, resources=there, runtime_env=runtime_env).remote()


def config_task(ctx: CallbackCtx) -> Any:
    """Have the engine's config made as Ray does where the accelerator wants a task."""
    import ray
    from ray.llm._internal.serve.engines.vllm.vllm_engine import _get_vllm_engine_config
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    make: Any = ray.remote(_get_vllm_engine_config)
    assert ctx.placement_group is not None
    group = PlacementGroupSchedulingStrategy(placement_group=ctx.placement_group)
    options = make.options(num_cpus=0, runtime_env=ctx.runtime_env, scheduling_strategy=group)
    return options.remote(ctx.llm_config)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> list[EngineProcesses]:
    """Be a replica as far as the path is concerned; hand out what it has made."""
    monkeypatch.undo()
    monkeypatch.delenv(MARK, raising=False)
    made: list[EngineProcesses] = []

    class Recorded(EngineProcesses):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("rayserve_hooks.cluster.engine_processes.EngineProcesses", Recorded)
    monkeypatch.setattr("rayserve_hooks.cluster._ray.in_replica", lambda: True)
    return made


def start_on_two_nodes(*callbacks: object, **fields: Any) -> Any:
    import rayserve_hooks

    return rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["lifecycle_callbacks:SpreadOverNodes", *callbacks],
        placement_group_config={"bundles": [{"CPU": 1}]},
        **fields,
    )


def left_by(cluster: Any) -> list[str]:
    """Return the folders of this cluster's nodes; another cluster may use this machine, too."""
    here = (cluster.head_id, cluster.other_id)
    return [name for name in names_in(Path("/tmp")) if name.endswith(here)]


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_rays_workers_on_another_node_and_the_config_task_run_the_hook(
    ray_cluster: Any,
    real: list[EngineProcesses],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    import rayserve_hooks

    monkeypatch.setattr(
        "rayserve_hooks.cluster._ray.engine_config_is_made_by_a_task", lambda _: True
    )
    source = {"model_id": "tiny", "model_source": str(tiny_model)}
    config = start_on_two_nodes(Register, model_loading_config=source)

    async def start() -> None:
        ctx = await rayserve_hooks.initialize_node(config)
        (this,) = real
        recorder_of(ctx).set_engine(Engine())
        try:
            _, engine_config = await config_task(ctx)
            assert engine_config.model_config.model == str(tiny_model)
            names = ["vllm_Worker_abc_TP0", "vllm_Worker_abc_TP1"]
            workers = [worker_on_another_node(name, ctx.runtime_env) for name in names]
            await asyncio.gather(*(worker.initialize_worker.remote() for worker in workers))
            with pytest.raises(HookError, match="has not run in engine core: "):
                await this.collect()
            for worker in workers:
                ray.kill(worker)
            calls = [call for call in ctx.trace if call.hook == HOOK]
            processes = ["replica", "engine config", "worker 0", "worker 1"]
            assert [call.process for call in calls] == processes
            nodes = {call.process: call.node_id for call in calls}
            assert nodes["replica"] == ray_cluster.head_id
            assert nodes["worker 0"] == nodes["worker 1"] == ray_cluster.other_id
            assert len({call.pid for call in calls}) == len(processes)
        finally:
            await this.remove()

    asyncio.run(start())
    assert left_by(ray_cluster) == []


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_failure_on_another_node_is_heard_at_once(
    ray_cluster: Any, real: list[EngineProcesses]
) -> None:
    import ray

    import rayserve_hooks

    trouble = {"callback": "engine_callbacks:Trouble", "kwargs": {"process": "worker 1"}}
    config = start_on_two_nodes(trouble)

    async def start() -> None:
        ctx = await rayserve_hooks.initialize_node(config)
        (this,) = real
        try:
            watch = asyncio.ensure_future(this.watch())
            worker = worker_on_another_node("vllm_Worker_abc_TP1", ctx.runtime_env)
            with pytest.raises(ray.exceptions.RayTaskError, match="no such parser"):
                await worker.initialize_worker.remote()
            with pytest.raises(HookError) as caught:
                await asyncio.wait_for(watch, 10)
            assert caught.value.node.startswith(ray_cluster.other_id)
            assert caught.value.process == "worker 1"
            assert isinstance(caught.value.__cause__, RuntimeError)
            assert str(this.failure()) == str(caught.value)
            ray.kill(worker)
        finally:
            await this.remove()

    asyncio.run(start())


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_nodes_that_a_callback_has_initialized_itself_have_a_folder_too(
    ray_cluster: Any, real: list[EngineProcesses]
) -> None:
    import ray

    import rayserve_hooks

    config = start_on_two_nodes("lifecycle_callbacks:TakeOver", Register)

    async def start() -> None:
        ctx = await rayserve_hooks.initialize_node(config)
        (this,) = real
        try:
            worker = worker_on_another_node("vllm_Worker_abc_TP1", ctx.runtime_env)
            await worker.initialize_worker.remote()
            ray.kill(worker)
            reports, _ = await asyncio.to_thread(this._look)
            assert [str(report.process) for report in reports] == ["worker 1"]
        finally:
            await this.remove()

    asyncio.run(start())


@pytest.mark.ray
def test_a_start_that_fails_later_leaves_nothing(
    ray_cluster: Any, real: list[EngineProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    import rayserve_hooks

    async def fail(_: EngineProcesses) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(
        "rayserve_hooks.cluster.engine_processes.with_background", lambda *_: fail(real[0])
    )
    with pytest.raises(HookError, match="the disk is full"):
        asyncio.run(rayserve_hooks.initialize_node(start_on_two_nodes(Register)))
    assert left_by(ray_cluster) == []
    assert MARK not in os.environ
