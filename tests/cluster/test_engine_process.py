"""The hooks in one process of the engine: once, reported, and blamed on the process."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import make_ctx, make_stack
from waiting import until

from rayserve_hooks.cluster import _vllm, engine_folder
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report
from rayserve_hooks.cluster.engine_process import run_hooks_here
from rayserve_hooks.cluster.travel import engine_request_for
from rayserve_hooks.cluster.vllm_plugin import MARK
from rayserve_hooks.context import Handled, NodeInfo, NodeResult, ProcessInfo
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.recorder import Recorder
from rayserve_hooks.errors import HookError, Phase

pytestmark = pytest.mark.ray  # for its pickle; no cluster is started

HERE, THERE = "feed-n1", "feed-n2"
NODE = NodeInfo("n2", "10.0.0.2", is_local=False)


class Config:
    model_id = "tiny"


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "parent"
    folder.mkdir()
    monkeypatch.setattr(engine_folder, "_PARENT", folder)
    monkeypatch.setattr(_vllm, "this_process", lambda: ProcessInfo("worker", 1))
    monkeypatch.setattr("rayserve_hooks.cluster._ray.connected_node", lambda: None)
    monkeypatch.setenv(MARK, THERE)
    return folder


Prepare = Callable[..., EngineFolder]


@pytest.fixture
def prepare() -> Iterator[Prepare]:
    made = []

    def prepare(
        *callbacks: object, limits: TimeLimits | None = None, **fields: Any
    ) -> EngineFolder:
        ctx = make_ctx(**fields)
        ctx._state.llm_config = Config()
        Recorder(ctx)
        data = engine_request_for(ctx, make_stack(*callbacks, time_limits=limits))
        made.append(EngineFolder.make(THERE, (NODE, data)))
        return made[-1]

    yield prepare
    for folder in made:
        folder.remove()


def only(reports: list[Report]) -> Report:
    (report,) = reports
    return report


def callback(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"callback": f"engine_callbacks:{name}", "kwargs": kwargs}


def test_the_context_is_a_copy_of_the_replicas(prepare: Prepare, tmp_path: Path) -> None:
    generator = (number for number in range(1))
    folder = prepare(
        callback("Tell", folder=str(tmp_path)),
        custom_data={"said": "hello", "stays": generator},
        extra_init_kwargs={"max_model_len": 128},
        nodes={"n1": NodeResult(NODE, "/m", {"a": 1, "stays": generator}, Handled("/m"), 0.0, 0.0)},
        handled=Handled("/m"),
    )
    run_hooks_here(THERE)
    (file,) = [path for path in tmp_path.iterdir() if path.is_file()]
    assert json.loads(file.read_text()) == {
        "process": "worker 1",
        "pid": os.getpid(),
        "node": "n2",
        "model_id": "tiny",
        "said": "hello",
        "stays": False,
        "nodes": {"n1": ["a"]},
        "max_model_len": 128,
    }
    report = only(folder.reports())
    assert (report.node, str(report.process)) == (NODE, "worker 1")
    assert report.ended
    assert report.error is None
    entry = report.trace[0]
    assert (entry.callback, entry.hook, entry.process, entry.node_id, entry.outcome) == (
        "Tell",
        "on_before_engine_init",
        "worker 1",
        "n2",
        "returned",
    )


def test_they_run_once_in_a_process(prepare: Prepare, tmp_path: Path) -> None:
    folder = prepare(callback("Tell", folder=str(tmp_path)), custom_data={"said": ""})
    run_hooks_here(THERE)
    run_hooks_here(THERE)
    assert len(only(folder.reports()).trace) == 1


def test_a_forked_child_is_a_process_of_its_own(prepare: Prepare, tmp_path: Path) -> None:
    folder = prepare(callback("Tell", folder=str(tmp_path)), custom_data={"said": ""})
    run_hooks_here(THERE)
    if os.fork() == 0:
        run_hooks_here(THERE)
        os._exit(0)
    os.wait()
    assert len({report.process.pid for report in folder.reports()}) == 2


def test_another_process_runs_nothing(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(callback("Trouble", process="worker 1"))
    monkeypatch.setattr(_vllm, "this_process", lambda: None)
    run_hooks_here(THERE)
    assert folder.reports() == []


def test_a_process_without_a_folder_fails_in_words() -> None:
    with pytest.raises(
        HookError,
        match=r"on node .*, worker 1 \(phase: before engine init\): the start that it belongs to "
        r"has no folder here: FileNotFoundError: .*; make the replica's placement group span",
    ):
        run_hooks_here(THERE)


def test_a_failure_is_raised_and_reported_with_the_process(prepare: Prepare) -> None:
    folder = prepare(callback("Trouble", process="worker 1"))
    text = re.escape(
        "callback 'Trouble' failed in hook on_before_engine_init on node n2 (10.0.0.2), worker 1 "
        "(phase: before engine init): RuntimeError: no such parser; fix the callback, or set "
        "'on_error: warn' on it to go on without it"
    )
    with pytest.raises(HookError, match=f"^{text}$") as caught:
        run_hooks_here(THERE)
    report = only(folder.reports())
    assert str(report.error) == str(caught.value)
    assert report.error is not None
    assert isinstance(report.error.__cause__, RuntimeError)
    assert report.error.process == "worker 1"
    assert report.trace[0].outcome == "failed"


def test_one_that_only_warns_goes_on(prepare: Prepare) -> None:
    folder = prepare({**callback("Trouble", process="worker 1"), "on_error": "warn"})
    run_hooks_here(THERE)
    report = only(folder.reports())
    assert report.error is None
    assert report.trace[0].outcome == "warned"


def test_the_time_limit_names_the_process(prepare: Prepare) -> None:
    limits = TimeLimits(on_before_engine_init=0.05)
    folder = prepare(callback("Trouble", process="worker 1", how="hang"), limits=limits)
    with pytest.raises(HookError, match=r"worker 1 .*not done after 0.05 s, the time limit"):
        run_hooks_here(THERE)
    error = only(folder.reports()).error
    assert error is not None
    assert error.callback == "Trouble"


def test_a_callback_that_cannot_be_built_there_is_an_error(prepare: Prepare) -> None:
    folder = prepare(callback("Only"))
    with pytest.raises(HookError, match=r"worker 1 .*Only.*built in a process of the engine"):
        run_hooks_here(THERE)
    error = only(folder.reports()).error
    assert error is not None
    assert (error.phase, error.process) == (Phase.BEFORE_ENGINE_INIT, "worker 1")


def test_background_work_has_ended_before_the_engine_is_built(
    prepare: Prepare, tmp_path: Path
) -> None:
    prepare(callback("Background", file=str(tmp_path / "done")))
    run_hooks_here(THERE)
    assert (tmp_path / "done").exists()


def test_a_process_that_vllm_stops_has_not_failed_itself(prepare: Prepare) -> None:
    """As vLLM stops the other ranks when one has failed: its handler raises SystemExit."""
    folder = prepare(callback("Trouble", process="worker 1", how="hang"))

    def stop(*_: object) -> None:
        raise SystemExit

    def stop_once_it_runs() -> None:
        until(lambda: any(report.trace for report in folder.reports()))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    stopping = threading.Thread(target=stop_once_it_runs)
    try:
        stopping.start()
        with pytest.raises(SystemExit):
            run_hooks_here(THERE)
    finally:
        signal.signal(signal.SIGTERM, before)
        stopping.join()
    report = only(folder.reports())
    assert (report.error, report.ended, report.killed) == (None, True, False)
    assert report.trace[0].outcome == "interrupted"


def test_a_process_of_rays_takes_the_folder_of_its_own_node(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers get the replica's environment; their children get theirs."""
    folder = prepare(callback("Trouble", process="none"))
    monkeypatch.setattr("rayserve_hooks.cluster._ray.connected_node", lambda: "n2")
    run_hooks_here(HERE)
    assert only(folder.reports()).ended
    assert os.environ[MARK] == THERE
