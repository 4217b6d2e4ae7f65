"""Draw what the documentation shows of a start; sketches, of the same data.

``python scripts/startup_pictures.py METRICS.txt PICTURE.png`` draws the panels of the dashboard of
``startup_metrics`` from a page of Prometheus' text format; it knows the forms of PromQL that are
there. With a ``startup-....json`` of ``startup_timeline`` it draws its bars.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

DASHBOARD = (
    Path(__file__).parent.parent / "rayserve_hooks" / "impls" / "startup_metrics_dashboard.json"
)
_SUM = re.compile(
    r"sum by \((?P<by>[\w, ]+)\) \(max_over_time\((?P<name>\w+)\{(?P<match>[^}]*)\}"
    r"\[\$__range\]\)\)"
)
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')

Labels = tuple[str, ...]


def values(expr: str, page: str) -> dict[Labels, float]:
    """Return what a query of the dashboard gives, by its labels, for one page of metrics."""
    limit = re.fullmatch(r"topk\((\d+), (.*)\)", expr)
    if limit:
        found = sorted(values(limit[2], page).items(), key=lambda item: -item[1])
        return dict(found[: int(limit[1])])
    parts = expr.split(" / ")
    first, *rest = [_sums(part, page) for part in parts]
    for divisor in rest:
        first = {key: value / divisor[key] for key, value in first.items() if divisor.get(key)}
    return first


def legend(template: str, labels: Labels, expr: str) -> str:
    """Return the name of a series, as Grafana makes it."""
    found = _SUM.search(expr)
    assert found is not None, expr
    named = dict(zip(found["by"].split(", "), labels, strict=True))
    return re.sub(r"\{\{(\w+)\}\}", lambda match: named[match[1]], template).strip()


def _sums(expr: str, page: str) -> dict[Labels, float]:
    query = _SUM.fullmatch(expr)
    assert query is not None, expr
    totals: defaultdict[Labels, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == query["name"] and _matches(query["match"], sample.labels):
                key = tuple(sample.labels.get(label, "") for label in query["by"].split(", "))
                totals[key] += sample.value
    return dict(totals)


def _matches(matchers: str, labels: Mapping[str, str]) -> bool:
    for label, sign, wanted in _MATCHER.findall(matchers):
        pattern = ".*" if wanted.startswith("$") else wanted  # a variable, of which all are chosen
        value = labels.get(label, "")
        if not (re.fullmatch(pattern, value) if sign == "=~" else value == wanted):
            return False
    return True


def draw(page: str, picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    figure = plt.figure(figsize=(13, 0.42 * height))
    figure.suptitle(f"{dashboard['title']} (a sketch)", x=0.02, ha="left", fontsize=12)
    for panel in dashboard["panels"]:
        place, (target,) = panel["gridPos"], panel["targets"]
        box = (
            place["x"] / 24 + 0.135 * (place["w"] > 6) + 0.02,
            0.93 * (1 - (place["y"] + place["h"]) / height) + 0.035,
            place["w"] / 24 - 0.135 * (place["w"] > 6) - 0.05,
            0.93 * place["h"] / height - 0.065,
        )
        axes = figure.add_axes(box)
        axes.set_title(panel["title"], fontsize=9, loc="left")
        unit = " s" if panel["fieldConfig"]["defaults"]["unit"] == "s" else ""
        found = values(target["expr"], page)
        names = [legend(target["legendFormat"], key, target["expr"]) for key in found]
        if panel["type"] == "stat" or not found:
            axes.axis("off")
            lines = ["No data"] * (not found)
            lines += [f"{v:.3g}{unit}  {n}" for n, v in zip(names, found.values(), strict=True)]
            axes.text(0.0, 0.5, "\n".join(lines), fontsize=13, va="center")
            continue
        bars = axes.barh(range(len(found)), list(found.values()), color="#3d71d9")
        axes.bar_label(bars, [f"{value:.3g}{unit}" for value in found.values()], fontsize=7)
        axes.set_yticks(range(len(found)), names, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


def draw_timeline(trace: Mapping[str, Any], picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    lanes = {
        e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"
    }
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    longest = max(bar["dur"] for bar in bars) / 1e6
    rows = sorted({(bar["pid"], bar["tid"]) for bar in bars})
    colors = {"phase": "#d8dee4", "call": "#80b3ff", "download": "#8fd19e"}
    figure, axes = plt.subplots(figsize=(13, 0.9 + 0.34 * len(rows)), layout="constrained")
    for bar in bars:
        row, critical = rows.index((bar["pid"], bar["tid"])), bar["args"]["critical_s"] > 0
        start, seconds = bar["ts"] / 1e6, bar["dur"] / 1e6
        axes.barh(
            row,
            seconds,
            left=start,
            color="#cf222e" if "cname" in bar else colors[bar["cat"]],
            edgecolor="#bc4c00" if critical else "none",
            linewidth=1.5,
            height=0.8,
        )
        alone = sum((other["pid"], other["tid"]) == rows[row] for other in bars) == 1
        if seconds < 0.01 * longest and not alone:
            continue  # no room for its name
        detail = bar["args"]["detail"] if bar["cat"] == "download" else ""
        text = " ".join(filter(None, [bar["name"], detail]))
        axes.text(start, row, f" {text}", fontsize=7, va="center", clip_on=True)
    names = [lanes[lane] if row == 1 else "" for lane, row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds; framed in orange is the critical path, red is what failed")
    axes.set_title(f"Start of {trace['otherData']['model']} (a sketch)", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    if source.suffix == ".json":
        draw_timeline(json.loads(source.read_text()), target)
    else:
        draw(source.read_text(), target)
