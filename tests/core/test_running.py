"""Hooks run from an event loop: time limits, background work, clean-up."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import EXITS, ON_EXIT
from waiting import until_async

from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo
from rayserve_hooks.core import running, threads
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError, Phase
from rayserve_hooks.testing import Fail, Hang, Outcome, RunStack

HERE = "on node n1 (10.0.0.1)"
ON_NODE = "on node node-1 (10.0.0.1)"
FIX = "; fix the callback, or set 'on_error: warn' on it to go on without it"
ONCE = "; set RAYSERVE_HOOKS_DISABLE={} to start once without it"
FOREVER = 30  # no test waits so long unless it fails


def starts(name: str, *functions: Callable[..., object], on_error: str = "raise") -> dict[str, Any]:
    """Make a callback that starts functions in the background of its first hook."""

    class Starts:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            for function in functions:
                ctx.run_in_background(function)

    return {"callback": Starts, "name": name, "on_error": on_error}


def hooked(run: Callable[[CallbackCtx], object], hook: str = "on_before_init") -> dict[str, Any]:
    """Make a callback named as ``run``."""

    def method(self: object, ctx: CallbackCtx) -> object:
        return run(ctx)

    return {"callback": type("Hooked", (), {hook: method}), "name": run.__name__}


async def before_init(manager: PluginManager, ctx: CallbackCtx) -> Any:
    chain = threads.run_in_thread(manager.hook.on_before_init, ctx=ctx)
    return await running.with_background(manager, ctx, chain)


def run(*callbacks: object, ctx: CallbackCtx | None = None) -> CallbackCtx:
    ctx = ctx or make_ctx()
    asyncio.run(before_init(make_manager(*callbacks), ctx))
    return ctx


def calls(ran: CallbackCtx | Outcome) -> list[tuple[str, str, str]]:
    return [(entry.callback, entry.background, entry.outcome) for entry in ran.trace]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Let threads that hang go when the test has ended."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_GIVE_UP_S", 0.01)


@pytest.fixture
def _attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_POLL_S", 0.01)


def test_background_tasks_run_beside_each_other_and_the_next_hook() -> None:
    together = threading.Barrier(4)

    def meet(*_: object) -> None:
        together.wait(FOREVER)

    ctx = run(starts("A", meet, meet, meet), hooked(meet))
    assert not together.broken
    assert calls(ctx) == [
        ("A", "", "returned"),
        *[("A", "meet", "returned")] * 3,
        ("meet", "", "returned"),
    ]


def test_the_node_waits_for_its_background_tasks() -> None:
    chain_ended = threading.Event()

    def ends_last() -> None:
        assert chain_ended.wait(FOREVER)

    async def chain(manager: PluginManager, ctx: CallbackCtx) -> Any:
        result = await threads.run_in_thread(manager.hook.on_before_init, ctx=ctx)
        chain_ended.set()
        return result

    def takes(ctx: CallbackCtx) -> Handled:
        return Handled("/m")

    manager, ctx = make_manager(starts("A", ends_last), hooked(takes)), make_ctx()
    work = running.with_background(manager, ctx, chain(manager, ctx))
    assert asyncio.run(work) == Handled("/m")
    assert ctx.trace[1].outcome == "returned"


def test_a_background_task_may_start_another() -> None:
    ended = threading.Event()

    class Starts:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.run_in_background(self.first, ctx)
            assert ended.wait(FOREVER)

        def first(self, ctx: CallbackCtx) -> None:
            ctx.run_in_background(ended.set)

    assert calls(run(Starts)) == [
        ("Starts", "", "returned"),
        ("Starts", "first", "returned"),
        ("Starts", "set", "returned"),
    ]


def test_a_background_task_gets_its_arguments_and_gives_its_result(run_stack: RunStack) -> None:
    def adds(ctx: CallbackCtx) -> None:
        ctx.custom_data["sum"] = ctx.run_in_background(int.__add__, 1, 2).result(FOREVER)

    assert run_stack(hooked(adds)).assert_succeeded().custom_data["sum"] == 3


def test_an_async_callback_starts_an_async_task_on_its_own_loop(run_stack: RunStack) -> None:
    class Starts:
        async def on_before_init(self, ctx: Any) -> None:
            ctx.run_in_background(self.later, ctx, asyncio.get_running_loop())

        async def later(self, ctx: CallbackCtx, first: asyncio.AbstractEventLoop) -> None:
            ctx.custom_data["same"] = asyncio.get_running_loop() is first

    assert run_stack(Starts).assert_succeeded().custom_data["same"]


def test_a_background_task_may_call_a_hook_with_an_async_callback() -> None:
    class Inner:
        async def on_before_download(self, ctx: CallbackCtx) -> Handled:
            return Handled("/m")

    inner = make_manager(Inner)

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            call = ctx.run_in_background(lambda: inner.hook.on_before_download(ctx=ctx))
            ctx.custom_data["result"] = call.result(FOREVER)

    assert run(Calls).custom_data["result"] == Handled("/m")


def fetch() -> None:
    raise ValueError("boom")


async def fetch_async() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("function", [fetch, fetch_async])
def test_a_failed_background_task_names_callback_hook_and_task(
    run_stack: RunStack, function: Any
) -> None:
    outcome = run_stack(starts("A", function))
    error = outcome.assert_failed()
    assert str(error) == (
        f"callback 'A' failed in hook on_before_init {ON_NODE} (phase: before init): its "
        f"background task {function.__name__!r} raised ValueError: boom{FIX}{ONCE.format('A')}"
    )
    assert type(error.__cause__) is ValueError
    assert calls(outcome)[1] == ("A", function.__name__, "failed")


def test_a_background_task_that_fails_in_a_hook_it_calls_is_named_too() -> None:
    def fails(ctx: CallbackCtx) -> None:
        raise ValueError("boom")

    inner, ctx = make_manager(hooked(fails, "on_before_download")), make_ctx()

    def calls_inner() -> None:
        inner.hook.on_before_download(ctx=ctx)

    text = (
        "callback 'A' failed in hook on_before_init .*: its background task 'calls_inner' raised "
        ".*HookError: callback 'fails' failed in hook on_before_download .*: ValueError: boom"
    )
    with pytest.raises(HookError, match=text):
        run(starts("A", calls_inner), ctx=ctx)


@pytest.mark.usefixtures("_attentive")
def test_a_failed_background_task_ends_the_chain_and_the_other_tasks() -> None:
    ctx = make_ctx()

    async def main() -> None:
        waiting = [asyncio.Event(), asyncio.Event()]
        cleaned = [threading.Event(), threading.Event()]  # set in the callbacks' loop

        async def waits(number: int) -> None:
            waiting[number].set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned[number].set()

        async def fails() -> None:
            for event in waiting:
                await event.wait()
            raise ValueError("boom")

        class Waits:
            async def on_before_init(self, ctx: Any) -> None:
                ctx.run_in_background(waits, 0)
                ctx.run_in_background(fails)
                await waits(1)

        class Never:
            def on_before_init(self, ctx: CallbackCtx) -> None:
                raise AssertionError("started after the failure")

        with pytest.raises(HookError, match="its background task 'fails' raised"):
            await before_init(make_manager(Waits, Never), ctx)
        for event in cleaned:
            assert await asyncio.to_thread(event.wait, FOREVER)

    asyncio.run(main())
    assert [call[0] for call in calls(ctx)] == ["Waits"] * 3


@pytest.mark.usefixtures("_attentive")
def test_a_failed_chain_ends_its_background_tasks() -> None:
    async def main() -> None:
        waiting, cleaned = asyncio.Event(), threading.Event()

        async def waits() -> None:
            waiting.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

        class Fails:
            async def on_before_init(self, ctx: Any) -> None:
                ctx.run_in_background(waits)
                await waiting.wait()
                await until_async(lambda: not recorder_of(ctx).background)  # it has been noticed
                raise ValueError("boom")

        with pytest.raises(HookError, match=r"callback 'Fails' failed .*: ValueError: boom;"):
            await before_init(make_manager(Fails), make_ctx())
        assert await asyncio.to_thread(cleaned.wait, FOREVER)

    asyncio.run(main())


def test_a_task_that_was_started_right_before_the_failure_is_ended_too() -> None:
    async def main() -> None:
        waiting, cleaned = asyncio.Event(), threading.Event()

        async def waits() -> None:
            waiting.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

        class Fails:
            async def on_before_init(self, ctx: Any) -> None:
                ctx.run_in_background(waits)
                await waiting.wait()
                raise ValueError("boom")

        with pytest.raises(HookError, match=r"callback 'Fails' failed .*: ValueError: boom;"):
            await before_init(make_manager(Fails), make_ctx())
        assert await asyncio.to_thread(cleaned.wait, FOREVER)

    asyncio.run(main())


def test_on_error_warn_logs_a_failed_background_task(
    run_stack: RunStack, caplog: pytest.LogCaptureFixture
) -> None:
    with hook_log(caplog):
        outcome = run_stack(starts("A", fetch, on_error="warn")).assert_succeeded()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "its background task 'fetch' raised ValueError: boom" in record.getMessage()
    assert record.getMessage().endswith("(on_error: warn, going on)")
    assert "Traceback (most recent call last):" in caplog.text
    assert calls(outcome) == [("A", "", "returned"), ("A", "fetch", "warned")]


@pytest.mark.parametrize("error", EXITS)
@pytest.mark.parametrize("kind", ["thread", "coroutine"])
def test_an_exit_of_a_background_task_is_a_failure_of_its_callback(
    run_stack: RunStack, error: type[BaseException], kind: str
) -> None:
    def exits() -> None:
        raise error("out")

    async def exits_async() -> None:
        exits()

    task = exits if kind == "thread" else exits_async
    outcome = run_stack(starts("A", task, on_error="warn"))
    outcome.assert_failed(
        rf"^callback 'A' failed in hook on_before_init .*its background task '{task.__name__}' "
        rf"raised .*{error.__name__}: out{ON_EXIT}{ONCE.format('A')}$"
    )
    assert calls(outcome)[1] == ("A", task.__name__, "failed")


def test_awaiting_a_background_task_that_exits_does_not_end_the_loop(run_stack: RunStack) -> None:
    class Waits:
        async def on_before_init(self, ctx: Any) -> None:
            await asyncio.wrap_future(ctx.run_in_background(sys.exit, "out"))

    run_stack(Waits).assert_failed("SystemExit: out", callback="Waits")


@pytest.mark.timeout(FOREVER)
def test_a_background_task_that_raises_stop_iteration_fails_like_any_other(
    run_stack: RunStack,
) -> None:
    def takes_the_next() -> object:
        return next(iter([]))

    text = r"its background task 'takes_the_next' raised .*StopIteration"
    run_stack(starts("A", takes_the_next)).assert_failed(text)


def test_outside_of_a_hook_nothing_can_run_in_the_background() -> None:
    text = r"^ctx.run_in_background\(\) works in hooks only; call it from a hook$"
    with pytest.raises(RuntimeError, match=text):
        make_ctx().run_in_background(fetch)


def test_a_callable_without_a_name_is_named_by_its_class(run_stack: RunStack) -> None:
    class Fetch:
        def __call__(self) -> None:
            pass

    outcome = run_stack(starts("A", Fetch())).assert_succeeded()
    assert calls(outcome)[1] == ("A", "Fetch", "returned")


def test_a_hook_is_called_in_a_thread_and_its_result_returned() -> None:
    def takes(ctx: CallbackCtx) -> Handled:
        assert threading.current_thread() is not threading.main_thread()
        return Handled("/m")

    call = running.call_hook(make_manager(hooked(takes)), "on_before_init", make_ctx())
    assert asyncio.run(call) == Handled("/m")


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("on_before_init", "before init"),
        ("on_before_download", "before download"),
        ("on_after_init", "after init"),
    ],
)
def test_a_hook_is_called_within_its_own_limit(run_stack: RunStack, hook: str, phase: str) -> None:
    outcome = run_stack(Hang(hook, blocking=True), time_limits={hook: 0.05})
    assert str(outcome.assert_failed()).startswith(
        f"callback 'Hang' failed in hook {hook} {ON_NODE} (phase: {phase}): not done after 0.05 s, "
        f"the time limit {hook!r}; "
    )


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("ours", "longest"), [(0.05, 9.0), (9.0, 0.05), (None, 0.05)])
def test_the_lesser_of_two_limits_counts(
    ours: float | None, longest: float, release: threading.Event
) -> None:
    def blocks(ctx: CallbackCtx) -> None:
        release.wait()

    hook = "on_shutdown"
    manager = make_manager(hooked(blocks, hook), time_limits=TimeLimits(on_shutdown=ours))
    with pytest.raises(HookError, match=r"not done after 0\.05 s, the time limit 'on_shutdown'"):
        asyncio.run(running.call_hook(manager, hook, make_ctx(), longest))


async def limited(
    manager: PluginManager, ctx: CallbackCtx, ended: threading.Event | None = None
) -> None:
    """Call the first hook with a time limit; ``ended`` is set when its thread has ended."""

    def chain() -> None:
        try:
            manager.hook.on_before_init(ctx=ctx)
        finally:
            if ended is not None:
                ended.set()

    async with running.time_limit("on_before_init", 0.05, ctx, Phase.BEFORE_INIT):
        await threads.run_in_thread(chain)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("blocking", [True, False])
def test_a_hook_that_hangs_is_given_up_and_named(run_stack: RunStack, blocking: bool) -> None:
    hanging = Hang("on_before_init", blocking=blocking)
    outcome = run_stack(hanging, time_limits={"on_before_init": 0.05})
    error = outcome.assert_failed()
    assert str(error) == (
        f"callback 'Hang' failed in hook on_before_init {ON_NODE} (phase: before init): not done "
        "after 0.05 s, the time limit 'on_before_init'; see what it waits for, or raise the limit "
        f"in time_limits{ONCE.format('Hang')}"
    )
    assert isinstance(error.__cause__, TimeoutError)
    assert calls(outcome) == [("Hang", "", "timed out")]


@pytest.mark.usefixtures("_impatient")
def test_after_a_hook_was_given_up_none_of_its_chain_starts(release: threading.Event) -> None:
    def blocks(ctx: CallbackCtx) -> None:
        release.wait()

    def never(ctx: CallbackCtx) -> None:
        raise AssertionError("started after the time limit")

    ctx, ended = make_ctx(), threading.Event()
    with pytest.raises(HookError, match="callback 'blocks' failed"):
        asyncio.run(limited(make_manager(hooked(blocks), hooked(never)), ctx, ended))
    release.set()
    assert ended.wait(FOREVER)
    assert calls(ctx) == [("blocks", "", "timed out")]


def test_an_async_hook_that_waits_for_ever_is_cancelled() -> None:
    cleaned = threading.Event()

    class Waits:
        async def on_before_init(self, ctx: CallbackCtx) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()

    with pytest.raises(HookError, match=r"not done after 0.05 s, the time limit 'on_before_init'"):
        asyncio.run(limited(make_manager(Waits), make_ctx()))
    assert cleaned.is_set()


@pytest.mark.usefixtures("_impatient")
def test_an_async_hook_that_blocks_its_loop_is_given_up_and_the_next_hook_works(
    release: threading.Event,
) -> None:
    class Blocks:
        async def on_before_init(self, ctx: CallbackCtx) -> None:
            release.wait(FOREVER)

        async def on_init_failed(self, ctx: CallbackCtx) -> None:
            await asyncio.sleep(0)
            ctx.custom_data["cleaned"] = True

    ctx, started = make_ctx(), time.monotonic()
    with pytest.raises(HookError, match=r"callback 'Blocks' failed .*the time limit 'on_before_i"):
        asyncio.run(limited(make_manager(Blocks), ctx))
    assert clean_up(make_manager(Blocks), ctx) == []
    assert ctx.custom_data["cleaned"]
    assert time.monotonic() - started < FOREVER / 3


def test_a_step_without_a_callback_is_given_up_without_naming_one() -> None:
    async def main() -> None:
        async with running.time_limit("download", 0.01, make_ctx(), Phase.DOWNLOAD):
            await asyncio.Event().wait()

    with pytest.raises(HookError) as caught:
        asyncio.run(main())
    assert str(caught.value) == (
        f"node initialization failed {HERE} (phase: download): not done after 0.01 s, the time "
        "limit 'download'; see what it waits for, or raise the limit in time_limits"
    )


def test_a_timeout_of_the_callbacks_own_is_its_failure(run_stack: RunStack) -> None:
    fails = Fail("on_before_init", TimeoutError("the store does not answer"))
    outcome = run_stack(fails, time_limits={"on_before_init": FOREVER})
    outcome.assert_failed("TimeoutError: the store does not answer;", callback="Fail")


def test_a_timeout_of_a_step_is_not_taken_for_the_limit() -> None:
    async def main() -> None:
        async with running.time_limit("download", 60, make_ctx(), Phase.DOWNLOAD):
            raise TimeoutError("the store does not answer")

    with pytest.raises(TimeoutError, match=r"^the store does not answer$"):
        asyncio.run(main())


def test_no_limit_is_none() -> None:
    async def main() -> None:
        async with running.time_limit("download", None, make_ctx(), Phase.DOWNLOAD):
            await asyncio.sleep(0)

    asyncio.run(main())


def cleans(name: str) -> dict[str, Any]:
    class Cleans:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

        def on_init_failed(self, ctx: CallbackCtx) -> None:
            ctx.custom_data.setdefault("cleaned", []).append(name)

    return {"callback": Cleans, "name": name}


def clean_up(manager: PluginManager, ctx: CallbackCtx, *started: str) -> list[HookError]:
    return asyncio.run(running.clean_up(manager, ctx, ValueError("the first failure"), started))


def test_who_had_started_in_this_process_or_another_of_the_node_cleans_up() -> None:
    def takes(ctx: CallbackCtx) -> Handled:
        return Handled()

    manager = make_manager(cleans("here"), hooked(takes), cleans("there"), cleans("idle"))
    ctx = make_ctx()
    manager.hook.on_before_init(ctx=ctx)
    assert clean_up(manager, ctx, "there") == []
    assert ctx.custom_data["cleaned"] == ["there", "here"]


def test_who_had_started_on_another_node_only_does_not_clean_up_here() -> None:
    manager, ctx = make_manager(cleans("A")), make_ctx()
    elsewhere = make_ctx(node=NodeInfo("n2", "10.0.0.2", is_local=False))
    manager.hook.on_before_init(ctx=elsewhere)
    ctx.trace.extend(list(elsewhere.trace))
    clean_up(manager, ctx)
    assert "cleaned" not in ctx.custom_data


@pytest.mark.usefixtures("_impatient")
def test_a_clean_up_that_blocks_for_ever_is_given_up(run_stack: RunStack) -> None:
    stack = [cleans("A"), Hang("on_init_failed", blocking=True), Fail("on_engine_ready")]
    outcome = run_stack(stack, time_limits={"on_init_failed": 0.05})
    (failure,) = outcome.assert_failed(callback="Fail").cleanup_errors
    assert str(failure) == (
        f"callback 'Hang' failed in hook on_init_failed {ON_NODE} (phase: clean-up): not done "
        "after 0.05 s, the time limit 'on_init_failed'; see what it waits for, or raise the limit "
        "in time_limits"
    )
    assert [call.callback for call in outcome.calls(hook="on_init_failed")] == ["Hang"]


@pytest.mark.usefixtures("_impatient")
def test_a_clean_up_after_a_hook_that_was_given_up(run_stack: RunStack) -> None:
    stack = [cleans("A"), Hang("on_before_init", blocking=True)]
    outcome = run_stack(stack, time_limits={"on_before_init": 0.05})
    assert outcome.assert_failed(callback="Hang").cleanup_errors == []
    assert outcome.custom_data["cleaned"] == ["A"]
