"""Draw ``docs/benchmarks/*.json`` as bars, with the range of the rounds, and write their page."""

from __future__ import annotations

import json
import statistics
import sys

import matplotlib as mpl
from report import RESULTS, page

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "rayserve_hooks"  # the same data gives the same file

import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

PAGE = RESULTS.parent / "benchmarks.md"


def main() -> int:
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        cases = list(result["values"])
        sides = list(dict.fromkeys(side for case in cases for side in result["values"][case]))
        figure, axes = plt.subplots(figsize=(1.5 + 1.7 * len(cases), 3.6), layout="constrained")
        width = 0.8 / len(sides)
        for number, side in enumerate(sides):
            places = [i for i, case in enumerate(cases) if side in result["values"][case]]
            values = [result["values"][cases[i]][side] for i in places]
            medians = [statistics.median(v) for v in values]
            axes.bar(
                [place + (number - (len(sides) - 1) / 2) * width for place in places],
                medians,
                width,
                label=side,
                yerr=[
                    [m - min(v) for m, v in zip(medians, values, strict=True)],
                    [max(v) - m for m, v in zip(medians, values, strict=True)],
                ],
                capsize=3,
            )
        axes.set_xticks(range(len(cases)), cases)
        axes.set_yscale("log")
        axes.set_ylabel(f"{result['unit']} (log scale, less is better)")
        axes.set_title(result["title"], fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)
        print(f"drew {file.with_suffix('.svg').name}")
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
