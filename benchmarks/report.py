"""What all benchmarks share: rounds in turn, medians and ranges, a JSON file and a plot.

The machines these run on are shared and noisy, so the sides of a comparison are measured in turn
in one run, and what counts is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rayserve_hooks"
RESULTS = ROOT / "docs" / "benchmarks"


@dataclass
class Benchmark:
    """One comparison.

    Args:
        name: File name of the results.
        title: For the plot.
        unit: Of the values; smaller is better.
        wanted: By case, how many times more the first side must need than the last.
        values: By case and side, one value per round.
    """

    name: str
    title: str
    unit: str = "s"
    wanted: Mapping[str, float] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def run(
        self,
        cases: Sequence[str],
        sides: Sequence[str],
        rounds: int,
        measure: Callable[[str, str], float],
    ) -> None:
        """Measure every case and side in turn, ``rounds`` times."""
        for number in range(rounds):
            for case in cases:
                for side in sides:
                    value = measure(case, side)
                    self.values.setdefault(case, {}).setdefault(side, []).append(value)
                    print(
                        f"round {number + 1}: {case}, {side}: {value:.4g} {self.unit}", flush=True
                    )

    def ratio(self, case: str) -> float:
        """How many times more the first side needs than the last."""
        medians = [statistics.median(values) for values in self.values[case].values()]
        return medians[0] / medians[-1]

    def finish(self, notes: Mapping[str, object] | None = None) -> int:
        """Print and write the results.

        Args:
            notes: What else belongs into the JSON file and the printed text.

        Returns:
            The exit code: 0 if every wanted ratio has been reached, else 1.
        """
        failed = 0
        for case, sides in self.values.items():
            for side, values in sides.items():
                print(
                    f"{case}, {side}: median {statistics.median(values):.4g} {self.unit}, range "
                    f"{min(values):.4g} to {max(values):.4g}, {len(values)} rounds"
                )
            if len(sides) > 1:
                wanted = self.wanted.get(case)
                failed += wanted is not None and self.ratio(case) < wanted
                first, last = next(iter(sides)), next(reversed(sides))
                print(
                    f"{case}: ratio {self.ratio(case):.2f} ({first} / {last}"
                    + ("" if wanted is None else f"; at least {wanted:g} is wanted")
                    + ")"
                )
        for name, note in (notes or {}).items():
            print(f"{name}: {note}")
        RESULTS.mkdir(parents=True, exist_ok=True)
        result = {
            "title": self.title,
            "unit": self.unit,
            "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
            "values": self.values,
            "ratios": {case: self.ratio(case) for case, s in self.values.items() if len(s) > 1},
            "wanted": dict(self.wanted),
            "notes": dict(notes or {}),
        }
        (RESULTS / f"{self.name}.json").write_text(json.dumps(result, indent=2) + "\n")
        return 1 if failed else 0


OURS = "ours"
# With whom ours is compared in a sentence, where that is not the first side.
_BASELINES = {"dispatch": "bare pluggy", "import_time": "dependencies"}
_EVEN = 0.05


def number(value: float) -> str:
    """Write a number for people: three digits that count, and never an exponent."""
    if not value:
        return "0"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def times_ours(sides: Mapping[str, Sequence[float]], side: str) -> float:
    """Return how many times as long as ours a side takes."""
    return statistics.median(sides[side]) / statistics.median(sides[OURS])


def verdict(name: str, sides: Mapping[str, Sequence[float]]) -> str:
    """Say how ours compares with the side that counts."""
    other = _BASELINES.get(name, next(iter(sides)))
    ratio = times_ours(sides, other)
    if abs(ratio - 1) < _EVEN:
        return f"ours is as fast as {other}"
    if ratio > 1:
        return f"ours is {_factor(ratio)} as fast as {other}"
    return f"ours takes {_factor(1 / ratio)} the time of {other}"


def _factor(ratio: float) -> str:
    digits = 0 if ratio >= 10 else 1
    return f"{ratio:.{digits}f}\N{MULTIPLICATION SIGN}"


def label(name: str, case: str) -> str:
    """Return a case as a sentence names it."""
    if name != "dispatch":
        return case
    return f"{case} callback{'' if case == '1' else 's'}"


_INTRO = """# Benchmarks

Made by `benchmarks/`, each side in turn, in fresh processes, on one shared machine: what counts is
the ratio of the medians in one run, not a figure by itself. In the pictures less is better; a bar
is the median of its rounds, the thin line on it their range. The numbers are in
`docs/benchmarks/*.json`; pictures and page are made of them.

```console
$ make bench
```
"""


def page() -> str:
    """Write the page of all results in Markdown."""
    parts = [_INTRO]
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        lines = [
            f"## {result['title']}\n",
            f"`make bench-{file.stem.replace('_', '-')}`, {result['machine']}.\n",
            f"![{result['title']}](benchmarks/{file.stem}.svg)\n",
            f"| case | side | median, {result['unit']} | range | times as long as ours |",
            "|---|---|---|---|---|",
        ]
        for case, sides in result["values"].items():
            for side, values in sides.items():
                ratio = "" if side == OURS else f"{times_ours(sides, side):.2f}"
                if side == next(iter(sides)) and case in result["wanted"]:
                    ratio += f" (at least {result['wanted'][case]:.2g} is wanted)"
                spread = f"{number(min(values))} to {number(max(values))}"
                median = number(statistics.median(values))
                lines.append(f"| {case} | {side} | {median} | {spread} | {ratio} |")
        lines.append("")
        lines += [
            f"- {label(file.stem, case)}: {verdict(file.stem, sides)}"
            for case, sides in result["values"].items()
        ]
        lines += [f"- {name}: {note}" for name, note in result["notes"].items()]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def arguments(description: str | None, rounds: int = 5) -> argparse.Namespace:
    """Parse what all benchmarks take: ``--rounds``, and the hidden ``--one`` of a fresh process.

    Compile the package first, as pip has compiled all that it is compared with: where
    ``PYTHONDONTWRITEBYTECODE`` is set each process would do that for an editable installation.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.one:
        compileall.compile_dir(PACKAGE, quiet=1)
    return options


def in_fresh_process(case: str, side: str) -> float:
    """Run this benchmark's ``--one CASE SIDE``; it prints the value as JSON in its last line."""
    command = [sys.executable, sys.argv[0], "--one", case, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))
