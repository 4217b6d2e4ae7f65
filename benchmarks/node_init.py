"""The node-initialization phase on 1 to 8 simulated nodes: stock Ray against this package.

Both sides drive the entry points that a replica drives between its own start and the engine's
(``VLLMEngine.start``, Ray 2.60): the callback is built, ``on_before_node_init`` is awaited, then
Ray's own step unless switched off, then ``on_after_node_init``. There is nothing to download.
Each round is a fresh driver process on a cluster of its own, the two sides in turn. The stock
side has one ``CallbackBase`` subclass, ours three stacked callbacks that do the same work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from report import Benchmark, arguments, in_fresh_process

CASES = ("1 node", "2 nodes", "4 nodes", "8 nodes")
SIDES = ("stock Ray", "ours")
WANTED = {"1 node": 20, "4 nodes": 5}
_ATTEMPTS = 3


def stock_callback() -> type:
    from ray.llm._internal.common.callbacks.base import CallbackBase

    class Stock(CallbackBase):
        async def on_before_node_init(self) -> None:
            self.llm_config.update_engine_kwargs(max_model_len=192)

        def on_before_download_model_files_distributed(self) -> None:
            self.ctx.custom_data["started"] = time.time()

        async def on_after_node_init(self) -> None:
            self.ctx.custom_data["ended"] = time.time()

    return Stock


class SetsArgument:
    def on_before_init(self, ctx: Any) -> None:
        ctx.extra_init_kwargs["max_model_len"] = 192


class NotesStart:
    def on_before_download(self, ctx: Any) -> None:
        ctx.custom_data["started"] = time.time()


class NotesEnd:
    async def on_after_init(self, ctx: Any) -> None:
        ctx.custom_data["ended"] = time.time()


def make_config(side: str, nodes: int) -> Any:
    """Configure both sides as YAML does, so that nothing of ours is imported or built before."""
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    callbacks = {"callbacks": [SetsArgument, NotesStart, NotesEnd]}
    return LLMConfig(
        model_loading_config={"model_id": "tiny"},
        placement_group_config={"bundles": [{"CPU": 1}] * nodes, "strategy": "STRICT_SPREAD"},
        callback_config=CallbackConfig(callback_class=stock_callback())
        if side == SIDES[0]
        else CallbackConfig("rayserve_hooks.HooksCallback", callbacks),
    )


async def node_initialization(config: Any) -> float:
    """Do what a replica does before it builds the engine; return the seconds it took."""
    from ray.llm._internal.serve.utils.node_initialization_utils import initialize_node

    started = time.perf_counter()
    callback = config.get_or_create_callback()
    await callback.run_callback("on_before_node_init")
    if callback.ctx.run_init_node:
        await initialize_node(config)
    await callback.run_callback("on_after_node_init")
    return time.perf_counter() - started


def seconds(case: str, side: str) -> float:
    """Run in a fresh process: start Ray, import what a replica has imported by then, measure."""
    import ray

    # A replica has imported the engine before it initializes nodes.
    import ray.llm._internal.serve.engines.vllm.vllm_engine
    from ray.cluster_utils import Cluster

    nodes = int(case.partition(" ")[0])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    config = make_config(side, nodes)
    assert config.get_engine_config() is not None
    try:
        return asyncio.run(node_initialization(config))
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> int:
    options = arguments(__doc__)
    if options.one:
        print(json.dumps(seconds(*options.one)))
        return 0
    benchmark = Benchmark("node_init", "Node initialization, nothing to download", wanted=WANTED)
    failures = Counter[str]()

    def measure(case: str, side: str) -> float:
        # Stock Ray now and then reads its placement group before that is ready, and fails.
        for _ in range(_ATTEMPTS):
            try:
                return in_fresh_process(case, side)
            except subprocess.CalledProcessError:
                failures[side] += 1
        raise RuntimeError(f"{side} failed {_ATTEMPTS} times with {case}")

    benchmark.run(CASES, SIDES, options.rounds, measure)
    counts = [int(case.partition(" ")[0]) for case in CASES]
    notes: dict[str, object] = {}
    for side in SIDES:
        notes[f"failed and measured again, {side}"] = failures[side]
        medians = [statistics.median(benchmark.values[case][side]) for case in CASES]
        slope = statistics.linear_regression(counts, medians).slope
        notes[f"seconds for each further node, {side}"] = round(slope, 2)
    return benchmark.finish(notes)


if __name__ == "__main__":
    sys.exit(main())
