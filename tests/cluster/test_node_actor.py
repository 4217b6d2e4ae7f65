"""The actor of another node, called as Ray calls it, without a cluster."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import make_ctx, sent

from rayserve_hooks.cluster import _vllm, engine_folder, node_actor
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report
from rayserve_hooks.cluster.node_actor import FolderActor, NodeActor
from rayserve_hooks.cluster.travel import (
    CleanUp,
    ModelSource,
    NodeReply,
    NodeRequest,
    NodeStatus,
    request_for,
)
from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo, ProcessInfo
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import HookError
from rayserve_hooks.hookspecs import hookimpl

pytestmark = pytest.mark.slow  # it asks Ray how to pickle

NODE_2 = NodeInfo("n2", "10.0.0.2", is_local=False)
FOREVER = 30  # no test waits so long unless it fails
FIRST_FAILURE = ValueError("the first failure")
SEEN: list[BaseException] = []
BEGAN = threading.Event()


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@pytest.fixture
def request_of(request: pytest.FixtureRequest) -> Callable[..., NodeRequest]:
    """Make what a node's actor gets."""

    def make(*callbacks: object) -> NodeRequest:
        stack = CallbackStack.parse(list(callbacks)).for_deployment(request.node.nodeid)
        ctx = make_ctx(worker_node_download_model="NONE", custom_data={"given": 1})
        return request_for(NODE_2, ctx, stack, ModelSource("m", None), b"")

    return make


class OnNode:
    """Take part on a node."""

    def __init__(self, error: str = "", cleanup_error: str = "") -> None:
        self.error = error
        self.cleanup_error = cleanup_error

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        ctx.custom_data["brought"] = ctx.custom_data["given"] + 1
        if self.error:
            raise RuntimeError(self.error)
        return Handled("m")

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        SEEN.append(error)
        if self.cleanup_error:
            raise OSError(self.cleanup_error)


class Before(OnNode):
    def on_before_download(self, ctx: CallbackCtx) -> None:  # type: ignore[override]
        pass


class Waits:
    async def on_before_download(self, ctx: CallbackCtx) -> None:
        BEGAN.set()
        await asyncio.Event().wait()


async def follow(actor: NodeActor, statuses: list[NodeStatus]) -> NodeReply:
    """Do what the replica does: ask again until the reply is there."""
    reply = asyncio.ensure_future(actor.initialize())
    seen = 0
    while not reply.done():
        status = asyncio.ensure_future(actor.status(seen))
        await asyncio.wait([reply, status], return_when=asyncio.FIRST_COMPLETED, timeout=FOREVER)
        if status.done():
            heard = sent(status.result())
            statuses.append(heard)
            seen = heard.number
        else:
            status.cancel()
    return await reply


def calls(trace: Any) -> list[tuple[str, str]]:
    return [(call.callback, call.outcome) for call in trace]


def heard_of(statuses: list[NodeStatus]) -> list[list[tuple[str, str]]]:
    """Return the calls of each status, without repetitions."""
    heard = [calls(status.trace) for status in statuses]
    return [now for before, now in zip([[], *heard], heard, strict=False) if now != before]


def test_it_says_what_it_does_and_then_replies(request_of: Callable[..., NodeRequest]) -> None:
    statuses: list[NodeStatus] = []
    reply = asyncio.run(follow(NodeActor(request_of(OnNode), 2), statuses))
    assert (reply.result.node, reply.result.handled) == (NODE_2, Handled("m"))
    assert reply.unpacked().custom_data == {"given": 1, "brought": 2}
    assert [(entry.callback, entry.role, entry.attempt) for entry in reply.trace] == [
        ("OnNode", "node", 2)
    ]
    assert {status.phase for status in statuses} == {"before download"}
    assert heard_of(statuses)[0] == [("OnNode", "running")]
    numbers = [status.number for status in statuses]
    assert numbers == sorted(numbers)
    assert not SEEN


def test_it_says_of_each_call_that_it_begins_before_it_does(
    request_of: Callable[..., NodeRequest],
) -> None:
    class Inner:
        def on_before_download(self, ctx: CallbackCtx) -> None:
            pass

    class Outer:
        @hookimpl(wrapper=True)
        def on_before_download(self, ctx: CallbackCtx) -> Generator[None, object, object]:
            return (yield)

    class Last(Inner):
        pass

    statuses: list[NodeStatus] = []
    reply = asyncio.run(follow(NodeActor(request_of(Inner, Outer, Last), 1), statuses))
    assert heard_of(statuses)[:3] == [
        [("Outer", "running")],
        [("Outer", "running"), ("Inner", "running")],
        [("Outer", "running"), ("Inner", "returned"), ("Last", "running")],
    ]
    assert calls(reply.trace) == [
        ("Outer", "returned"),
        ("Inner", "returned"),
        ("Last", "returned"),
    ]


def test_calls_wait_once_and_not_for_ever_for_a_replica_that_does_not_listen(
    request_of: Callable[..., NodeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_actor, "_RECEIPT_S", 0.5)
    before = [{"callback": Before, "name": name} for name in "abcd"]
    reply = asyncio.run(NodeActor(request_of(*before, OnNode), 1).initialize())
    assert [outcome for _, outcome in calls(reply.trace)] == ["returned"] * 4 + ["handled"]
    first, *later = [entry.duration_s or 0.0 for entry in reply.trace]
    assert first > 0.5 > sum(later)


def test_a_call_that_waits_for_the_replica_ends_with_a_stop(
    request_of: Callable[..., NodeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_actor, "_RECEIPT_S", FOREVER)
    actor = NodeActor(request_of(OnNode), 1)

    async def main() -> CleanUp:
        initializing = asyncio.ensure_future(actor.initialize())
        number = 0
        while not (heard := await actor.status(number)).trace:
            number = heard.number
        await actor.stop()
        with pytest.raises(asyncio.CancelledError):
            await initializing
        return await actor.clean_up(FIRST_FAILURE, [])

    started = time.monotonic()
    assert asyncio.run(main()).failures == []
    assert time.monotonic() - started < FOREVER


def test_one_that_fails_cleans_up_when_it_is_told_with_its_own_error(
    request_of: Callable[..., NodeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_actor, "_RECEIPT_S", FOREVER)
    kwargs = {"error": "no such bucket", "cleanup_error": "no such lock"}
    actor = NodeActor(request_of({"callback": OnNode, "kwargs": kwargs}), 1)

    async def main() -> tuple[HookError, CleanUp]:
        with pytest.raises(HookError, match=r"callback 'OnNode' failed .*no such bucket") as caught:
            await follow(actor, [])
        assert not SEEN
        return caught.value, await actor.clean_up(FIRST_FAILURE, [])

    error, outcome = asyncio.run(main())
    (failure,) = outcome.failures
    assert (failure.callback, failure.detail) == ("OnNode", "OSError: no such lock")
    assert [(call.hook, call.outcome) for call in outcome.trace] == [
        ("on_before_download", "failed"),
        ("on_init_failed", "failed"),
    ]
    # A call waits until the replica has heard of it; in the clean-up nobody tells it any more.
    assert all(call.duration_s is not None and call.duration_s < FOREVER for call in outcome.trace)
    assert [error] == SEEN


def test_one_that_is_stopped_cleans_up_with_an_error_that_says_so(
    request_of: Callable[..., NodeRequest],
) -> None:
    before = {"callback": Before, "kwargs": {"cleanup_error": "no such lock"}}
    actor = NodeActor(request_of(before, Waits), 1)

    async def main() -> CleanUp:
        following = asyncio.ensure_future(follow(actor, []))
        assert await asyncio.to_thread(BEGAN.wait, FOREVER)
        await actor.stop()
        with pytest.raises(asyncio.CancelledError):
            await following
        return await actor.clean_up(FIRST_FAILURE, [])

    outcome = asyncio.run(main())
    (error,) = SEEN
    assert str(error).partition("\n")[0] == (
        "node initialization failed on node n2 (10.0.0.2) (phase: before download): stopped, "
        "because the initialization has failed elsewhere or was cancelled"
    )
    assert [failure.detail for failure in outcome.failures] == ["OSError: no such lock"]
    assert [(call.hook, call.callback) for call in outcome.trace] == [
        ("on_before_download", "Before"),
        ("on_before_download", "Waits"),
        ("on_init_failed", "Before"),
    ]


def test_stopping_what_has_ended_or_never_began_is_nothing(
    request_of: Callable[..., NodeRequest],
) -> None:
    actor = NodeActor(request_of(OnNode), 1)

    async def main() -> CleanUp:
        await actor.stop()
        await follow(actor, [])
        await actor.stop()
        return await actor.clean_up(FIRST_FAILURE, [])

    assert asyncio.run(main()).failures == []
    assert SEEN == [FIRST_FAILURE]


def test_a_status_that_is_asked_for_before_the_clean_up_begins_hears_of_it(
    request_of: Callable[..., NodeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_actor, "_RECEIPT_S", FOREVER)
    actor = NodeActor(request_of(OnNode), 2)

    async def main() -> list[NodeStatus]:
        # Ray begins the calls of an actor with an event loop in any order.
        asked = asyncio.ensure_future(actor.status(0))
        await asyncio.sleep(0)
        cleaning = asyncio.ensure_future(actor.clean_up(FIRST_FAILURE, ["OnNode"], followed=True))
        statuses = [sent(await asyncio.wait_for(asked, FOREVER / 2))]
        while not cleaning.done():
            statuses.append(sent(await actor.status(statuses[-1].number)))
        return statuses

    assert heard_of(asyncio.run(main()))[0] == [("OnNode", "running")]
    assert SEEN == [FIRST_FAILURE]


def test_another_process_cleans_up_with_what_had_started_in_the_first(
    request_of: Callable[..., NodeRequest],
) -> None:
    request = sent(request_of(OnNode))
    outcome = asyncio.run(NodeActor(request, 2).clean_up(FIRST_FAILURE, []))
    assert outcome == CleanUp([], [])
    assert not SEEN
    outcome = asyncio.run(NodeActor(request, 2).clean_up(FIRST_FAILURE, ["OnNode"]))
    assert outcome.failures == []
    assert [(call.hook, call.callback) for call in outcome.trace] == [("on_init_failed", "OnNode")]
    assert SEEN == [FIRST_FAILURE]


def test_a_node_on_which_vllm_would_not_run_hooks_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_folder, "_PARENT", tmp_path)
    monkeypatch.setattr(_vllm, "problem_here", lambda: "the reason; do this")
    actor = FolderActor()

    async def ask() -> None:
        assert await actor.make_engine_folder("feed-n2", "x") == "the reason; do this"
        assert await actor.engine_reports() == []
        await actor.remove_engine_folder()

    asyncio.run(ask())
    assert list(tmp_path.iterdir()) == []


def test_a_nodes_folder_is_there_until_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_folder, "_PARENT", tmp_path)
    monkeypatch.setattr(_vllm, "problem_here", lambda: "")
    actor = FolderActor()
    assert not asyncio.run(actor.make_engine_folder("feed-n2", "x"))
    folder = EngineFolder.find("feed-n2")
    file = folder.report()
    report = Report(NODE_2, ProcessInfo("worker", 0), ended=True)
    file.write(report)
    file.close()
    folder.close()
    assert asyncio.run(actor.engine_reports()) == [report]
    asyncio.run(actor.remove_engine_folder())
    assert list(tmp_path.iterdir()) == []
