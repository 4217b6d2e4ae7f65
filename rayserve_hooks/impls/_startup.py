"""Which replica this is, and when its start's phases ran: for callbacks that report on a start."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.hookspecs import hookimpl

# As Ray's guide on the initialization of deployments names the parts of a start.
NODES = "node_initialization"
LOADING = "model_loading"
ENGINE = "engine_initialization"
WARMUP = "warmup"
TOTAL = "total"


@dataclass(frozen=True)
class Replica:
    """A replica as Serve names it; outside of Serve all is empty.

    Attributes:
        app: The application's name.
        deployment: The deployment's name, which tells prefill from decode.
        id: Serve's id, a new one for each start.
        rank: The replica's number in its deployment, which the one that replaces it takes over.
    """

    app: str = ""
    deployment: str = ""
    id: str = ""
    rank: str = ""


def this_replica() -> Replica:
    """Return which replica runs this code."""
    if "ray.serve" not in sys.modules:  # which every replica has imported
        return Replica()
    from ray import serve

    try:
        context = serve.get_replica_context()
    except Exception:  # Ray's own, of a module of its own: outside of a replica
        return Replica()
    rank: Any = context.rank
    number = getattr(rank, "rank", rank)
    return Replica(context.app_name, context.deployment, context.replica_tag, str(number))


@dataclass(frozen=True)
class Span:
    """When a phase began, in seconds since the epoch, and how long it took."""

    start: float
    seconds: float


class StartupWatch:
    """Times the phases of a start; a subclass reports.

    ``report_nodes`` is called when the nodes are ready, ``report_end`` once the start has ended:
    with None when the replica is ready, else with the error. Listed first, it surrounds the other
    callbacks.
    """

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self._begun: dict[str, tuple[float, float]] = {}

    @hookimpl(wrapper=True, tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        self.spans.clear()
        self._begin(TOTAL, NODES)
        return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def on_after_init(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        result = yield
        self._end(NODES)
        self._begin(ENGINE)
        self.report_nodes(ctx)
        return result

    @hookimpl(wrapper=True, tryfirst=True)
    def on_engine_ready(self, ctx: CallbackCtx) -> Generator[None, Any, Any]:
        self._end(ENGINE)
        self._begin(WARMUP)
        result = yield
        self._end(WARMUP, TOTAL)
        self.report_end(ctx, None)
        return result

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        if ctx.process.role != "node":
            self._end(*self._begun)
            self.report_end(ctx, error)

    def report_nodes(self, ctx: CallbackCtx) -> None:
        """Called when the nodes are ready."""

    def report_end(self, ctx: CallbackCtx, error: BaseException | None) -> None:
        """Called when the start has ended."""

    def _begin(self, *phases: str) -> None:
        for phase in phases:
            self._begun[phase] = time.time(), time.perf_counter()

    def _end(self, *phases: str) -> None:
        for phase in phases:
            if phase in self._begun:
                start, counter = self._begun.pop(phase)
                self.spans[phase] = Span(start, time.perf_counter() - counter)
