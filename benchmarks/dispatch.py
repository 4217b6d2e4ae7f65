"""One hook call with 1 to 1000 callbacks that change nothing: direct calls, bare pluggy, ours.

Ours traces each call, looks for changes and names who fails; bare pluggy only calls.
"""

from __future__ import annotations

import json
import statistics
import sys
import timeit
from typing import Any

import pluggy
from report import Benchmark, arguments, in_fresh_process

from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.stack import CallbackStack

CASES = ("1", "10", "100", "1000")
SIDES = ("direct calls", "bare pluggy", "ours")
MOST_US = 3.0

hookspec = pluggy.HookspecMarker("bare")
hookimpl = pluggy.HookimplMarker("bare")


class Spec:
    @hookspec
    def on_after_init(self, ctx: CallbackCtx) -> None: ...


class Callback:
    @hookimpl
    def on_after_init(self, ctx: CallbackCtx) -> None:
        pass


def microseconds(count: int, side: str) -> float:
    """Return the microseconds of one hook call, the best of several runs."""
    ctx = CallbackCtx(
        llm_config=object(),
        node=NodeInfo("n", "10.0.0.1", is_local=True),
        runtime_env={"env_vars": {f"VARIABLE_{i}": "1" for i in range(20)}},
        extra_init_kwargs={"max_model_len": 512},
    )
    callbacks = [Callback() for _ in range(count)]

    def directly() -> None:
        for callback in callbacks:
            callback.on_after_init(ctx=ctx)

    call: Any = directly
    if side == "bare pluggy":
        bare = pluggy.PluginManager("bare")
        bare.add_hookspecs(Spec)
        for callback in callbacks:
            bare.register(callback)
        call = lambda: bare.hook.on_after_init(ctx=ctx)
    elif side == "ours":
        named = [{"callback": Callback, "name": f"c{i}"} for i in range(count)]
        manager = PluginManager(CallbackStack.parse(named))
        call = lambda: manager.hook.on_after_init(ctx=ctx)
    number = max(1, 2000 // count)
    best = min(timeit.repeat(call, number=number, repeat=7))
    return best / number * 1e6


def main() -> int:
    options = arguments(__doc__)
    if options.one:
        print(json.dumps(microseconds(int(options.one[0]), options.one[1])))
        return 0
    benchmark = Benchmark("dispatch", "One hook call, by number of callbacks", unit="µs")
    benchmark.run(CASES, SIDES, options.rounds, in_fresh_process)
    slopes = {
        side: statistics.linear_regression(
            [int(case) for case in CASES],
            [statistics.median(benchmark.values[case][side]) for case in CASES],
        ).slope
        for side in SIDES
    }
    extra = slopes["ours"] - slopes["bare pluggy"]
    notes = {f"µs per callback, {side}": round(slope, 3) for side, slope in slopes.items()}
    notes[f"µs per callback on top of pluggy (at most {MOST_US:g} is wanted)"] = round(extra, 3)
    return benchmark.finish(notes) or int(extra > MOST_US)


if __name__ == "__main__":
    sys.exit(main())
