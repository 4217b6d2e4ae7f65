"""Draw a start: one page that needs no network, and the same for Perfetto."""

from __future__ import annotations

import contextlib
import datetime as dt
import html
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.masking import redact
from rayserve_hooks.impls._startup import LOADING, TOTAL, Replica, StartupWatch, this_replica

PHASES = "phases"
FAILED = ("failed", "timed out", "warned", "interrupted")
_EPSILON_S = 1e-6


def _absolute(folder: str) -> str:
    if not folder.startswith(("/", "~/")):
        raise ValueError("give an absolute path, or one that starts with '~/'")
    return folder


class StartupTimeline(StartupWatch):
    """Write a page of each start: a lane for each process, a bar for each call and phase.

    Downloads have their bytes and rate; what the start had to wait for is marked as its critical
    path, what failed is red. Beside ``startup-....html`` is ``startup-....json`` in Chrome's trace
    format, which https://ui.perfetto.dev opens. The replica's log says where they are. A start that
    fails has its page, too. What cannot be written is a warning.

    List it first: it surrounds the other callbacks.

    Args:
        folder: Where to write, on the replica's node; made if there is none. Required.
        keep: How many starts to keep in the folder; older ones are removed. Default: 100.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        folder: Annotated[str, AfterValidator(_absolute)],
        keep: Annotated[int, Field(gt=0)] = 100,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.keep = keep

    def report_nodes(self, ctx: CallbackCtx) -> None:
        """Write the timeline here where no engine follows."""
        if ctx.process.role == "driver":  # outside of Serve no engine follows
            self.report_end(ctx, None)

    def report_end(self, ctx: CallbackCtx, error: BaseException | None) -> None:
        """Write the timeline of a start that has ended."""
        timeline = self.timeline(ctx, error)
        try:
            page = self._write(timeline)
        except OSError as failure:
            ctx.log.warning(
                "no timeline of this start was written: %s; give a folder that the replica can "
                "write",
                failure,
            )
            return
        ctx.log.info("timeline of this start: file://%s", page)

    def timeline(self, ctx: CallbackCtx, error: BaseException | None = None) -> Timeline:
        """Return what is drawn."""
        text = "" if error is None else redact(str(error), ctx.runtime_env, ctx.extra_init_kwargs)
        bars = [*self._phases(error), *_calls(ctx, done=error is None), *_downloads(ctx)]
        return Timeline(str(ctx.llm_config.model_id), this_replica(), bars, text)

    def _phases(self, error: BaseException | None) -> Iterator[Bar]:
        last = max((span.start for span in self.spans.values()), default=0.0)
        for name, span in self.spans.items():
            failed = error is not None and (name == TOTAL or span.start == last)
            outcome = "failed" if failed else "returned"
            yield Bar(PHASES, name, "phase", span.start, span.seconds, outcome)

    def _write(self, timeline: Timeline) -> Path:
        folder = Path(self.folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        who = timeline.replica
        now = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%f")
        parts = (timeline.model_id, who.deployment, who.id.rpartition("#")[2] or str(os.getpid()))
        name = "-".join(re.sub(r"[^\w.]+", "-", part)[:60] for part in parts if part)
        page = folder / f"startup-{now}-{name}.html"
        _publish(page.with_suffix(".json"), json.dumps(timeline.chrome_trace()))
        _publish(page, timeline.page())
        for old in sorted(folder.glob("startup-*.html"))[: -self.keep]:
            for path in (old, old.with_suffix(".json")):
                with contextlib.suppress(OSError):
                    path.unlink()
        return page


@dataclass
class Bar:
    """Something that took time.

    Attributes:
        lane: The process it ran in, or `PHASES`.
        name: Of the phase, the callback and hook, or the download.
        kind: ``"phase"``, ``"call"`` or ``"download"``.
        start: In seconds since the epoch, by the clock of its node.
        seconds: How long it took.
        outcome: As in a trace entry.
        detail: What else is known.
        critical_s: How long the start had to wait for it.
    """

    lane: str
    name: str
    kind: str
    start: float
    seconds: float
    outcome: str = "returned"
    detail: str = ""
    critical_s: float = field(default=0.0, compare=False)

    @property
    def end(self) -> float:
        """When it ended."""
        return self.start + self.seconds

    @property
    def failed(self) -> bool:
        """Whether it ended badly."""
        return self.outcome in FAILED


class Timeline:
    """A start that can be drawn.

    Args:
        model_id: Of the deployment.
        replica: That started.
        bars: All that took time, in any order.
        error: What ended the start, without secrets; empty if it went well.

    Attributes:
        critical_path: The bars that the start had to wait for, in order.
    """

    def __init__(
        self, model_id: str, replica: Replica, bars: Sequence[Bar], error: str = ""
    ) -> None:
        self.model_id, self.replica, self.error = model_id, replica, error
        self.bars = sorted(bars, key=lambda bar: (bar.start, -bar.seconds))
        self.start = min((bar.start for bar in bars), default=0.0)
        self.end = max((bar.end for bar in bars), default=0.0)
        self.critical_path = self._mark_critical_path()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start

    def lanes(self) -> dict[str, list[list[Bar]]]:
        """Return the bars by lane, in rows in which none overlaps; the phases come first."""
        lanes: dict[str, list[list[Bar]]] = {PHASES: []}
        for bar in self.bars:
            rows = lanes.setdefault(bar.lane, [])
            for row in rows:
                if row[-1].end <= bar.start + _EPSILON_S:
                    row.append(bar)
                    break
            else:
                rows.append([bar])
        return {lane: rows for lane, rows in lanes.items() if rows}

    def _mark_critical_path(self) -> list[Bar]:
        """Walk back from the end, each time to what ended last, and there to what is innermost."""
        bars = [bar for bar in self.bars if bar.name != TOTAL and bar.seconds > 0]
        path: list[Bar] = []
        now = max((bar.end for bar in bars), default=0.0)
        for _ in range(4 * len(bars)):
            before = [bar for bar in bars if bar.start < now - _EPSILON_S]
            if not before:
                break
            bar = max(before, key=lambda bar: (min(bar.end, now), bar.start, -bar.seconds))
            top = min(bar.end, now)
            # Where something within it, or beside it on another lane, ended: the rest is its own.
            inner = [
                other.end
                for other in before
                if other is not bar
                and other.start >= bar.start - _EPSILON_S
                and bar.start < other.end < top - _EPSILON_S
                and (bar.kind == "phase" or other.lane == bar.lane)
            ]
            now = max(inner, default=bar.start)
            bar.critical_s += top - now
            if bar not in path:
                path.append(bar)
        return sorted(path, key=lambda bar: bar.start)

    def chrome_trace(self) -> dict[str, Any]:
        """Return the start in Chrome's trace format, which Perfetto opens."""
        events: list[dict[str, Any]] = []
        for number, (lane, rows) in enumerate(self.lanes().items(), start=1):
            name = {"name": "process_name", "ph": "M", "pid": number, "args": {"name": lane}}
            order = {"name": "process_sort_index", "ph": "M", "pid": number}
            events += [name, {**order, "args": {"sort_index": number}}]
            for row_number, row in enumerate(rows, start=1):
                events += [
                    {
                        "name": bar.name,
                        "cat": bar.kind,
                        "ph": "X",
                        "ts": round(1e6 * (bar.start - self.start)),
                        "dur": round(1e6 * bar.seconds),
                        "pid": number,
                        "tid": row_number,
                        "args": {
                            "outcome": bar.outcome,
                            "detail": bar.detail,
                            "critical_s": round(bar.critical_s, 6),
                        },
                        **({"cname": "terrible"} if bar.failed else {}),
                    }
                    for bar in row
                ]
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self._about()}

    def page(self) -> str:
        """Return the start as HTML, which loads nothing and runs nothing."""
        about = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            for name, value in self._about().items()
            if value
        )
        lanes = "".join(self._drawn_lane(lane, rows) for lane, rows in self.lanes().items())
        steps = "".join(
            f"<tr{_classes(bar)}><td>{html.escape(bar.name)}</td><td>{html.escape(bar.lane)}</td>"
            f"<td>{bar.critical_s:.3f}</td><td>{100 * bar.critical_s / (self.seconds or 1):.0f} %"
            "</td></tr>"
            for bar in self.critical_path
        )
        rows = "".join(
            f"<tr{_classes(bar)}><td>{bar.start - self.start:.3f}</td><td>{bar.seconds:.3f}</td>"
            f"<td>{html.escape(bar.name)}</td><td>{html.escape(bar.lane)}</td>"
            f"<td>{html.escape(bar.outcome)}</td><td>{html.escape(bar.detail)}</td></tr>"
            for bar in self.bars
        )
        ticks = "".join(
            f'<span style="left:{100 * tick / self.seconds:.3f}%">{tick:g} s</span>'
            for tick in _ticks(self.seconds)
        )
        return _PAGE.format(
            title=html.escape(f"Start of {self.model_id}"),
            style=_STYLE,
            about=about,
            ticks=ticks,
            lanes=lanes,
            steps=steps,
            rows=rows,
        )

    def _drawn_lane(self, lane: str, rows: list[list[Bar]]) -> str:
        drawn = "".join(f'<div class="row">{self._drawn_row(row)}</div>' for row in rows)
        return (
            f'<div class="lane"><div class="who">{html.escape(lane)}</div><div>{drawn}</div></div>'
        )

    def _drawn_row(self, row: list[Bar]) -> str:
        return "".join(map(self._drawn, row))

    def _drawn(self, bar: Bar) -> str:
        scale = 100 / (self.seconds or 1)
        left, width = scale * (bar.start - self.start), scale * bar.seconds
        more = f"; {bar.detail}" if bar.detail else ""
        title = html.escape(f"{bar.name}: {bar.seconds:.3f} s, {bar.outcome}{more}")
        return (
            f'<div{_classes(bar, "bar")} style="left:{left:.3f}%;width:{width:.3f}%" '
            f'title="{title}">{html.escape(bar.name)}</div>'
        )

    def _about(self) -> dict[str, str]:
        when = dt.datetime.fromtimestamp(self.start, dt.UTC).isoformat(timespec="milliseconds")
        return {
            "model": self.model_id,
            "application": self.replica.app,
            "deployment": self.replica.deployment,
            "replica": self.replica.id,
            "started": when,
            "took": f"{self.seconds:.3f} s",
            "outcome": "failed" if self.error else "ready",
            "error": self.error,
        }


def _lane(process: str, node_id: str, pid: int) -> str:
    return f"{process}, node {node_id[:8]}, pid {pid}"


def _calls(ctx: CallbackCtx, *, done: bool) -> Iterator[Bar]:
    for entry in ctx.trace:
        if entry.outcome == "skipped" or (done and entry.outcome == "running"):
            continue  # what still runs is what draws this
        background = f"/{entry.background}" if entry.background else ""
        name = f"{entry.callback}{background} {entry.hook}"
        details = [entry.reason, *map(str, entry.changes)]
        seconds = entry.running_s if entry.duration_s is None else entry.duration_s
        lane = _lane(entry.process, entry.node_id, entry.pid)
        detail = "; ".join(filter(None, details))
        yield Bar(lane, name, "call", entry.start, seconds, entry.outcome, detail)


def _downloads(ctx: CallbackCtx) -> Iterator[Bar]:
    """Yield each node's download, in the lane of the process that made it."""
    for node_id, result in ctx.nodes.items():
        if not result.download_start:
            continue
        process = ctx.process.role if result.node.is_local else "node"
        pids = [e.pid for e in ctx.trace if (e.node_id, e.process) == (node_id, process)]
        lane = _lane(process, node_id, pids[0] if pids else 0)
        rate = result.download_bytes / 1e6 / (result.download_s or 1)
        amount = f"{result.download_bytes:,} bytes, {rate:,.1f} MB/s"
        yield Bar(
            lane, LOADING, "download", result.download_start, result.download_s, detail=amount
        )


def _ticks(seconds: float) -> Iterator[float]:
    step = next(
        s for s in (1e-3, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1e9) if seconds <= 12 * s
    )
    tick = 0.0
    while tick <= seconds and seconds:
        yield round(tick, 6)
        tick += step


def _classes(bar: Bar, *more: str) -> str:
    names = [*more, bar.kind]
    names += ["failed"] if bar.failed else []
    names += ["critical"] if bar.critical_s > 0 else []
    return f' class="{" ".join(names)}"'


def _publish(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #1b1f24; background: #fff; }
h1 { font-size: 20px; } h2 { font-size: 16px; margin-top: 28px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: #57606a; } dd { margin: 0; white-space: pre-wrap; }
.axis, .lane { display: grid; grid-template-columns: 260px 1fr; }
.axis div { position: relative; height: 18px; border-bottom: 1px solid #d0d7de; }
.axis span { position: absolute; color: #57606a; font-size: 12px; }
.lane { border-bottom: 1px solid #eaeef2; padding: 3px 0; }
.who { color: #57606a; padding-right: 8px; overflow-wrap: anywhere; }
.row { position: relative; height: 20px; margin-bottom: 2px; }
.bar { position: absolute; height: 18px; min-width: 2px; overflow: hidden; white-space: nowrap;
  box-sizing: border-box; border-radius: 2px; padding-left: 3px; font-size: 12px; color: #0a3069; }
.phase.bar { background: #d8dee4; } .call.bar { background: #80b3ff; }
.download.bar { background: #8fd19e; }
.failed.bar { background: #cf222e; color: #fff; } tr.failed { color: #cf222e; }
.critical.bar { border: 2px solid #bc4c00; padding-left: 1px; } tr.critical { font-weight: 600; }
.key .bar { position: static; display: inline-block; padding: 0 8px; margin-right: 8px; }
table { border-collapse: collapse; } th { text-align: left; }
td, th { border-bottom: 1px solid #eaeef2; padding: 2px 12px 2px 0; vertical-align: top; }
td { overflow-wrap: anywhere; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><dl>{about}</dl>
<p class="key"><span class="phase bar">phase</span><span class="call bar">call of a callback</span>
<span class="download bar">download</span><span class="failed bar">failed</span>
<span class="critical bar">on the critical path</span></p>
<div class="axis"><span></span><div>{ticks}</div></div>
{lanes}
<h2>Critical path</h2>
<table id="critical"><tr><th>what</th><th>process</th><th>seconds</th><th>share</th></tr>{steps}
</table>
<h2>All of it</h2>
<table id="all"><tr><th>began, s</th><th>took, s</th><th>what</th><th>process</th><th>outcome</th>
<th>detail</th></tr>{rows}</table>
<p>Each process is timed by the clock of its node.</p>
</body></html>
"""
