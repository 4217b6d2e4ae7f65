"""Measure how long each phase and each callback of a start took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.impls._startup import LOADING, StartupWatch, this_replica
from rayserve_hooks.trace import TraceEntry

SECONDS = "rayserve_hooks_phase_seconds_total"
RUNS = "rayserve_hooks_phase_runs_total"
CALL_SECONDS = "rayserve_hooks_call_seconds_total"
CALLS = "rayserve_hooks_calls_total"
STARTS = "rayserve_hooks_starts_total"

OTHER = "other"
_MOST_NODES = 64
_REPLICA = ("model_id", "deployment", "replica")
LABELS = {
    SECONDS: ("Seconds that a phase of a start took.", ("phase", "node")),
    RUNS: ("How often a phase of a start has run.", ("phase", "node")),
    CALL_SECONDS: (
        "Seconds that callbacks took in a hook.",
        ("hook", "callback", "process", "node", "outcome"),
    ),
    CALLS: (
        "How often callbacks were called in a hook.",
        ("hook", "callback", "process", "node", "outcome"),
    ),
    STARTS: ("Starts by how they ended.", ("outcome",)),
}


class StartupMetrics(StartupWatch):
    """Export the seconds of each phase and each call as Ray metrics, and the phases as a log line.

    All are counters with the labels ``model_id``, ``deployment`` and ``replica``, which is the
    replica's rank: a number that the next replica takes over, so that labels do not grow with each
    start. ``node`` is Ray's id; of a group of more than 64 nodes the rest is ``other``.

    - ``rayserve_hooks_phase_seconds_total`` and ``rayserve_hooks_phase_runs_total``, by ``phase``
      and ``node`` (empty for phases of the replica).
    - ``rayserve_hooks_call_seconds_total`` and ``rayserve_hooks_calls_total``, by ``hook``,
      ``callback``, ``process`` (its role), ``node`` and ``outcome``.
    - ``rayserve_hooks_starts_total``, by ``outcome``: ``ready`` or ``failed``.

    They are counters because Ray's agent exports nothing else exactly (Ray 2.60). Of a histogram
    it gets the buckets alone and makes a sum of their midpoints
    (``record_histogram_aggregated_batch`` in
    ``ray._private.telemetry.open_telemetry_metric_recorder``). It forgets a gauge that is not set
    again within two report intervals (the same module). Phases, named as in Ray's guide:

    - ``node_initialization``: from the first callback until all nodes are ready and the engine is
      about to be built, all ``on_after_init`` callbacks included.
    - ``model_loading``: the default download, per node; a part of the above.
    - ``engine_initialization``: from there until the engine is up.
    - ``warmup``: the ``on_engine_ready`` callbacks.
    - ``total``: all of it, which is the time to ready.

    List it first: a wrapper that comes first surrounds all other callbacks. It takes no arguments.

    Raises:
        CallbackConfigError: An argument is given.
    """

    @checked_arguments
    def __init__(self) -> None:
        super().__init__()
        self._exported: dict[int, TraceEntry] = {}  # by id, which stays theirs as they are kept

    def report_nodes(self, ctx: CallbackCtx) -> None:
        """Export what has taken time until every node is ready."""
        seconds = self._phases()
        for result in ctx.nodes.values():
            seconds[LOADING, result.node.id] = result.download_s
        self._report(ctx, seconds)
        # Where no engine follows this is the end; what is not exported here is at the end.

    def report_end(self, ctx: CallbackCtx, error: BaseException | None) -> None:
        """Export the rest, and how the start has ended."""
        self._report(ctx, self._phases())
        self._exported.clear()
        export(ctx, STARTS, {("ready" if error is None else "failed",): 1.0})

    def _phases(self) -> dict[tuple[str, ...], float]:
        spans, self.spans = self.spans, {}  # each is exported once
        return {(phase, ""): span.seconds for phase, span in spans.items()}

    def _report(self, ctx: CallbackCtx, seconds: Mapping[tuple[str, ...], float]) -> None:
        ran = {labels: value for labels, value in seconds.items() if value > 0}
        export(ctx, SECONDS, ran)
        export(ctx, RUNS, dict.fromkeys(ran, 1.0))
        calls: dict[tuple[str, ...], list[float]] = {}
        for entry in self._new(ctx):
            labels = (entry.hook, entry.callback, entry.role, entry.node_id, entry.outcome)
            calls.setdefault(labels, []).append(entry.duration_s or 0.0)
        export(ctx, CALL_SECONDS, {labels: sum(each) for labels, each in calls.items()})
        export(ctx, CALLS, {labels: float(len(each)) for labels, each in calls.items()})
        ctx.log.info(
            "start-up of %s: %s",
            ctx.llm_config.model_id,
            ", ".join(
                f"{phase} {value:.3f} s" + (f" (node {node[:8]})" if node else "")
                for (phase, node), value in seconds.items()
            ),
            extra={"seconds": round(sum(v for (_, node), v in seconds.items() if not node), 6)},
        )

    def _new(self, ctx: CallbackCtx) -> Iterator[TraceEntry]:
        """Yield the calls that have ended since the last time."""
        for entry in ctx.trace:
            if entry.outcome != "running" and id(entry) not in self._exported:
                self._exported[id(entry)] = entry
                yield entry


def export(ctx: CallbackCtx, name: str, values: Mapping[tuple[str, ...], float]) -> None:
    """Add to one of the counters, by the labels after those of the replica."""
    from ray.util.metrics import Counter

    description, labels = LABELS[name]
    counter = Counter(name, description, (*_REPLICA, *labels))
    replica = this_replica()
    first = (ctx.llm_config.model_id, replica.deployment, replica.rank)
    known = {ctx.node.id: None, **dict.fromkeys(ctx.nodes)}
    nodes = {"", *list(known)[:_MOST_NODES]}
    for each, value in values.items():
        tags = dict(zip((*_REPLICA, *labels), (*first, *each), strict=True))
        if tags.get("node", "") not in nodes:
            tags["node"] = OTHER
        counter.inc(value, tags)
