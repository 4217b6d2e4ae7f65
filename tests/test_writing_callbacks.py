"""The tests that ``docs/writing_callbacks.md`` shows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from rayserve_hooks import CallbackCtx
from rayserve_hooks.testing import (
    Engine,
    Fail,
    Hang,
    Kill,
    ModelConfig,
    RunStack,
    ServeModels,
    TakeOver,
)

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_engine_is_limited(run_stack: RunStack) -> None:
    outcome = run_stack("first_callback")
    outcome.assert_succeeded()
    assert outcome.engine_kwargs == {"max_model_len": 192}


def test_the_page_shows_what_an_outcome_prints(run_stack: RunStack) -> None:
    assert f"{run_stack('first_callback')!r}\n" == (EXAMPLES / "first_outcome.txt").read_text()


def test_my_callback_on_three_nodes(run_stack: RunStack) -> None:
    outcome = run_stack("my_module:MyCallback", nodes=3).assert_succeeded()
    outcome.assert_order(
        [
            "replica: on_before_init: MyCallback",
            "replica: on_before_download: MyCallback",
            "node-2: on_before_download: MyCallback",
            "node-3: on_before_download: MyCallback",
            "replica: on_after_init: MyCallback",
        ]
    )
    assert all(node.custom_data["free_bytes"] > 0 for node in outcome.nodes.values())


class Counts:
    """What is on ``self`` stays in its process; what is in ``custom_data`` travels."""

    def __init__(self) -> None:
        self.hooks = 0

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.hooks += 1
        ctx.custom_data["asked_for"] = "tiny"

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self.hooks += 1
        ctx.custom_data["hooks"] = self.hooks


def test_state_is_of_a_process(run_stack: RunStack) -> None:
    nodes = run_stack([Counts], nodes=2).assert_succeeded().nodes
    assert [node.custom_data["hooks"] for node in nodes.values()] == [2, 1]
    assert [node.custom_data["asked_for"] for node in nodes.values()] == ["tiny", "tiny"]


class Remembers:
    folders: ClassVar[list[str]] = []

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.folders.append("/models")  # on the class: no other process has it


def test_state_on_a_class_is_named(run_stack: RunStack) -> None:
    assert run_stack([Remembers]).shared == ["Remembers.folders"]


def test_the_cache_is_removed_after_a_failure(run_stack: RunStack, tmp_path: Path) -> None:
    restore = {
        "callback": "prepare_node:RestoreCache",
        "kwargs": {"archive": str(tmp_path / "missing.tar"), "folder": str(tmp_path / "cache")},
    }
    (tmp_path / "cache").mkdir()
    outcome = run_stack(restore)
    outcome.assert_failed("No such file", callback="RestoreCache")
    assert outcome.order[-1] == "replica: on_init_failed: RestoreCache"
    assert not (tmp_path / "cache").exists()


def test_one_that_fails_is_switched_off(run_stack: RunStack) -> None:
    stack = ["first_callback", Fail("on_before_download", OSError("no space"))]
    run_stack(stack).assert_failed("RAYSERVE_HOOKS_DISABLE=Fail to start once without it")
    without = {"RAYSERVE_HOOKS_DISABLE": "Fail"}
    run_stack(stack, environment=without).assert_order(["replica: on_before_init: first_callback"])


def test_what_others_do_to_it(run_stack: RunStack, tmp_path: Path) -> None:
    mine = "my_module:MyCallback"
    failing = Fail("on_before_download", OSError("no space"), on="node-2")
    run_stack([mine, failing], nodes=2).assert_failed("no space", callback="Fail")

    hanging = Hang("on_after_init")
    outcome = run_stack([mine, hanging], time_limits={"on_after_init": 0.01})
    outcome.assert_failed("the time limit 'on_after_init'", callback="Hang")

    killed_once = Kill("on_before_download", on="node-2", times=1)
    run_stack([mine, killed_once], nodes=2).assert_succeeded()

    outcome = run_stack([TakeOver("on_before_download", tmp_path), mine], nodes=2)
    assert outcome.assert_succeeded().model_path == str(tmp_path)


@pytest.mark.usefixtures("clean")
def test_with_a_store(run_stack: RunStack, serve_models: ServeModels, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    store = serve_models(tmp_path / "models")
    config = ModelConfig(model_source=store.uri("tiny"))
    outcome = run_stack("my_module:MyCallback", config, nodes=2).assert_succeeded()
    assert "GET tiny/config.json" in store.requests
    assert (Path(outcome.model_path) / "config.json").read_text() == "{}"


def test_the_engine_is_asked_once(run_stack: RunStack, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = SimpleNamespace(SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    engine = Engine()
    outcome = run_stack("first_answer:FirstAnswer", engine=engine).assert_succeeded()
    assert engine.prompts == ["hello"]
    said = [line.rpartition(" took ")[0] for line in outcome.log if " took " in line]
    assert said == ["INFO: FirstAnswer: the first answer"]
    assert outcome.order[-1] == "replica: on_shutdown: FirstAnswer"
