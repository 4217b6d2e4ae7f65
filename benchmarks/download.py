"""From a fresh node task to a verified model on disk, from a paced S3 server: Ray against ours.

The first two cases are whole tasks on another node, in a new worker process: Ray's own
(``initialize_remote_node``, Ray 2.60) and ours. The next two ask a second time in a process that
has downloaded the model once: with the model in place, and with one of its 8 shards damaged. The
last one asks again after a process that was killed when half of the model was on the disk; how much
of that half is fetched again is among the notes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import store
from report import Benchmark, arguments, in_fresh_process

TASK_ALL, TASK_TOKENIZER = "1 GiB in 8 shards", "config and tokenizer"
AGAIN, DAMAGED, KILLED = "asked again", "1 of 8 shards damaged", "killed in the middle"
CASES = (TASK_ALL, TASK_TOKENIZER, AGAIN, DAMAGED, KILLED)
KILLS = store.DATA / "kills.jsonl"
"""Of each kill: the side, the bytes that were on the disk, and those of them fetched again."""
SIDES = ("stock Ray", "ours")
WANTED = {TASK_ALL: 4, TASK_TOKENIZER: 6, AGAIN: 20}


def make_config(cache: str) -> Any:
    from ray.serve.llm import LLMConfig

    variables = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION")}
    return LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": store.uri(store.SHARDS)},
        runtime_env={"env_vars": {**variables, "HF_HUB_CACHE": cache}},
    )


async def stock_task(config: Any, node_id: str, mode: str) -> None:
    import ray
    from ray.llm._internal.common.utils.download_utils import NodeModelDownloadable
    from ray.llm._internal.serve.utils.node_initialization_utils import initialize_remote_node

    ctx = config.get_or_create_callback().ctx
    ctx.worker_node_download_model = NodeModelDownloadable[mode]
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(initialize_remote_node).options(
        num_cpus=0, scheduling_strategy=pinned, runtime_env=ctx.runtime_env
    )
    await task.remote(config)


async def our_task(config: Any, node_id: str, mode: Any) -> None:
    from ray import cloudpickle

    from rayserve_hooks.cluster import _ray
    from rayserve_hooks.cluster.remote_node import RemoteNode
    from rayserve_hooks.cluster.stacks import stack_of
    from rayserve_hooks.cluster.travel import ModelSource, request_for
    from rayserve_hooks.context import CallbackCtx, NodeInfo

    ctx = CallbackCtx(
        llm_config=config,
        node=_ray.own_node(),
        worker_node_download_model=mode,
        runtime_env=_ray.initial_runtime_env(config),
    )
    source = ModelSource(*_ray.model_source(config))
    node = NodeInfo(node_id, "other", is_local=False)
    request = request_for(node, ctx, stack_of(config), source, cloudpickle.dumps(config))
    await RemoteNode(request, ctx.runtime_env).wait()


def task_seconds(side: str, mode: str, cache: Path) -> float:
    import ray

    # A replica has imported all this when it starts the tasks.
    import ray.llm._internal.serve.engines.vllm.vllm_engine
    from ray.cluster_utils import Cluster

    import rayserve_hooks.cluster.driver  # noqa: F401 - likewise

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        config = make_config(str(cache))
        assert config.get_engine_config() is not None
        task = stock_task if side == SIDES[0] else our_task
        store.warm_memory()
        started = time.perf_counter()
        asyncio.run(task(config, other.node_id, mode))
        return time.perf_counter() - started
    finally:
        ray.shutdown()
        cluster.shutdown()


def fetch_of(side: str, cache: Path) -> Callable[[], int]:
    """Return a download, with all imported that it needs; it returns the bytes it kept."""
    os.environ["HF_HUB_CACHE"] = str(cache)
    uri = store.uri(store.SHARDS)
    if side == SIDES[0]:
        from ray.llm._internal.common.utils.cloud_utils import CloudMirrorConfig
        from ray.llm._internal.common.utils.download_utils import download_model_files

        def stock() -> int:
            download_model_files("tiny", CloudMirrorConfig(bucket_uri=uri))
            return 0

        return stock
    from rayserve_hooks.context import NodeModelDownloadable
    from rayserve_hooks.download.caller import Caller
    from rayserve_hooks.download.model import Mirror, download_node

    def ours() -> int:
        bars: list[Bar] = []
        caller = Caller(progress_bar=lambda _, total: Bar(bars, total))
        mode = NodeModelDownloadable.MODEL_AND_TOKENIZER
        download_node("tiny", Mirror(uri), mode, caller=caller)
        size = sum(file.stat().st_size for file in store.folder(store.SHARDS).iterdir())
        return size - sum(bar.total - bar.kept for bar in bars)

    return ours


class Bar:
    """A progress bar that remembers what was there when it began."""

    def __init__(self, bars: list[Bar], total: int) -> None:
        self.total, self.kept = total, -1
        bars.append(self)

    def update(self, n: int) -> None:
        if self.kept < 0:
            self.kept = n

    def close(self) -> None:
        pass


def killed_seconds(side: str, cache: Path) -> float:
    child = os.fork()
    if not child:
        fetch_of(side, cache)()
        os._exit(1)  # it was to be killed before
    half = sum(file.stat().st_size for file in store.folder(store.SHARDS).iterdir()) // 2
    while (on_disk := bytes_below(cache)) < half:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    on_disk = bytes_below(cache)
    fetch = fetch_of(side, cache)
    store.warm_memory()
    started = time.perf_counter()
    kept = fetch()
    value = time.perf_counter() - started
    with KILLS.open("a") as file:
        file.write(json.dumps([side, on_disk, max(0, on_disk - kept)]) + "\n")
    return value


def bytes_below(folder: Path) -> int:
    found = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += file.stat().st_blocks * 512
    return found


def kills() -> dict[str, str]:
    """Return by side what the kills cost, for the notes."""
    costs = [json.loads(line) for line in KILLS.read_text().splitlines()]
    return {
        f"fetched again after a kill, {side}": ", ".join(
            f"{again / 1e6:.0f} of {on_disk / 1e6:.0f} MB on disk"
            for name, on_disk, again in costs
            if name == side
        )
        for side in SIDES
    }


def again_seconds(side: str, damage: bool, cache: Path) -> float:
    fetch = fetch_of(side, cache)
    fetch()
    if damage:
        shard = next(cache.rglob("model-00003.safetensors"))
        with shard.open("r+b") as file:
            file.write(b"damaged")
    store.warm_memory()
    started = time.perf_counter()
    fetch()
    return time.perf_counter() - started


def seconds(case: str, side: str) -> float:
    store.warm_up(store.SHARDS)
    with store.target() as cache:
        if case in (AGAIN, DAMAGED):
            value = again_seconds(side, case == DAMAGED, cache)
        elif case == KILLED:
            value = killed_seconds(side, cache)
        else:
            mode = "TOKENIZER_ONLY" if case == TASK_TOKENIZER else "MODEL_AND_TOKENIZER"
            value = task_seconds(side, mode, cache)
        found = next(cache.rglob("snapshots/*/tokenizer.json")).parent
        if case == TASK_TOKENIZER:
            assert not list(found.glob("*.safetensors"))
        else:
            store.check_equal(store.SHARDS, found)
    return value


def main() -> int:
    options = arguments(__doc__)
    if options.one:
        print(json.dumps(seconds(*options.one)))
        return 0
    benchmark = Benchmark("download", "A node's download, as a task and again", wanted=WANTED)
    with store.serving():
        KILLS.write_text("")
        benchmark.run(CASES, SIDES, options.rounds, in_fresh_process)
    return benchmark.finish(kills())


if __name__ == "__main__":
    sys.exit(main())
