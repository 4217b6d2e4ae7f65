from __future__ import annotations

import json
from typing import Any

import pytest
import startup_pictures

from rayserve_hooks.impls import compile_cache, startup_metrics

DASHBOARD = json.loads(startup_pictures.DASHBOARD.read_text())
VALUES = {
    "phase": "total",
    "node": "n1",
    "hook": "on_engine_ready",
    "callback": "WarmUp",
    "process": "replica",
    "outcome": "failed",
    "result": "hit",
    "factor": "",
}


def page() -> str:
    """Return a page with two processes' samples of each metric, the second of twice the value."""
    names = {name: labels for name, (_, labels) in startup_metrics.LABELS.items()}
    names[compile_cache.STARTS] = ("result", "factor")
    lines = []
    for name, labels in names.items():
        lines.append(f"# TYPE ray_{name} counter")
        for phase in ("total", "model_loading"):
            for worker, value in (("a", 1.0), ("b", 2.0)):
                given: dict[str, Any] = {
                    "model_id": "tiny",
                    "deployment": "LLM",
                    "WorkerId": worker,
                }
                given |= {label: VALUES[label] for label in labels}
                if "phase" in given:
                    given["phase"] = phase
                elif phase != "total":
                    continue
                written = ",".join(f'{key}="{text}"' for key, text in given.items())
                lines.append(f"ray_{name}{{{written}}} {value}")
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_each_panel_shows_what_is_exported(panel: dict[str, Any]) -> None:
    (target,) = panel["targets"]
    found = startup_pictures.values(target["expr"], page())
    assert found
    # A mean of seconds is 1 here, since both counters are the same; all else is a sum.
    assert set(found.values()) == {1.0 if " / " in target["expr"] else 3.0}
    for labels in found:
        assert "{{" not in startup_pictures.legend(target["legendFormat"], labels, target["expr"])
