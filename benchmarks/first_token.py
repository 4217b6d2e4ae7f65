"""From ``serve.run`` to the first token of the tiny model: stock Ray against this package.

Both have the same three tasks to do before the engine starts, each a wait of one second that
stands for what start-up tasks mostly are: waiting for a store, a disk or a service. Stock Ray has
one callback class, which does them one after another; ours has three callbacks, each of which
starts its task with ``ctx.run_in_background``. Each round is a fresh driver and cluster.

The other case is ours alone: the same three callbacks, and beside them one with empty hooks, in
the process that builds the app and in each process of the engine.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import requests
from report import OURS, Benchmark, arguments, in_fresh_process

ROOT = Path(__file__).parent.parent
TASKS, EMPTY = "tiny model, 3 tasks", "tiny model, empty hooks"
SIDES = {TASKS: ("stock Ray", OURS), EMPTY: ("the same without them", OURS)}
WANTED = {TASKS: 1.2, EMPTY: 1 / 1.02}


def stock_callback() -> type:
    from ray.llm._internal.common.callbacks.base import CallbackBase

    class Stock(CallbackBase):
        async def on_before_node_init(self) -> None:
            for _ in range(3):
                time.sleep(1.0)  # noqa: ASYNC251 - as people write it

    return Stock


class Starts:
    def on_before_init(self, ctx: Any) -> None:
        ctx.run_in_background(time.sleep, 1.0)


class Empty:
    def on_configure(self, ctx: Any) -> None:
        pass

    def on_before_engine_init(self, ctx: Any) -> None:
        pass

    def on_engine_ready(self, ctx: Any) -> None:
        pass

    def on_shutdown(self, ctx: Any) -> None:
        pass


def app_of(case: str, side: str, fields: dict[str, Any]) -> Any:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig, build_openai_app

    import rayserve_hooks

    callbacks: list[Any] = [{"callback": Starts, "name": f"task_{number}"} for number in range(3)]
    if case == EMPTY:
        callbacks += [Empty] if side == OURS else []
        ours = rayserve_hooks.LLMConfig(callbacks=callbacks, **fields)
        return rayserve_hooks.build_openai_app({"llm_configs": [ours]})
    stock = CallbackConfig(callback_class=stock_callback())
    named = CallbackConfig("rayserve_hooks.HooksCallback", {"callbacks": callbacks})
    config = LLMConfig(callback_config=named if side == OURS else stock, **fields)
    return build_openai_app({"llm_configs": [config]})


def first_token(case: str, side: str) -> float:
    import ray
    from ray import cloudpickle, serve

    sys.path.insert(0, str(ROOT / "examples"))
    import processes
    from tiny_model import make_tiny_model

    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    fields = {
        "model_loading_config": {
            "model_id": "tiny",
            "model_source": str(make_tiny_model(ROOT / ".cache" / "tiny-llama")),
        },
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "engine_kwargs": {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
    }
    port = processes.free_port()
    ray.init(num_cpus=4, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = app_of(case, side, fields)
    started = time.perf_counter()
    serve.run(app)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 1,
        "stream": True,
    }
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with requests.post(url, json=body, stream=True, timeout=60) as answer:
        answer.raise_for_status()
        next(answer.iter_content(chunk_size=None))
        seconds = time.perf_counter() - started
    serve.shutdown()
    ray.shutdown()
    return seconds


def main() -> int:
    options = arguments(__doc__)
    if options.one:
        print(json.dumps(first_token(*options.one)))
        return 0
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    benchmark = Benchmark("first_token", "From serve.run to the first token", wanted=WANTED)
    for case, sides in SIDES.items():
        benchmark.run([case], sides, options.rounds, in_fresh_process)
    added = round(100 * (1 / benchmark.ratio(EMPTY) - 1), 1)
    return benchmark.finish({"percent that empty hooks add (at most 2 is wanted)": added})


if __name__ == "__main__":
    sys.exit(main())
