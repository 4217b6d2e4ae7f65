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
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from plugins_for_tests import make_manager

import rayserve_hooks
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeResult, ProcessInfo
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls import startup_metrics
from rayserve_hooks.impls._startup import Replica
from rayserve_hooks.impls.startup_metrics import StartupMetrics
from rayserve_hooks.testing import ModelConfig, RunStack


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
        rf"start-up of tiny: node_initialization {seconds}, model_loading {seconds} {node}$",
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
    scraped: dict[str, dict[tuple[str, ...], float]] = {}
    for sample in out["samples"]:
        assert sample["type"] == "counter"
        assert (sample["model_id"], sample["deployment"], sample["replica"]) == ("tiny", "", "")
        name = sample["name"].removeprefix("ray_")
        labels = tuple(sample[label] for label in startup_metrics.LABELS[name][1])
        scraped.setdefault(name, {})[labels] = sample["value"]
    assert true.pop("model_loading") == 0.0  # it has not run
    seconds = {phase: value for (phase, _), value in scraped[startup_metrics.SECONDS].items()}
    assert seconds == pytest.approx(true, abs=0.0011)  # two starts, each rounded in the log
    assert set(seconds) == {"node_initialization", "engine_initialization", "warmup", "total"}
    assert seconds["total"] == pytest.approx(sum(true.values()) - true["total"], abs=0.1)
    assert set(scraped[startup_metrics.RUNS].values()) == {2.0}
    assert scraped[startup_metrics.STARTS] == {("ready",): 2.0}
    calls = scraped[startup_metrics.CALL_SECONDS]
    for hook, outcome in (("on_before_init", "returned"), ("on_before_download", "handled")):
        labels = (hook, "Prepare", "driver", out["node"], outcome)
        assert calls[labels] == pytest.approx(sum(start[hook] for start in out["traced"]))
        assert scraped[startup_metrics.CALLS][labels] == 2.0


class Exported:
    """Stands in for Ray's counters, of which it keeps the values."""

    values: ClassVar[dict[tuple[str, ...], float]] = collections.defaultdict(float)

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        assert name.endswith("_total")
        assert description.endswith(".")

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.values[self.name, *tags.values()] += value


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    monkeypatch.setattr(Exported, "values", collections.defaultdict(float))
    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Counter=Exported))
    return Exported.values


class Works:
    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        pass


class Fails:
    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        raise ValueError("no answer")


@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    """Return a config whose model takes a download."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ModelConfig(model_source=tmp_path / "model")


def context(nodes: int = 1) -> CallbackCtx:
    config: Any = ModelConfig()
    infos = [NodeInfo(f"n{number}", "10.0.0.1", is_local=not number) for number in range(nodes)]
    results = {info.id: NodeResult(info, None, {}, None, 0.0, 1.0) for info in infos}
    return CallbackCtx(
        llm_config=config, node=infos[0], process=ProcessInfo("replica"), nodes=results
    )


REPLICA = ("tiny", "", "")


def test_a_start_that_fails_is_counted_with_its_call(
    run_stack: RunStack, model: ModelConfig, exported: dict[tuple[str, ...], float]
) -> None:
    outcome = run_stack([StartupMetrics, Fails], model)
    assert outcome.assert_failed(callback="Fails").cleanup_errors == []
    assert exported[startup_metrics.STARTS, *REPLICA, "failed"] == 1.0
    failed = ("on_engine_ready", "Fails", "replica", "node-1", "failed")
    assert exported[startup_metrics.CALLS, *REPLICA, *failed] == 1.0
    assert exported[startup_metrics.RUNS, *REPLICA, "total", ""] == 1.0
    loading = exported[startup_metrics.SECONDS, *REPLICA, "model_loading", "node-1"]
    assert loading == outcome.nodes["node-1"].download_s > 0
    counted = {labels: value for labels, value in exported.items() if "_seconds" not in labels[0]}
    assert set(counted.values()) == {1.0}  # nothing is counted twice


def test_each_of_many_starts_in_one_process_is_counted_whole(
    exported: dict[tuple[str, ...], float],
) -> None:
    manager = make_manager(StartupMetrics, Works)  # one instance; each simulated start has its own
    for _ in range(20):  # of each the context is gone, and others may have the ids of its calls
        ctx = context()
        for hook in ("on_before_init", "on_after_init", "on_engine_ready"):
            getattr(manager.hook, hook)(ctx=ctx)
    assert exported[startup_metrics.STARTS, *REPLICA, "ready"] == 20.0
    works = ("on_engine_ready", "Works", "replica", "n0", "returned")
    assert exported[startup_metrics.CALLS, *REPLICA, *works] == 20.0


def test_prefill_and_decode_are_kept_apart_by_deployment(
    run_stack: RunStack,
    exported: dict[tuple[str, ...], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["prefill", "decode"]
    for name in names:
        replica = Replica("app", name, f"app#{name}#x7", "1")
        monkeypatch.setattr(startup_metrics, "this_replica", lambda found=replica: found)
        run_stack(StartupMetrics).assert_succeeded()
    starts = [labels[1:] for labels in exported if labels[0] == startup_metrics.STARTS]
    assert starts == [("tiny", name, "1", "ready") for name in names]


def test_the_labels_of_a_large_group_are_bounded(exported: dict[tuple[str, ...], float]) -> None:
    StartupMetrics().report_nodes(context(nodes=100))  # which take seconds to simulate
    nodes = [labels[-1] for labels in exported if labels[0] == startup_metrics.SECONDS]
    assert len(nodes) == 65
    assert exported[startup_metrics.SECONDS, *REPLICA, "model_loading", "other"] == 36.0


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
