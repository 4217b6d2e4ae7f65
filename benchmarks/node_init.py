"""The node-initialization phase of a one-node deployment: stock Ray against this package.

Both sides drive the entry points that a replica drives between its own start and the engine's
(``VLLMEngine.start``, Ray 2.60): the callback is built, ``on_before_node_init`` is awaited, then
Ray's own step unless switched off, then ``on_after_node_init``. There is nothing to download.
Each round is a fresh driver process on a cluster of its own, the two sides in turn. The stock
side has one ``CallbackBase`` subclass, ours three stacked callbacks that do the same work.
"""

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIDES = ("stock", "ours")


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


def make_config(side: str) -> Any:
    """Configure both sides as YAML does, so that nothing of ours is imported or built before."""
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    callbacks = {"callbacks": [SetsArgument, NotesStart, NotesEnd]}
    return LLMConfig(
        model_loading_config={"model_id": "tiny"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        callback_config=CallbackConfig(callback_class=stock_callback())
        if side == "stock"
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


def one_round(side: str) -> float:
    """Run in a fresh process: start Ray, import what a replica has imported by then, measure."""
    import ray

    # A replica has imported the engine before it initializes nodes.
    import ray.llm._internal.serve.engines.vllm.vllm_engine

    ray.init(num_cpus=4, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    config = make_config(side)
    assert config.get_engine_config() is not None
    seconds = asyncio.run(node_initialization(config))
    ray.shutdown()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--side", choices=SIDES, help="one round of one side, for this program")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_round(arguments.side)))
        return 0
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {side} {seconds[side][-1]:.3f} s", flush=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratio = medians["stock"] / medians["ours"]
    for side, values in seconds.items():
        print(
            f"{side:6} median {medians[side]:.3f} s, range {min(values):.3f} to {max(values):.3f} s"
        )
    print(f"ratio  {ratio:.1f} (stock / ours; at least 20 is wanted)")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "ratio": ratio}, indent=2))
    return 0 if ratio >= 20 else 1


if __name__ == "__main__":
    sys.exit(main())
