from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import refused

from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeResult
from rayserve_hooks.impls._startup import Replica
from rayserve_hooks.impls.startup_timeline import PHASES, Bar, StartupTimeline, Timeline
from rayserve_hooks.testing import ModelConfig, Outcome, RunStack
from rayserve_hooks.trace import TraceEntry

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Works:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["api_key"] = "hunter2hunter2"

    def on_before_download(self, ctx: CallbackCtx) -> None:
        pass

    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        pass


class Fails:
    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        raise ValueError("no <answer>")


@pytest.fixture
def start(run_stack: RunStack, tmp_path: Path) -> Callable[..., Outcome]:
    """Return what starts a model on two nodes, each of which downloads it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"w" * 5_000)
    config = ModelConfig("org/tiny <b>", model_source=model)

    def run(folder: Path, *callbacks: object, **arguments: Any) -> Outcome:
        timeline = {"callback": StartupTimeline, "kwargs": {"folder": str(folder), **arguments}}
        return run_stack([timeline, *callbacks], config, nodes=2)

    return run


class Page(html.parser.HTMLParser):
    """The elements of a page, checked to be closed in order; what loads something is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bars: list[tuple[set[str], str]] = []
        self.tables: dict[str, int] = {}
        self._open: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onclick"} & found.keys()
        classes = set((found.get("class") or "").split())
        if "bar" in classes and "title" in found:
            self.bars.append((classes - {"bar"}, found["title"]))
        if tag == "table":
            self._table = found["id"]
            self.tables[self._table] = -1  # its header
        if tag == "tr":
            self.tables[self._table] += 1
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def written(folder: Path) -> tuple[str, dict[str, Any]]:
    (page,) = folder.glob("startup-*.html")
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())


def test_a_start_is_one_page_without_network_and_a_trace_for_perfetto(
    start: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = start(tmp_path, Works).assert_succeeded()
    text, trace = written(tmp_path)
    (line,) = outcome.logged("StartupTimeline")
    assert line.startswith("INFO: timeline of this start: file://")
    assert Path(line.partition("file://")[2]).read_text() == text
    page = Page(text)
    titles = [title for _, title in page.bars]
    assert "default-src 'none'" in text
    assert any(re.match(r"Works on_engine_ready: \d+\.\d{3} s, returned", t) for t in titles)
    downloads = sorted(re.sub(r"\d\.\d+", "#", t) for t in titles if "model_loading: " in t)
    # Both nodes have one disk here, and the second finds all of it there.
    assert downloads == [
        f"model_loading: # s, returned; {amount} bytes, # MB/s" for amount in ("0", "5,000")
    ]
    assert {"phase", "call", "download"} <= set().union(*(classes for classes, _ in page.bars))
    assert page.tables["all"] == len(page.bars) == len(outcome.trace) - 1 + 4 + 2  # one is open
    assert page.tables["critical"] == sum("critical" in classes for classes, _ in page.bars) > 0
    assert "hunter2" not in text + json.dumps(trace)
    assert "<b>" not in text
    lanes = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert lanes[0] == PHASES
    assert f"node, node node-2, pid {os.getpid()}" in lanes
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(page.bars)
    assert all(isinstance(e["ts"], int) and e["ts"] >= 0 and e["dur"] >= 0 for e in complete)


def test_a_download_has_its_bytes_and_its_rate_in_the_lane_of_its_process() -> None:
    config: Any = ModelConfig()
    there = NodeInfo("n2", "10.0.0.2", is_local=False)
    call = TraceEntry("Works", "on_before_download", "node", there.id, pid=77)
    call.finish("returned")
    result = NodeResult(there, "/m", {}, None, 0.0, 2.0, 5_000_000, call.start)
    ctx = CallbackCtx(llm_config=config, nodes={there.id: result})
    ctx.trace.append(call)
    (bar,) = (bar for bar in StartupTimeline("/x").timeline(ctx).bars if bar.kind == "download")
    assert (bar.lane, bar.seconds) == ("node, node n2, pid 77", 2.0)
    assert bar.detail == "5,000,000 bytes, 2.5 MB/s"


def test_a_start_that_fails_has_its_page_in_red(
    start: Callable[..., Outcome], tmp_path: Path
) -> None:
    start(tmp_path, Works, Fails).assert_failed(callback="Fails")
    text, trace = written(tmp_path)
    page = Page(text)
    red = [title for classes, title in page.bars if "failed" in classes]
    assert any(title.startswith("Fails on_engine_ready: ") for title in red)
    assert any(title.startswith("warmup: ") for title in red)
    assert any(title.startswith("total: ") for title in red)
    assert "no &lt;answer&gt;" in text
    assert trace["otherData"]["outcome"] == "failed"
    assert {event.get("cname") for event in trace["traceEvents"]} == {None, "terrible"}


def test_a_folder_that_cannot_be_written_is_a_warning(
    start: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    outcome = start(tmp_path / "file" / "below").assert_succeeded()
    (line,) = outcome.logged("StartupTimeline")
    assert line.startswith("WARNING: no timeline of this start was written: ")
    assert "; give a folder that the replica can write" in line


def test_old_pages_are_removed(start: Callable[..., Outcome], tmp_path: Path) -> None:
    for _ in range(4):
        start(tmp_path, keep=2).assert_succeeded()
    assert len(list(tmp_path.glob("*.html"))) == len(list(tmp_path.glob("*.json"))) == 2


def bar(lane: str, name: str, start: float, end: float, kind: str = "call") -> Bar:
    return Bar(lane, name, kind, start, end - start)


def test_the_critical_path_goes_through_what_ended_last() -> None:
    timeline = Timeline(
        "tiny",
        Replica(),
        [
            bar(PHASES, "total", 0, 20, "phase"),
            bar(PHASES, "node_initialization", 0, 10, "phase"),
            bar(PHASES, "engine_initialization", 10, 18, "phase"),
            bar(PHASES, "warmup", 18, 20, "phase"),
            bar("replica", "before", 0, 1),
            bar("node a", "hook", 1.5, 2),
            bar("node a", "slow", 2, 9.5, "download"),
            bar("node b", "fast", 2, 3, "download"),
            bar("core", "registers", 12, 13),
            bar("replica", "asks", 18, 19.5),
        ],
    )
    path = {bar.name: round(bar.critical_s, 6) for bar in timeline.critical_path}
    assert path == {
        "node_initialization": 1.0,  # what no call or download explains: 1 to 1.5, and 9.5 to 10
        "before": 1.0,
        "hook": 0.5,
        "slow": 7.5,
        "engine_initialization": 7.0,
        "registers": 1.0,
        "warmup": 0.5,
        "asks": 1.5,
    }
    assert sum(path.values()) == timeline.seconds


def test_calls_at_one_time_in_one_process_have_rows_of_their_own() -> None:
    bars = [bar("p", "a", 0, 2), bar("p", "b", 1, 3), bar("p", "c", 2, 4)]
    lanes = Timeline("tiny", Replica(), bars).lanes()
    assert [[b.name for b in row] for row in lanes["p"]] == [["a", "c"], ["b"]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"folder": "here"}, "(folder='here'): give an absolute path, or one that starts with"),
        ({"folder": "/x", "keep": 0}, "(keep=0): write more than 0"),
        ({}, " has no argument 'folder'; add it"),
    ],
)
def test_a_wrong_argument_is_refused_where_the_config_is_made(
    arguments: dict[str, Any], text: str
) -> None:
    with refused(f"StartupTimeline{text}"):
        StartupTimeline(**arguments)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")
def test_a_browser_shows_the_bars(start: Callable[..., Outcome], tmp_path: Path) -> None:
    start(tmp_path, Works)
    (page,) = tmp_path.glob("startup-*.html")
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'b'}"]
    shown = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert len(re.findall(r'class="bar ', shown)) == len(Page(page.read_text()).bars)
    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", "--window-size=1200,900", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert picture.stat().st_size > 10_000
