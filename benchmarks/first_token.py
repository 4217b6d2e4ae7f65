"""From ``serve.run`` to the first token of the tiny model: stock Ray against this package.

Both have the same three tasks to do before the engine starts, each a wait of one second that
stands for what start-up tasks mostly are: waiting for a store, a disk or a service. Stock Ray has
one callback class, which does them one after another; ours has three callbacks, each of which
starts its task with ``ctx.run_in_background``. Each round is a fresh driver and cluster.
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
from report import Benchmark, arguments, in_fresh_process

ROOT = Path(__file__).parent.parent
SIDES = ("stock Ray", "ours")
CASE = "tiny model, 3 tasks"


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


def first_token(side: str) -> float:
    import ray
    from ray import cloudpickle, serve
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig, build_openai_app

    sys.path.insert(0, str(ROOT / "examples"))
    import processes
    from tiny_model import make_tiny_model

    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    callbacks = [{"callback": Starts, "name": f"task_{number}"} for number in range(3)]
    config = LLMConfig(
        model_loading_config={
            "model_id": "tiny",
            "model_source": str(make_tiny_model(ROOT / ".cache" / "tiny-llama")),
        },
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs={"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
        log_engine_metrics=False,
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
        callback_config=CallbackConfig(callback_class=stock_callback())
        if side == SIDES[0]
        else CallbackConfig("rayserve_hooks.HooksCallback", {"callbacks": callbacks}),
    )
    port = processes.free_port()
    ray.init(num_cpus=4, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = build_openai_app({"llm_configs": [config]})
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
        print(json.dumps(first_token(options.one[1])))
        return 0
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    benchmark = Benchmark("first_token", "From serve.run to the first token", wanted={CASE: 1.2})
    benchmark.run([CASE], SIDES, options.rounds, in_fresh_process)
    return benchmark.finish()


if __name__ == "__main__":
    sys.exit(main())
