"""The adapter on the installed vLLM: what its processes are called, and what it loads in them."""

from __future__ import annotations

import importlib.metadata
import inspect
import multiprocessing
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import run_script

from rayserve_hooks.cluster import _vllm
from rayserve_hooks.context import ProcessInfo

pytestmark = pytest.mark.ray


def test_importing_the_adapter_imports_no_vllm() -> None:
    run_script(
        """
        import sys, rayserve_hooks.cluster._vllm
        assert not {"vllm", "ray", "torch"} & set(sys.modules)
        """
    )


def test_the_group_and_the_variable_are_vllms() -> None:
    from vllm import envs, plugins

    assert plugins.DEFAULT_PLUGINS_GROUP == _vllm.GROUP
    assert _vllm.PLUGINS_VARIABLE in envs.environment_variables


@pytest.mark.parametrize("chosen", [None, "", "other", "other,rayserve_hooks", "rayserve_hooks"])
def test_what_vllm_loads_is_what_we_say_that_it_does(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import plugins

    entry_point = importlib.metadata.EntryPoint(_vllm.PLUGIN, "builtins:print", _vllm.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry_point])
    monkeypatch.delenv(_vllm.PLUGINS_VARIABLE, raising=False)
    if chosen is not None:
        monkeypatch.setenv(_vllm.PLUGINS_VARIABLE, chosen)
    loads = _vllm.PLUGIN in plugins.load_plugins_by_group(_vllm.GROUP)
    assert loads == (not _vllm.plugins_problem(chosen))
    assert loads == (not _vllm.problem_here())


@pytest.mark.parametrize(
    ("chosen", "advice"),
    [
        ("", "set VLLM_PLUGINS=rayserve_hooks, or remove it"),
        ("other", "set VLLM_PLUGINS=other,rayserve_hooks, or remove it"),
    ],
)
def test_the_problem_says_what_to_write(chosen: str, advice: str) -> None:
    assert _vllm.plugins_problem(chosen) == (
        f"VLLM_PLUGINS is {chosen!r}, so that vLLM does not load the plugin 'rayserve_hooks' in "
        f"the engine's processes; {advice}"
    )


def test_a_node_without_our_entry_point_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    monkeypatch.delenv(_vllm.PLUGINS_VARIABLE, raising=False)
    assert "install rayserve_hooks on this node with pip" in _vllm.problem_here()


def test_a_functions_error_reaches_who_loads_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import plugins

    def fail() -> None:
        raise RuntimeError("no such parser")

    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.setattr(plugins, "load_plugins_by_group", lambda group: {group: fail})
    with pytest.raises(RuntimeError, match="no such parser"):
        _vllm.load_general_plugins()


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("EngineCore", ("engine core", None)),
        ("EngineCore_DP3", ("engine core", 3)),
        ("VllmWorker-0", ("worker", 0)),
        ("VllmWorker-12", ("worker", 12)),
        ("MainProcess", None),  # as the one that inspects a model, and any program's own
        ("VLLM_DP_Coordinator", None),
        ("EngineCoreOther", None),
    ],
)
def test_a_process_is_known_by_its_name(
    name: str, process: tuple[str, int | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", name)
    found = _vllm.this_process()
    assert (found and (found.role, found.rank)) == process


def test_the_names_are_those_that_vllm_gives() -> None:
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor, ray_utils

    engines = inspect.getsource(utils.CoreEngineProcManager)
    assert 'name=f"EngineCore_DP{global_index}" if is_dp else "EngineCore"' in engines
    workers = inspect.getsource(multiproc_executor)
    assert 'name=f"VllmWorker-{rank}"' in workers
    assert 'name = f"vllm_Worker_{instance_id}"' in inspect.getsource(ray_utils)


def test_a_worker_without_a_name_is_known_by_who_loads_the_plugins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in the older Ray executor, whose actors have no names."""
    from vllm import plugins
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    found: list[ProcessInfo | None] = []
    monkeypatch.setattr(plugins, "load_general_plugins", lambda: found.append(_vllm.this_process()))
    config: Any = SimpleNamespace(
        enable_trace_function_call_for_thread=lambda: None,
        parallel_config=SimpleNamespace(worker_cls=None),
    )
    for wrapper in (WorkerWrapperBase(rpc_rank=1), WorkerWrapperBase(rpc_rank=0, global_rank=3)):
        with pytest.raises(ValueError, match="worker_cls"):
            wrapper.init_worker([{"vllm_config": config}] * 2)
    assert [(info.role, info.rank) for info in found if info] == [("worker", 1), ("worker", 3)]


def test_a_core_without_a_name_is_known_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the Ray backend of data parallelism, where cores are actors."""
    from vllm import plugins
    from vllm.v1.engine.core import EngineCore

    found: list[ProcessInfo | None] = []

    def load() -> None:
        found.append(_vllm.this_process())
        raise RuntimeError("enough")

    monkeypatch.setattr(plugins, "load_general_plugins", load)
    for size in (1, 2):
        parallel = SimpleNamespace(data_parallel_size=size, data_parallel_index=1)
        config: Any = SimpleNamespace(parallel_config=parallel)
        executor: Any = None
        with pytest.raises(RuntimeError, match="enough"):
            EngineCore(config, executor, log_stats=False)
    assert [(info.role, info.rank) for info in found if info] == [
        ("engine core", None),
        ("engine core", 1),
    ]


def engine(**parallel: Any) -> Any:
    """Return a client whose config is vLLM's own."""
    from vllm.config import ParallelConfig

    return SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=ParallelConfig(**parallel)))


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, [("engine core", None)]),  # one worker, in the core's process
        (
            {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
            [("engine core", None), ("worker", 0), ("worker", 1)],
        ),
        (
            {
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 2,
                "distributed_executor_backend": "mp",
            },
            [("engine core", None), *(("worker", rank) for rank in range(4))],
        ),
        (
            {
                "data_parallel_size": 4,
                "data_parallel_size_local": 1,
                "data_parallel_rank": 2,
                "tensor_parallel_size": 2,
                "distributed_executor_backend": "mp",
            },
            [("engine core", 2), ("worker", 0), ("worker", 1)],
        ),
        (
            {
                "data_parallel_size": 2,
                "data_parallel_size_local": 2,
                "distributed_executor_backend": "mp",
            },
            [("engine core", 0), ("engine core", 1), ("worker", 0), ("worker", 0)],
        ),
    ],
)
def test_the_processes_of_an_engine(
    parallel: dict[str, Any], expected: list[tuple[str, int | None]]
) -> None:
    assert _vllm.processes_of(engine(**parallel)) == Counter(expected)


def test_rays_workers_are_expected_on_all_nodes() -> None:
    parallel = SimpleNamespace(
        data_parallel_size=1,
        data_parallel_size_local=1,
        data_parallel_rank=0,
        data_parallel_backend="mp",
        distributed_executor_backend="ray",
        world_size=2,
        local_world_size=2,
    )
    found = _vllm.processes_of(
        SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    )
    assert found == Counter([("engine core", None), ("worker", 0), ("worker", 1)])


# In Ray: a task without an actor is the one that makes the config, a named actor is a worker.


def in_ray(function: Any, name: str | None = None) -> Any:
    import ray

    if name is None:
        return ray.get(ray.remote(function).options(num_cpus=0).remote())

    class Actor:
        def call(self) -> Any:
            return function()

    actor: Any = ray.remote(Actor).options(name=name, num_cpus=0).remote()
    try:
        return ray.get(actor.call.remote())
    finally:
        ray.kill(actor)


def role_here() -> tuple[str, int | None] | None:
    found = _vllm.this_process()
    return None if found is None else (found.role, found.rank)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (None, ("engine config", None)),
        ("vllm_Worker_abc_TP1", ("worker", 1)),
        ("vllm_Worker_abc_PP3", ("worker", 3)),
        ("vllm_Worker_abc_TP1_PP1", ("worker", None)),
        ("vllm_Worker_abc", ("worker", None)),
        ("SERVE_REPLICA::app#LLMServer", None),
    ],
)
def test_a_process_of_rays(
    ray_cluster: Any, name: str | None, role: tuple[str, int | None] | None
) -> None:
    assert in_ray(role_here, name) == role
    assert _vllm.this_process() is None, "a driver is none"
