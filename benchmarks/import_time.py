"""How long it takes to import what a callback and its manager need, against what that stands on.

Each import is a fresh process; the start of Python itself is not counted.
"""

from __future__ import annotations

import subprocess
import sys

from report import Benchmark, arguments

CASE = "import"
STATEMENTS = {
    "ours": "from rayserve_hooks import CallbackCtx, get_plugin_manager, hookimpl",
    "dependencies": "import pluggy, pydantic",
}
PROGRAM = "import time; s = time.perf_counter(); {}; print((time.perf_counter() - s) * 1000)"
MOST = 3


def milliseconds(case: str, side: str) -> float:
    command = [sys.executable, "-c", PROGRAM.format(STATEMENTS[side])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    options = arguments(__doc__, rounds=20)
    benchmark = Benchmark("import_time", "Import time", unit="ms")
    benchmark.run([CASE], tuple(STATEMENTS), options.rounds, milliseconds)
    ratio = benchmark.ratio(CASE)
    return benchmark.finish({f"ratio (at most {MOST} is wanted)": round(ratio, 2)}) or int(
        ratio > MOST
    )


if __name__ == "__main__":
    sys.exit(main())
