"""Measure how long each phase of the node initialization took."""

import time
from collections.abc import Generator
from typing import Any

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.hookspecs import hookimpl

SECONDS = "rayserve_hooks_phase_seconds_total"
RUNS = "rayserve_hooks_phase_runs_total"


class StartupMetrics:
    """Export the seconds of each phase as Ray metrics, and as one log line.

    Two counters with the tags ``model_id``, ``phase`` and ``node`` (empty for phases of the
    replica): ``rayserve_hooks_phase_seconds_total``, and ``rayserve_hooks_phase_runs_total``,
    which is how often the phase has run; their quotient is the mean. Ray's metrics agent serves
    both to Prometheus, with the prefix ``ray_``. A phase that took no time has not run, and is
    not counted. A start has at most four series of each, and two more per node of its group.

    They are counters because Ray's agent exports nothing else exactly (Ray 2.60). Of a histogram
    it gets the buckets alone and makes a sum of their midpoints
    (``record_histogram_aggregated_batch`` in
    ``ray._private.telemetry.open_telemetry_metric_recorder``). It forgets a gauge that is not set
    again within two report intervals (the same module). Phases:

    - ``before_init``: the ``on_before_init`` callbacks.
    - ``nodes``: from there until every node is ready, the placement group's wait included.
    - ``before_download``: the ``on_before_download`` callbacks, per node.
    - ``download``: the default download, per node.
    - ``after_init``: the ``on_after_init`` callbacks.
    - ``total``: all of it.

    List it first: a wrapper that comes first surrounds all other callbacks. It takes no arguments.

    Raises:
        CallbackConfigError: An argument is given.
    """

    @checked_arguments
    def __init__(self) -> None:
        self._started = 0.0
        self._prepared = 0.0

    @hookimpl(wrapper=True, tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        self._started = time.perf_counter()
        try:
            return (yield)
        finally:
            self._prepared = time.perf_counter()

    @hookimpl(wrapper=True, tryfirst=True)
    def on_after_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        nodes_ready = time.perf_counter()
        result = yield
        ended = time.perf_counter()
        seconds = {
            ("before_init", ""): self._prepared - self._started,
            ("nodes", ""): nodes_ready - self._prepared,
            ("after_init", ""): ended - nodes_ready,
            ("total", ""): ended - self._started,
        }
        for node_result in ctx.nodes.values():
            seconds["before_download", node_result.node.id] = node_result.hook_s
            seconds["download", node_result.node.id] = node_result.download_s
        _export(ctx.llm_config.model_id, seconds)
        ctx.log.info(
            "start-up of %s: %s",
            ctx.llm_config.model_id,
            ", ".join(
                f"{phase} {value:.3f} s" + (f" (node {node[:8]})" if node else "")
                for (phase, node), value in seconds.items()
            ),
            extra={"seconds": round(seconds["total", ""], 6)},
        )
        return result


def _export(model_id: str, seconds: dict[tuple[str, str], float]) -> None:
    from ray.util.metrics import Counter

    keys = ("model_id", "phase", "node")
    total = Counter(SECONDS, "Seconds that a phase of the node initialization took.", keys)
    runs = Counter(RUNS, "How often a phase of the node initialization has run.", keys)
    for (phase, node), value in seconds.items():
        if value > 0:
            tags = {"model_id": model_id, "phase": phase, "node": node}
            total.inc(value, tags)
            runs.inc(tags=tags)
