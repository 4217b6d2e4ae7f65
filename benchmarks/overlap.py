"""Three tasks of known length, started with ``ctx.run_in_background`` by three callbacks.

Against the longest of them alone. The tasks wait, two in threads and one on the event loop.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from report import Benchmark, arguments

from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core import threads
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.running import with_background
from rayserve_hooks.core.stack import CallbackStack

CASE = "tasks of 1.0, 1.5 and 2.0 s"
LONGEST_S = 2.0
MOST = 1.05


class Waits:
    def __init__(self, seconds: float, sync: bool) -> None:
        self.seconds, self.sync = seconds, sync

    def on_before_download(self, ctx: CallbackCtx) -> None:
        wait: Any = time.sleep if self.sync else asyncio.sleep
        ctx.run_in_background(wait, self.seconds)


def seconds(case: str, side: str) -> float:
    tasks = [(1.0, True), (1.5, False), (LONGEST_S, True)] if side == "ours" else []
    callbacks = [
        {"callback": Waits, "name": f"waits_{s}", "kwargs": {"seconds": s, "sync": sync}}
        for s, sync in tasks
    ]
    manager = PluginManager(CallbackStack.parse(callbacks))
    ctx = CallbackCtx(
        llm_config=object(),
        node=NodeInfo("n", "10.0.0.1", is_local=True),
    )
    chain = threads.run_in_thread(manager.hook.on_before_download, ctx=ctx)
    started = time.perf_counter()
    if side == "ours":
        asyncio.run(with_background(manager, ctx, chain))
    else:
        chain.close()
        time.sleep(LONGEST_S)
    return time.perf_counter() - started


def main() -> int:
    options = arguments(__doc__)
    benchmark = Benchmark("overlap", "Background tasks", wanted={CASE: 1 / MOST})
    benchmark.run([CASE], ("the longest alone", "ours"), options.rounds, seconds)
    ratio = 1 / benchmark.ratio(CASE)
    return benchmark.finish({f"ours / longest (at most {MOST} is wanted)": round(ratio, 4)})


if __name__ == "__main__":
    sys.exit(main())
