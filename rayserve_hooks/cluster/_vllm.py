"""The one place that touches vLLM's internal parts; `tests/cluster/test__vllm.py` watches them.

Importing this module does not import vLLM. Read in vLLM 0.27 and 0.29.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from rayserve_hooks.context import ProcessInfo
from rayserve_hooks.core.hooks import ENGINE_PROCESS
from rayserve_hooks.errors import CallbackConfigError

PLUGIN = "rayserve_hooks"
"""The name of our entry point, as ``VLLM_PLUGINS`` may have it."""

GROUP = "vllm.general_plugins"
PLUGINS_VARIABLE = "VLLM_PLUGINS"

CONFIG, CORE, WORKER = ROLES = ("engine config", "engine core", "worker")
"""The engine's processes besides the replica, in the order in which they start."""


def plugins_problem(chosen: str | None) -> str:
    """Return why vLLM would not load our plugin with a value of ``VLLM_PLUGINS``; nothing if not.

    Only what the variable names is loaded; an empty one names nothing.
    """
    if chosen is None or PLUGIN in chosen.split(","):
        return ""
    with_ours = ",".join(filter(None, [*chosen.split(","), PLUGIN]))
    return (
        f"{PLUGINS_VARIABLE} is {chosen!r}, so that vLLM does not load the plugin {PLUGIN!r} in "
        f"the engine's processes; set {PLUGINS_VARIABLE}={with_ours}, or remove it"
    )


def check_plugins(env_vars: Mapping[str, Any] | None, callbacks: Sequence[str]) -> None:
    """Raise if a replica's environment keeps vLLM from running the hook of these callbacks.

    Raises:
        CallbackConfigError: ``VLLM_PLUGINS`` does not name us.
    """
    chosen = (env_vars or {}).get(PLUGINS_VARIABLE)
    problem = plugins_problem(chosen if isinstance(chosen, str) else None)
    if problem and callbacks:
        whose = ", ".join(map(repr, callbacks))
        raise CallbackConfigError(f"{ENGINE_PROCESS} of {whose} would not run: {problem}")


def problem_here() -> str:
    """Return why vLLM would not load our plugin on this node, as this process sees it."""
    problem = plugins_problem(os.environ.get(PLUGINS_VARIABLE))
    if problem or importlib.metadata.entry_points(group=GROUP, name=PLUGIN):
        return problem
    return (
        f"the installed packages have no entry point {PLUGIN!r} in the group {GROUP!r}, by which "
        "vLLM runs the hook in the engine's processes; install rayserve_hooks on this node with "
        "pip, since py_modules or PYTHONPATH are not enough"
    )


def load_general_plugins() -> None:
    """Load vLLM's general plugins in this process, if they are not loaded yet."""
    from vllm import plugins

    load: Any = plugins.load_general_plugins  # which has no annotations
    load()


def this_process() -> ProcessInfo | None:
    """Return which of the engine's processes this is; None for any other.

    A general plugin is told nothing, so this looks at names that vLLM gives. Of processes that it
    gives none, such as the workers of its older Ray executor, it looks at what has called.
    """
    name = multiprocessing.current_process().name
    if match := re.fullmatch(r"EngineCore(?:_DP(\d+))?", name):
        return ProcessInfo(CORE, _number(match[1]))
    if match := re.fullmatch(r"VllmWorker-(\d+)", name):
        return ProcessInfo(WORKER, int(match[1]))
    return _caller() or _ray_process()


def _caller() -> ProcessInfo | None:
    """Return what the code that loads the plugins makes this process."""
    for frame in _frames(sys._getframe()):  # noqa: SLF001 - the interpreter's own way
        made: Any = frame.f_locals.get("self")
        classes = {f"{base.__module__}:{base.__name__}" for base in type(made).__mro__}
        if "vllm.v1.worker.worker_base:WorkerWrapperBase" in classes:
            rank = getattr(made, "global_rank", None)
            return ProcessInfo(WORKER, made.rpc_rank if rank is None else rank)
        if "vllm.v1.engine.core:EngineCore" in classes:
            parallel = frame.f_locals["vllm_config"].parallel_config
            several = parallel.data_parallel_size > 1
            return ProcessInfo(CORE, parallel.data_parallel_index if several else None)
    return None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ray_process() -> ProcessInfo | None:
    """Return what this process of Ray's is; Ray alone is asked, and only where it is connected."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return ProcessInfo(CONFIG) if context.get_task_id() is not None else None
    match = re.match(r"vllm_Worker_", context.get_actor_name() or "")
    if match is None:
        return None
    # The parts of the name are those parallel sizes that are more than 1.
    parts = re.findall(r"_(?:TP|PP|PCP)(\d+)", match.string)
    return ProcessInfo(WORKER, int(parts[0]) if len(parts) == 1 else None)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def processes_of(engine: Any) -> Counter[tuple[str, int | None]]:
    """Return the cores and workers that an engine has started, each with its rank.

    Args:
        engine: vLLM's client of the engine, which is up.

    Of an executor that is none of vLLM's own nothing is known, nor of cores that another replica
    starts. The executor for one worker has it in the core's process, which then is one process.
    """
    parallel = engine.vllm_config.parallel_config
    several = parallel.data_parallel_size > 1
    first = parallel.data_parallel_rank or 0
    if parallel.data_parallel_backend == "ray":
        cores = parallel.data_parallel_size
    else:
        cores = parallel.data_parallel_size_local
    workers = {"mp": parallel.local_world_size, "ray": parallel.world_size}
    ranks = workers.get(parallel.distributed_executor_backend, 0)
    expected = Counter[tuple[str, int | None]]()
    for core in range(cores):
        expected[CORE, first + core if several else None] += 1
        expected.update((WORKER, rank) for rank in range(ranks))
    return expected


def compile_variables() -> dict[str, Any]:
    """Return the variables that are in the key of vLLM's compile cache; empty without vLLM.

    vLLM is not imported for it: whoever has an engine has done that.
    """
    envs: Any = sys.modules.get("vllm.envs")
    factors = getattr(envs, "compile_factors", dict)
    return dict(factors())
