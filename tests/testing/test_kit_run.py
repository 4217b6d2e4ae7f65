"""The kit for authors: whole starts on simulated nodes, as the fixture ``run_stack`` runs them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from plugins_for_tests import run_script

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import loading
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.hookspecs import hookimpl
from rayserve_hooks.testing import Fail, Group, Hang, Kill, ModelConfig, RunStack, TakeOver

SEEN: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


class Notes:
    """Note on itself, in the shared data and in the engine's arguments which hooks have run."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.seen.append("before")
        ctx.custom_data["given"] = 1
        ctx.extra_init_kwargs["max_model_len"] = 64

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)
        self.seen.append("node")
        ctx.custom_data["seen"] = self.seen
        ctx.custom_data["given"] += 1
        ctx.log.info("on %s", ctx.node.id)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["all"] = [node.custom_data["seen"] for node in ctx.nodes.values()]

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        SEEN.append(ctx.node.id)


def test_neither_ray_nor_an_engine_is_needed() -> None:
    script = """
        import sys
        for name in ("ray", "vllm", "torch", "huggingface_hub"):
            sys.modules[name] = None
        from pathlib import Path
        from rayserve_hooks.testing import Fail, ModelConfig
        from rayserve_hooks.testing.run import simulate

        class Callback:
            def on_before_init(self, ctx):
                ctx.custom_data["x"] = 1
            def on_before_download(self, ctx):
                ctx.custom_data["x"] += 1
            def on_init_failed(self, ctx, error):
                pass

        for callbacks in ([Callback], [Callback, Fail("on_before_download", on="node-2")]):
            outcome = simulate(callbacks, nodes=2)
            print(outcome.succeeded, outcome.custom_data)
    """
    assert run_script(script).splitlines() == ["True {'x': 2}", "False {'x': 2}"]


@pytest.mark.slow
def test_a_module_can_opt_in_that_has_imported_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from rayserve_hooks.testing import Fail\n"
        "pytest_plugins = ['rayserve_hooks.testing']\n"
        "def test_it(run_stack):\n"
        "    run_stack(Fail('on_after_init')).assert_failed()\n"
    )
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fixture_is_opt_in() -> None:
    """Installed it is no pytest plugin."""
    from importlib.metadata import entry_points

    plugins = [point.value for point in entry_points(group="pytest11")]
    assert not [value for value in plugins if "rayserve" in value]


def test_the_path_runs_in_order_on_every_node(run_stack: RunStack) -> None:
    outcome = run_stack([Notes], nodes=3).assert_succeeded()
    outcome.assert_order(
        [
            "replica: on_before_init: Notes",
            "replica: on_before_download: Notes",
            "node-2: on_before_download: Notes",
            "node-3: on_before_download: Notes",
            "replica: on_after_init: Notes",
        ]
    )
    assert outcome.engine_kwargs == {"max_model_len": 64}
    assert outcome.custom_data["given"] == 2
    assert [node.custom_data["given"] for node in outcome.nodes.values()] == [2, 2, 2]
    assert sorted(line for line in outcome.log if "Notes: on" in line) == [
        f"INFO: Notes: on node-{number}" for number in (1, 2, 3)
    ]


def test_what_is_on_a_callback_does_not_travel(run_stack: RunStack) -> None:
    outcome = run_stack([Notes], nodes=2).assert_succeeded()
    assert outcome.custom_data["all"] == [["before", "node"], ["node"]]


def test_an_instance_travels_as_it_was_configured(run_stack: RunStack) -> None:
    instance = Notes()
    outcome = run_stack([instance], nodes=2).assert_succeeded()
    assert outcome.custom_data["all"] == [["before", "node"], ["node"]]
    assert instance.seen == []  # the replica has another one


def test_two_runs_share_nothing(run_stack: RunStack) -> None:
    first = run_stack([Notes])
    assert run_stack([Notes]).custom_data == first.custom_data


class OnItsClass:
    count = 0
    cache: ClassVar[dict[str, int]] = {}
    known: ClassVar[set[str]] = set()

    def on_before_download(self, ctx: CallbackCtx) -> None:
        type(self).count += 1
        self.cache[ctx.node.id] = 1
        self.known.add(ctx.node.id)


def test_what_is_on_a_class_is_named(run_stack: RunStack) -> None:
    outcome = run_stack([OnItsClass, Notes], nodes=2).assert_succeeded()
    assert sorted(outcome.shared) == [
        "OnItsClass.cache.node-1",
        "OnItsClass.cache.node-2",
        "OnItsClass.count",
        "OnItsClass.known.'node-1'",
        "OnItsClass.known.'node-2'",
    ]
    assert "each real process would have its own: OnItsClass." in repr(outcome)
    assert run_stack([Notes]).shared == []


class Holds:
    """Keep what does not travel, where ``place`` says."""

    def __init__(self, place: str) -> None:
        self.place = place
        if place == "instance":
            self.stream = (number for number in range(3))

    def on_before_init(self, ctx: CallbackCtx) -> None:
        if self.place == "data":
            ctx.custom_data["stream"] = (number for number in range(3))

    def on_before_download(self, ctx: CallbackCtx) -> None:
        if self.place == "data of a node" and not ctx.node.is_local:
            ctx.custom_data["stream"] = (number for number in range(3))


def test_an_instance_that_does_not_travel_is_refused_as_in_a_config(run_stack: RunStack) -> None:
    with pytest.raises(CallbackConfigError, match=r"'Holds' cannot be sent .* attribute 'stream'"):
        run_stack([Holds("instance")])


@pytest.mark.parametrize("place", ["data", "data of a node"])
def test_data_that_does_not_travel_fails_with_its_key(run_stack: RunStack, place: str) -> None:
    outcome = run_stack({"callback": Holds, "kwargs": {"place": place}}, nodes=2)
    outcome.assert_failed(r"custom_data\['stream'\] cannot be sent", callback="Holds")


def test_a_failure_cleans_up_on_each_node(run_stack: RunStack) -> None:
    failing = Fail("on_before_download", OSError("no space"), on="node-2")
    outcome = run_stack([Notes, failing], nodes=2)
    error = outcome.assert_failed("no space", callback="Fail", hook="on_before_download")
    assert "node-2" in str(error.node)
    assert SEEN == ["node-2", "node-1"]
    assert [call.hook for call in outcome.calls("Notes", node="node-2")] == [
        "on_before_download",
        "on_init_failed",
    ]


def test_what_fails_in_the_clean_up_is_with_the_error(run_stack: RunStack) -> None:
    class Dirty:
        def on_init_failed(self, ctx: CallbackCtx) -> None:
            raise OSError("cannot be removed")

    outcome = run_stack([Dirty, Fail("on_after_init")])
    error = outcome.assert_failed(callback="Fail")
    assert ["cannot be removed" in str(failure) for failure in error.cleanup_errors] == [True]
    assert "in the clean-up: callback 'Dirty' failed" in repr(outcome)


def test_on_error_warn_goes_on(run_stack: RunStack) -> None:
    warned = {"callback": Fail("on_before_init"), "on_error": "warn"}
    outcome = run_stack([warned, Notes]).assert_succeeded()
    assert outcome.order[0] == "replica: on_before_init: Fail (warned)"
    assert any(line.startswith("WARNING: callback 'Fail' failed") for line in outcome.log)
    run_stack([Fail("on_before_init"), Notes], on_error="warn").assert_succeeded()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_hang_is_ended_by_its_limit(run_stack: RunStack, blocking: bool) -> None:
    hang = Hang("on_after_init", blocking=blocking)
    outcome = run_stack([Notes, hang], time_limits={"on_after_init": 0.01})
    outcome.assert_failed("not done after 0.01 s, the time limit 'on_after_init'", callback="Hang")


def test_a_hang_elsewhere_is_stopped_after_a_failure(run_stack: RunStack) -> None:
    failing = {"callback": Fail("on_before_download", on="node-2")}
    outcome = run_stack([failing, Hang("on_before_download", on="node-1")], nodes=2)
    outcome.assert_failed("failed by the test", callback="Fail")


def test_a_killed_process_is_started_again_once(run_stack: RunStack) -> None:
    kill = Kill("on_before_download", on="node-2", times=1)
    outcome = run_stack([Notes, kill], nodes=2).assert_succeeded()
    there = [line for line in outcome.order if line.startswith("node-2")]
    assert there == [
        "node-2: on_before_download: Notes",
        "node-2: on_before_download: Kill (interrupted)",
        "node-2: on_before_download: Notes (attempt 2)",
        "node-2: on_before_download: Kill (attempt 2)",
    ]


def test_a_process_that_is_killed_twice_fails(run_stack: RunStack) -> None:
    outcome = run_stack([Notes, Kill("on_before_download", on="node-2")], nodes=2)
    outcome.assert_failed("its process was killed or the node died", callback="Kill")
    assert SEEN == ["node-2", "node-1"]  # in a new process


def test_the_replica_cannot_be_killed_here(run_stack: RunStack) -> None:
    run_stack(Kill("on_after_init")).assert_failed("runs the test; kill that of another node")


def test_a_step_that_is_taken_over(run_stack: RunStack, tmp_path: Path) -> None:
    outcome = run_stack([TakeOver("on_before_init", tmp_path), Notes], nodes=2)
    outcome.assert_failed("'all'|'seen'", callback="Notes") if outcome.error else None
    assert outcome.order[:2] == [
        "replica: on_before_init: TakeOver (handled)",
        "replica: on_before_init: Notes (skipped)",
    ]
    taken = TakeOver("on_before_download", tmp_path, reason="it is here")
    outcome = run_stack(taken, nodes=2).assert_succeeded()
    assert outcome.model_path == str(tmp_path)
    assert [node.handled for node in outcome.nodes.values()] == 2 * [
        Handled(tmp_path, "it is here")
    ]


def test_background_work_fails_for_its_callback(run_stack: RunStack) -> None:
    class Starts:
        def on_before_download(self, ctx: CallbackCtx) -> None:
            ctx.run_in_background(self.work)

        async def work(self) -> None:
            await asyncio.sleep(0)
            raise OSError("no such archive")

    run_stack([Starts]).assert_failed(
        "background task 'work' raised .*no such arch", callback="Starts"
    )


def test_wrappers_and_marks_order_the_calls(run_stack: RunStack) -> None:
    class Wraps:
        @hookimpl(wrapper=True)
        def on_before_init(self, ctx: CallbackCtx) -> Any:
            return (yield)

    class First:
        @hookimpl(tryfirst=True)
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    order = run_stack([Notes, First, Wraps]).order[:3]
    assert [line.rpartition(" ")[2] for line in order] == ["Wraps", "First", "Notes"]


def test_a_callback_can_choose_the_nodes(run_stack: RunStack) -> None:
    class Chooses:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            group: Any = Group([{"GPU": 1}, {"GPU": 1}], nodes=[3, 3])
            ctx.placement_group = group

    outcome = run_stack([Chooses, Notes], nodes=3).assert_succeeded()
    assert list(outcome.nodes) == ["node-1", "node-3"]  # the replica's own always is one
    assert any("replaced the placement group" in line for line in outcome.log)


def test_a_background_loop_of_the_test_is_no_hindrance(run_stack: RunStack) -> None:
    async def in_a_loop() -> None:
        run_stack([Notes]).assert_succeeded()

    asyncio.run(in_a_loop())


def test_the_environment_is_as_before(run_stack: RunStack) -> None:
    class Sets:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.runtime_env["env_vars"] = {**ctx.runtime_env["env_vars"], "OF_A_CALLBACK": "1"}

        def on_before_download(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["seen"] = [os.environ.get(name) for name in names]

    names = ("OF_A_CALLBACK", "OF_THE_CONFIG", "OF_THE_TEST")
    config = ModelConfig(runtime_env={"env_vars": {"OF_THE_CONFIG": "2"}})
    outcome = run_stack([Sets], config, environment={"OF_THE_TEST": "3"}).assert_succeeded()
    assert outcome.custom_data["seen"] == ["1", "2", "3"]
    assert not os.environ.keys() & set(names)


def test_nothing_that_is_installed_is_found_unless_the_test_says_so(run_stack: RunStack) -> None:
    assert "startup_metrics" in loading.short_names()
    policy = {"callback": "download_policy", "kwargs": {"local": "NONE"}}
    with pytest.raises(CallbackConfigError, match=r"no such short name.*known: none") as caught:
        run_stack(policy)
    assert caught.value.__notes__ == [
        "'download_policy' is installed; run_stack(installed=True) finds it"
    ]
    for installed in (True, ["download_policy"]):
        run_stack(policy, installed=installed).assert_succeeded()
    with pytest.raises(CallbackConfigError, match="known: startup_metrics"):
        run_stack(policy, installed=["startup_metrics"])
    assert "startup_metrics" in loading.short_names()


def test_an_installed_package_can_be_pretended(run_stack: RunStack) -> None:
    run_stack("mine", installed={"mine": f"{__name__}:Notes"}).assert_succeeded()
    with pytest.raises(ValueError, match="nothing is installed as 'mine'; install it, or give a m"):
        run_stack("mine", installed=["mine"])


def test_a_start_takes_milliseconds(run_stack: RunStack) -> None:
    run_stack([Notes], nodes=2)
    started = time.perf_counter()
    for _ in range(10):
        run_stack([Notes], nodes=2)
    assert time.perf_counter() - started < 10 * 0.25  # 10 ms each on a machine that is idle


def test_it_leaves_no_thread_of_its_own(run_stack: RunStack) -> None:
    import threading

    before = set(threading.enumerate())
    run_stack([Notes, Hang("on_after_init", blocking=True)], time_limits={"on_after_init": 0.01})
    for thread in set(threading.enumerate()) - before:
        if thread.name != "rayserve_hooks-aio":  # which all runs share
            thread.join(5)
            assert not thread.is_alive()


class Lives:
    """Take part in a replica's whole life."""

    def on_configure(self, ctx: CallbackCtx) -> None:
        ctx.runtime_env["env_vars"]["SET_WHERE_BUILT"] = "1"
        ctx.placement_group_config["bundles"] = [{"GPU": 1}, {"GPU": 1}]
        ctx.extra_init_kwargs["dtype"] = "auto"
        ctx.custom_data["from"] = str(ctx.process)

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["seen"] = os.environ["SET_WHERE_BUILT"]

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        ctx.log.info("in %s on %s with %s", ctx.process, ctx.node.id, ctx.custom_data["from"])

    async def on_engine_ready(self, ctx: CallbackCtx) -> None:
        answers = [answer async for answer in ctx.engine.generate("hi", None, "1")]  # type: ignore[arg-type]
        ctx.custom_data["answer"] = answers[-1].outputs[0].text

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["ended"] = True

    def on_init_failed(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["failed"] = True


def test_the_whole_life(run_stack: RunStack) -> None:
    outcome = run_stack([Lives], nodes=2).assert_succeeded()
    outcome.assert_order(
        [
            "driver: on_configure: Lives",
            "replica: on_before_init: Lives",
            "replica: on_before_engine_init: Lives",
            "engine core on node-1: on_before_engine_init: Lives",
            "worker 0 on node-1: on_before_engine_init: Lives",
            "worker 1 on node-2: on_before_engine_init: Lives",
            "replica: on_engine_ready: Lives",
            "replica: on_shutdown: Lives",
        ]
    )
    assert outcome.placement_group_config == {"bundles": [{"GPU": 1}, {"GPU": 1}]}
    assert outcome.engine_kwargs == {"dtype": "auto"}
    assert outcome.custom_data == {
        "from": "driver",
        "seen": "1",
        "answer": "ok",
        "ended": True,
    }
    assert outcome.engine.prompts == ["hi"]
    assert "INFO: Lives: in worker 1 on node-2 with driver" in outcome.log


def test_the_engines_processes_can_be_named(run_stack: RunStack) -> None:
    names = ["engine config", "engine core 1", "worker 3"]
    outcome = run_stack([Lives], nodes=2, engine_processes=names).assert_succeeded()
    processes = [call.process for call in outcome.calls(hook="on_before_engine_init")]
    assert processes == ["replica", *names]
    with pytest.raises(ValueError, match="'worke 1' is no process of the engine; use one of"):
        run_stack([Lives], engine_processes=["worke 1"])


@pytest.mark.parametrize(
    ("failing", "hook", "text"),
    [
        (Fail("on_configure"), "on_configure", "failed by the test"),
        (
            Fail("on_before_engine_init", on="replica"),
            "on_before_engine_init",
            "failed by the test",
        ),
        (
            Fail("on_before_engine_init", OSError("no device"), on="worker 1"),
            "on_before_engine_init",
            "in process 'worker 1'|process worker 1|worker 1",
        ),
        (
            Kill("on_before_engine_init", on="engine core"),
            "on_before_engine_init",
            "its process was killed",
        ),
        (Fail("on_engine_ready"), "on_engine_ready", "failed by the test"),
    ],
)
def test_a_failure_after_the_nodes(run_stack: RunStack, failing: Any, hook: str, text: str) -> None:
    outcome = run_stack([Lives, failing], nodes=2)
    outcome.assert_failed(text, callback=type(failing).__name__, hook=hook)
    assert not outcome.calls(hook="on_shutdown")
    if hook != "on_configure":
        assert outcome.custom_data["failed"] is True
        assert outcome.order[-1] == "replica: on_init_failed: Lives"


def test_a_failing_shutdown_is_logged_and_the_others_run(run_stack: RunStack) -> None:
    outcome = run_stack([Lives, Fail("on_shutdown")]).assert_succeeded()
    assert outcome.order[-2:] == [
        "replica: on_shutdown: Fail (failed)",
        "replica: on_shutdown: Lives",
    ]
    assert any(line.startswith("ERROR: callback 'Fail' failed") for line in outcome.log)


def test_an_engine_process_does_not_share_an_instance(run_stack: RunStack) -> None:
    class Counts:
        def __init__(self) -> None:
            self.calls = 0

        def on_before_init(self, ctx: CallbackCtx) -> None:
            self.calls += 1

        def on_before_engine_init(self, ctx: CallbackCtx) -> None:
            self.calls += 1
            ctx.log.info("call %s", self.calls)

    outcome = run_stack([Counts]).assert_succeeded()
    assert [line for line in outcome.log if "call " in line] == [
        "INFO: Counts: call 2",
        "INFO: Counts: call 1",
    ]
