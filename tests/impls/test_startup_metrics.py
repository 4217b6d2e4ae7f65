from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rayserve_hooks
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls import startup_metrics
from rayserve_hooks.impls.startup_metrics import StartupMetrics


@pytest.mark.ray
def test_the_log_line_has_every_phase(ray_cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["startup_metrics"],
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    asyncio.run(rayserve_hooks.initialize_node(config))
    seconds = r"\d+\.\d{3} s"
    node = rf"\(node {ray_cluster.head_id[:8]}\)"
    assert re.search(
        rf"start-up of tiny: before_init {seconds}, nodes {seconds}, after_init {seconds}, "
        rf"total {seconds}, before_download {seconds} {node}, download {seconds} {node}$",
        caplog.text,
        re.MULTILINE,
    )


# The two ways in which Ray 2.60 brings a metric to its agent: OpenTelemetry, and OpenCensus before.
@pytest.mark.ray
@pytest.mark.parametrize("open_telemetry", ["1", "0"])
def test_prometheus_scrapes_the_true_seconds(open_telemetry: str) -> None:
    script = Path(__file__).parent.parent / "scraped_starts.py"
    environment = {**os.environ, "RAY_enable_open_telemetry": open_telemetry}
    done = subprocess.run(
        [sys.executable, script], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    true: collections.defaultdict[str, float] = collections.defaultdict(float)
    for line in out["log"]:
        for phase, seconds in re.findall(r"(\w+) (\d+\.\d{3}) s", line):
            true[phase] += float(seconds)
    scraped: dict[str, dict[str, float]] = {startup_metrics.SECONDS: {}, startup_metrics.RUNS: {}}
    for sample in out["samples"]:
        assert sample["type"] == "counter"
        assert sample["model_id"] == "tiny"
        assert sample["node"] == (out["node"] if sample["phase"] == "before_download" else "")
        scraped[sample["name"].removeprefix("ray_")][sample["phase"]] = sample["value"]
    seconds = scraped[startup_metrics.SECONDS]
    assert true.pop("download") == 0.0  # it has not run
    assert seconds == pytest.approx(true, abs=0.0011)  # two starts, each rounded in the log
    assert seconds["before_init"] >= sum(start["on_before_init"] for start in out["traced"])
    assert seconds["before_download"] >= sum(start["on_before_download"] for start in out["traced"])
    assert scraped[startup_metrics.RUNS] == dict.fromkeys(seconds, 2.0)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"buckets": [1]}, " has unknown argument 'buckets'; drop it"),
        ((), {"kwargs": {}, "name": "m"}, " has unknown argument 'name'; drop it"),
    ],
)
def test_it_takes_no_arguments(args: Any, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"StartupMetrics{text}$"):
        StartupMetrics(*args, **kwargs)
