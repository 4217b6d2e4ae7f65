"""From the start of the engine to its first token: no compile cache, Ray's recipe, and ours.

Each round is a fresh process with the real engine, and each has a new folder for the cache, as on
another machine. Ray's recipe keeps the folder that ``compilation_config.cache_dir`` names; ours
restores a signed archive that an earlier start has saved. The time of restoring is included.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import OURS, Benchmark, arguments

ROOT = Path(__file__).parent.parent
CASE = "tiny model"
SIDES = ("no cache", "Ray's recipe", OURS)
WORK = "COMPILE_CACHE_BENCHMARK"
MAX_MODEL_LEN = 512


class Config:
    """What the callback reads of an ``LLMConfig``, which takes seconds to import."""

    model_id = "tiny"
    accelerator_type = None

    def __init__(self, model: Path) -> None:
        self.engine_kwargs = {"max_model_len": MAX_MODEL_LEN}
        self.hf_model_id = str(model)

    def get_engine_config(self) -> Config:
        return self


def start(side: str) -> dict[str, float]:
    """Start the engine once; return the seconds, and those of the step of it that compiles."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_model import make_tiny_model
    from vllm import LLM, SamplingParams

    from rayserve_hooks.context import CallbackCtx
    from rayserve_hooks.impls.compile_cache import VARIABLE, CompileCache

    work = Path(os.environ[WORK])
    folder = tempfile.mkdtemp(dir=work)
    model = make_tiny_model(ROOT / ".cache" / "tiny-llama")
    config: Any = Config(model)
    ctx = CallbackCtx(llm_config=config)
    callback = CompileCache(str(work / "store"), key_variable="CACHE_KEY", folder=folder)
    options: dict[str, Any] = {"model": str(model), "max_model_len": MAX_MODEL_LEN}
    if side == SIDES[1]:
        options["compilation_config"] = {"cache_dir": str(work / "kept")}
    callback.on_before_init(ctx)
    root = ctx.runtime_env["env_vars"][VARIABLE]
    os.environ[VARIABLE] = root
    callback.on_after_init(ctx)
    log = work / "log"
    with log.open("w") as file:
        printed = os.dup(1)
        os.dup2(file.fileno(), 1)
        started = time.perf_counter()
        if side == SIDES[2]:
            callback.on_before_engine_init(ctx)
        engine = LLM(**options, max_num_seqs=4)
        engine.generate(["hello"], SamplingParams(max_tokens=1), use_tqdm=False)
        seconds = time.perf_counter() - started
        os.dup2(printed, 1)
    if side == SIDES[2]:
        callback.on_engine_ready(ctx)
        callback.on_shutdown(ctx)
    found = re.findall(r"init engine \(.*\) took ([\d.]+) s", log.read_text())
    return {"seconds": seconds, "compiled": float(found[-1]) if found else float("nan")}


def in_fresh_process(side: str) -> dict[str, float]:
    command = [sys.executable, sys.argv[0], "--one", CASE, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    options = arguments(__doc__, rounds=3)
    if options.one:
        print(json.dumps(start(options.one[1])))
        return 0
    compiled: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {WORK: work, "CACHE_KEY": os.urandom(16).hex()}
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        Path(work, "store").mkdir()
        for side in SIDES[1:]:  # what keeps something has had its first start
            in_fresh_process(side)

        def measure(_: str, side: str) -> float:
            found = in_fresh_process(side)
            compiled[side].append(found["compiled"])
            return found["seconds"]

        title = "From the start of the engine to its first token, on another folder"
        benchmark = Benchmark("compile_cache", title, wanted={CASE: 1.7})
        benchmark.run([CASE], SIDES, options.rounds, measure)
        size = sum(path.stat().st_size for path in Path(work, "store").glob("*.archive"))
        kept = "made" if Path(work, "kept").exists() else "never made"
    medians = {side: statistics.median(values) for side, values in compiled.items()}
    notes = {
        f"seconds of profiling and warm-up, in which the engine compiles, {side}": (
            f"{medians[side]:.1f}"
        )
        for side in SIDES
    }
    share = medians[SIDES[2]] / medians[SIDES[0]]
    notes["share of that step that is left"] = f"{100 * share:.0f} %"
    notes["size of the archive"] = f"{size / 1e6:.1f} MB"
    notes["the folder that Ray's recipe names"] = kept
    return benchmark.finish(notes)


if __name__ == "__main__":
    sys.exit(main())
