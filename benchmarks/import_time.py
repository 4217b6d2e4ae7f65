"""How long ``import rayserve_hooks`` takes, against ``import pluggy, pydantic``.

Each import is a fresh process, the two in turn; the start of Python itself is not counted.
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {"dependencies": "import pluggy, pydantic", "ours": "import rayserve_hooks"}
PROGRAM = "import time; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(rounds):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", PROGRAM.format(statement)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds[name].append(float(done.stdout))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{STATEMENTS[name]:24} median {medians[name] * 1000:.1f} ms, "
            f"range {min(values) * 1000:.1f} to {max(values) * 1000:.1f} ms"
        )
    ratio = medians["ours"] / medians["dependencies"]
    print(f"ratio {ratio:.2f} (ours / dependencies; at most 3 is wanted)")
    return 0 if ratio <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
