"""Draw ``docs/benchmarks/*.json`` as bars, with the range of the rounds, and write their page."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.layout_engine import ConstrainedLayoutEngine
from report import OURS, RESULTS, label, number, page, verdict

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "rayserve_hooks"  # the same data gives the same file
mpl.rcParams["svg.fonttype"] = "none"  # text stays text: it can be searched
mpl.rcParams["font.family"] = ["DejaVu Sans", "sans-serif"]

import matplotlib.pyplot as plt  # noqa: E402 - after the backend is chosen

PAGE = RESULTS.parent / "benchmarks.md"
OUR_COLOUR, OTHERS, INK = "#0072b2", "#b9bfc4", "#333333"
_WIDTH, _BAR, _AROUND = 8.0, 0.3, 0.85  # inches: of the figure, of a bar, above and below a panel


def draw(name: str, result: Mapping[str, Any]) -> Any:
    """Return a figure with a panel for each case, on a scale of its own that starts at zero."""
    cases = result["values"]
    heights = [len(sides) * _BAR + _AROUND for sides in cases.values()]
    figure, panels = plt.subplots(
        len(cases),
        squeeze=False,
        figsize=(_WIDTH, sum(heights) + 0.5),
        height_ratios=heights,
        layout=ConstrainedLayoutEngine(hspace=0.06),
    )
    figure.suptitle(result["title"], fontsize=13, fontweight="bold", x=0.01, ha="left", color=INK)
    for axes, (case, sides) in zip(panels.flat, cases.items(), strict=True):
        _panel(axes, sides, result["unit"])
        says = f"{label(name, case)}: {verdict(name, sides)}"
        axes.set_title(says, loc="left", fontsize=11, color=OUR_COLOUR)
    return figure


def _panel(axes: Any, sides: Mapping[str, Sequence[float]], unit: str) -> None:
    longest = max(max(values) for values in sides.values())
    for place, (side, values) in enumerate(sides.items()):
        median = statistics.median(values)
        colour = OUR_COLOUR if side.startswith(OURS) else OTHERS
        axes.barh(place, median, height=0.72, color=colour, alpha=1 if side == OURS else 0.75)
        axes.hlines(place, min(values), max(values), color=INK, linewidth=1)
        axes.text(
            max(values) + longest * 0.012,
            place,
            f"{number(median)} {unit}",
            va="center",
            fontsize=9.5,
            color=OUR_COLOUR if side == OURS else INK,
            fontweight="bold" if side == OURS else "normal",
        )
    axes.set_yticks(range(len(sides)), list(sides), fontsize=9.5, color=INK)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.set_xlim(0, longest * 1.18)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.spines["left"].set_visible(True)
    axes.spines["left"].set_color(INK)


def main() -> int:
    for file in sorted(RESULTS.glob("*.json")):
        figure = draw(file.stem, json.loads(file.read_text()))
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)
        print(f"drew {file.with_suffix('.svg').name}")
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
