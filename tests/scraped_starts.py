"""Initialize twice on a Ray of its own; print what was timed and what its endpoint then serves.

A program, because ``RAY_enable_open_telemetry`` counts for all processes of a cluster.
"""

from __future__ import annotations

import asyncio
import json
import logging

import processes
import ray
import requests
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

import rayserve_hooks
from rayserve_hooks import get_plugin_manager
from rayserve_hooks.context import LOGGER_NAME, CallbackCtx, Handled
from rayserve_hooks.impls import startup_metrics


class Prepare:
    async def on_before_init(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0.003)

    async def on_before_download(self, ctx: CallbackCtx) -> Handled:
        await asyncio.sleep(0.2)
        return Handled(reason="nothing to fetch")


def initialize() -> dict[str, float]:
    """Return the seconds of each of the hooks, as the trace has them.

    The engine is left out, which has nothing to do with how a metric gets to Prometheus.
    """
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["startup_metrics", Prepare],
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    manager = get_plugin_manager(config)
    ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    manager.hook.on_engine_ready(ctx=ctx)
    return {e.hook: e.duration_s or 0.0 for e in ctx.trace if e.callback == "Prepare"}


def scraped(url: str) -> list[dict[str, object]]:
    """Return the samples of our metrics as soon as the second start is among them."""

    def both() -> list[dict[str, object]]:
        samples = [
            {"type": family.type, "name": sample.name, "value": sample.value, **sample.labels}
            for family in text_string_to_metric_families(requests.get(url, timeout=10).text)
            for sample in family.samples
            if "rayserve_hooks" in sample.name
        ]
        starts = {s["value"] for s in samples if s["name"] == f"ray_{startup_metrics.STARTS}"}
        return samples if starts == {2.0} else []

    return until(both)  # Ray's agent collects in intervals and offers nothing to wait on


def main() -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"{LOGGER_NAME}.startup_metrics")
    logger.addHandler(handler)
    port = processes.free_port()
    with processes.none_left():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _metrics_export_port=port,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        try:
            traced = [initialize(), initialize()]
            samples = scraped(f"http://127.0.0.1:{port}/metrics")
            node = ray.get_runtime_context().get_node_id()
        finally:
            ray.shutdown()
    print(json.dumps({"traced": traced, "log": lines, "samples": samples, "node": node}))


if __name__ == "__main__":
    main()
