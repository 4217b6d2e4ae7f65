"""Measure how long each phase of the node initialization took."""

import time
from collections.abc import Generator
from typing import Any

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.hookspecs import hookimpl

METRIC = "rayserve_hooks_phase_seconds"
_BOUNDARIES_S = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


class StartupMetrics:
    """Export the seconds of each phase as a Ray metric, and as one log line.

    The metric is the histogram ``rayserve_hooks_phase_seconds`` with the tags ``model_id``,
    ``phase`` and ``node`` (empty for phases of the replica). Ray's metrics agent serves it to
    Prometheus with the prefix ``ray_``. It is no gauge because Ray drops a gauge that is set
    once: its agent forgets a value that is not reported again within two report intervals
    (``ray._private.telemetry.open_telemetry_metric_recorder``, Ray 2.60). Phases:

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
    from ray.util.metrics import Histogram

    histogram = Histogram(
        METRIC,
        description="Seconds that a phase of the node initialization took.",
        boundaries=_BOUNDARIES_S,
        tag_keys=("model_id", "phase", "node"),
    )
    for (phase, node), value in seconds.items():
        histogram.observe(value, tags={"model_id": model_id, "phase": phase, "node": node})
