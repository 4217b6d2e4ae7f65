import asyncio
import contextvars
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from typing import Any
from unittest import mock

import pytest
from plugins_for_tests import make_ctx, make_manager, run_script
from steps import EXITS

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import callback_loop, threads
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.threads import EscapedError, ThreadCall, run_coroutine, run_in_thread
from rayserve_hooks.errors import HookError

log: contextvars.ContextVar[list[str]] = contextvars.ContextVar("log")


class Sync:
    def __init__(self, name: str) -> None:
        self.name = name

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["log"].append(self.name)


class Async:
    def __init__(self, name: str) -> None:
        self.name = name

    async def on_after_init(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)
        ctx.custom_data["log"].append(self.name)


class AsyncHandled:
    async def on_before_init(self, ctx: CallbackCtx) -> Handled:
        await asyncio.sleep(0)
        return Handled("/m")


class LoopSeen:
    """Keeps the loop and thread its async hooks ran on."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.threads: list[threading.Thread] = []

    async def on_before_init(self, ctx: CallbackCtx) -> None:
        self.loops.append(asyncio.get_running_loop())
        self.threads.append(threading.current_thread())


class Fails:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def on_before_init(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)
        raise self.error


def call_directly(manager: PluginManager, hook: str, ctx: CallbackCtx) -> Any:
    return getattr(manager.hook, hook)(ctx=ctx)


def call_in_thread(manager: PluginManager, hook: str, ctx: CallbackCtx) -> Any:
    async def main() -> Any:
        return await run_in_thread(getattr(manager.hook, hook), ctx=ctx)

    return asyncio.run(main())


def call_inside_a_loop(manager: PluginManager, hook: str, ctx: CallbackCtx) -> Any:
    async def main() -> Any:
        return getattr(manager.hook, hook)(ctx=ctx)

    return asyncio.run(main())


def call_from_an_async_callback(manager: PluginManager, hook: str, ctx: CallbackCtx) -> Any:
    results = []

    class Calls:
        async def on_before_download(self, ctx: CallbackCtx) -> None:
            results.append(getattr(manager.hook, hook)(ctx=ctx))

    call_in_thread(make_manager(Calls), "on_before_download", ctx)
    return results[0]


def call_from_an_async_callback_without_a_loop(
    manager: PluginManager, hook: str, ctx: CallbackCtx
) -> Any:
    results = []

    class Calls:
        async def on_before_download(self, ctx: CallbackCtx) -> None:
            results.append(getattr(manager.hook, hook)(ctx=ctx))

    make_manager(Calls).hook.on_before_download(ctx=ctx)
    return results[0]


every_way = pytest.mark.parametrize(
    "call",
    [
        call_directly,
        call_in_thread,
        call_inside_a_loop,
        call_from_an_async_callback,
        call_from_an_async_callback_without_a_loop,
    ],
)
Call = Callable[[PluginManager, str, CallbackCtx], Any]


@every_way
def test_sync_and_async_callbacks_run_in_list_order(call: Call) -> None:
    kinds = [Async, Sync, Sync, Async, Async, Sync]
    manager = make_manager(
        *({"callback": kind(str(i)), "name": str(i)} for i, kind in enumerate(kinds))
    )
    ctx = make_ctx(custom_data={"log": []})
    call(manager, "on_after_init", ctx)
    assert ctx.custom_data["log"] == ["0", "1", "2", "3", "4", "5"]


@every_way
def test_an_async_result_is_never_a_bare_coroutine(call: Call) -> None:
    assert call(make_manager(AsyncHandled), "on_before_init", make_ctx()) == Handled("/m")


@every_way
def test_an_async_none_goes_on_with_the_next(call: Call) -> None:
    manager = make_manager(LoopSeen, AsyncHandled)
    assert call(manager, "on_before_init", make_ctx()) == Handled("/m")


@every_way
def test_an_async_result_ends_the_chain(call: Call) -> None:
    after = LoopSeen()
    call(make_manager(AsyncHandled, after), "on_before_init", make_ctx())
    assert not after.loops


@every_way
def test_an_exception_of_an_async_callback_comes_through(call: Call) -> None:
    manager = make_manager(Fails(ValueError("boom")))
    with pytest.raises(HookError, match="ValueError: boom") as caught:
        call(manager, "on_before_init", make_ctx())
    root = caught.value
    while isinstance(root.__cause__, HookError):
        root = root.__cause__
    assert type(root.__cause__) is ValueError


@every_way
@pytest.mark.parametrize("error", EXITS)
def test_an_exit_of_an_async_callback_is_its_failure(
    call: Call, error: type[BaseException]
) -> None:
    ctx, after = make_ctx(), LoopSeen()
    manager = make_manager(Fails(error("out")), after, on_error="warn")
    with pytest.raises(HookError, match=rf"callback 'Fails' failed .*{error.__name__}: out"):
        call(manager, "on_before_init", ctx)
    assert [entry.outcome for entry in ctx.trace if entry.callback == "Fails"] == ["failed"]
    assert not after.loops


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def cancels_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()
    await asyncio.Event().wait()


async def lets_a_task_exit() -> None:
    async def exits() -> None:
        sys.exit("out")

    task = asyncio.create_task(exits())
    await asyncio.Event().wait()
    await task


async def exits_in_a_callback_of_the_loop() -> None:
    asyncio.get_running_loop().call_soon(sys.exit, "out")
    await asyncio.Event().wait()


async def closes_its_loop() -> None:
    asyncio.get_running_loop().close()


async def breaks_its_loop() -> None:
    loop: Any = asyncio.get_running_loop()
    loop._selector.select = mock.Mock(side_effect=OSError("bad file descriptor"))
    await asyncio.Event().wait()


@every_way
@pytest.mark.parametrize(
    ("breaks", "text"),
    [
        (cancels_itself, "CancelledError"),
        (cancels_all, "CancelledError"),
        (lets_a_task_exit, "SystemExit: out"),
        (exits_in_a_callback_of_the_loop, "SystemExit: out"),
        (closes_its_loop, "RuntimeError: Cannot close a running event loop"),
        (breaks_its_loop, "OSError: bad file descriptor"),
    ],
)
def test_what_a_callback_does_to_its_loop_is_its_failure_and_the_next_works(
    call: Call, breaks: Callable[[], Awaitable[None]], text: str
) -> None:
    class Breaks:
        async def on_before_init(self, ctx: CallbackCtx) -> None:
            await breaks()

    with pytest.raises(HookError, match=rf"callback 'Breaks' failed in hook .*{text}"):
        call(make_manager(Breaks), "on_before_init", make_ctx())
    assert call(make_manager(AsyncHandled), "on_before_init", make_ctx()) == Handled("/m")


@every_way
def test_a_callback_that_stops_its_loop_goes_on(call: Call) -> None:
    class Stops:
        async def on_before_init(self, ctx: CallbackCtx) -> Handled:
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)
            return Handled("/m")

    assert call(make_manager(Stops), "on_before_init", make_ctx()) == Handled("/m")


def test_an_exit_that_strikes_a_thread_late_is_an_ordinary_error() -> None:
    with pytest.raises(EscapedError, match=r"^SystemExit: out$") as caught:
        asyncio.run(run_in_thread(sys.exit, "out"))
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_cancelling_the_caller_is_not_swallowed(on_error: str) -> None:
    after = LoopSeen()
    ctx = make_ctx()

    async def main() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        class Waits:
            async def on_before_init(self, ctx: CallbackCtx) -> None:
                loop.call_soon_threadsafe(started.set)
                await asyncio.Event().wait()

        manager = make_manager(Waits, after, on_error=on_error)
        call = asyncio.create_task(run_in_thread(manager.hook.on_before_init, ctx=ctx))
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert [entry.outcome for entry in ctx.trace] == ["interrupted"]
    assert not after.loops


GIVEN_UP = "^this initialization was given up$"


def test_a_chain_whose_wait_was_cancelled_starts_no_further_callback() -> None:
    after, release, ended = LoopSeen(), threading.Event(), threading.Event()
    errors: list[BaseException] = []
    ctx = make_ctx()

    async def main() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        class Blocks:
            def on_before_init(self, ctx: CallbackCtx) -> None:
                loop.call_soon_threadsafe(started.set)
                release.wait(10)

        manager = make_manager(Blocks, after)

        def chain() -> None:
            try:
                manager.hook.on_before_init(ctx=ctx)
            except BaseException as error:
                errors.append(error)
            ended.set()

        call = asyncio.create_task(run_in_thread(chain))
        await started.wait()
        call.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert ended.wait(10)
    assert [entry.callback for entry in ctx.trace] == ["Blocks"]
    assert not after.loops
    with pytest.raises(asyncio.CancelledError, match=GIVEN_UP):
        raise errors[0]


def test_a_loop_that_may_be_blocked_is_used_by_no_other_call() -> None:
    began, release = threading.Event(), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def blocks() -> None:
        began.set()
        release.wait(10)

    async def loop() -> None:
        loops.append(asyncio.get_running_loop())

    blocked = ThreadCall(lambda: run_coroutine(blocks()))
    assert began.wait(10)
    blocked.give_up()
    ThreadCall(lambda: run_coroutine(loop())).future.result(5)
    release.set()
    with pytest.raises(asyncio.CancelledError, match=GIVEN_UP):
        blocked.future.result(10)
    ThreadCall(lambda: run_coroutine(loop())).future.result(5)
    assert loops[0] is loops[1]


def test_what_is_given_up_before_it_begins_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    async def begins() -> None:
        begun.append("it")

    start = callback_loop.CallbackLoop.start

    def given_up_meanwhile(loop: Any, awaitable: Any, outcome: Any) -> None:
        call.give_up()
        start(loop, awaitable, outcome)

    made = threading.Event()

    def waits() -> None:
        assert made.wait(10)
        run_coroutine(begins())

    monkeypatch.setattr(callback_loop.CallbackLoop, "start", given_up_meanwhile)
    monkeypatch.setattr(threads, "_GIVE_UP_S", 60)
    call = ThreadCall(waits)
    made.set()
    with pytest.raises(asyncio.CancelledError, match=GIVEN_UP):
        call.future.result(10)
    assert not begun


def test_a_call_runs_in_a_daemon_thread_so_that_its_process_can_end() -> None:
    assert ThreadCall(lambda: threading.current_thread().daemon).future.result(10)


def test_a_process_ends_while_a_callback_hangs() -> None:
    script = """
        import asyncio, threading
        from rayserve_hooks.core import threads

        started = threading.Event()

        def hangs():
            started.set()
            threading.Event().wait()

        threads.ThreadCall(hangs)
        started.wait()
        print("ends")
    """
    assert run_script(script) == "ends"


def test_giving_up_cancels_the_coroutine_that_a_call_waits_for() -> None:
    waiting, cleaned = threading.Event(), threading.Event()

    async def waits() -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    call = ThreadCall(lambda: run_coroutine(waits()))
    assert waiting.wait(10)
    call.give_up()
    # Python raises it as an error of concurrent.futures where it leaves the thread.
    with pytest.raises((asyncio.CancelledError, CancelledError)):
        call.future.result(10)
    assert cleaned.wait(10)


def test_a_call_that_was_given_up_waits_for_no_coroutine() -> None:
    given_up = threading.Event()

    def chain() -> None:
        assert given_up.wait(10)
        run_coroutine(asyncio.Event().wait())

    call = ThreadCall(chain)
    call.give_up()
    given_up.set()
    with pytest.raises((asyncio.CancelledError, CancelledError)):
        call.future.result(10)


def test_async_callbacks_do_not_run_on_the_loop_that_waits_for_them() -> None:
    seen = LoopSeen()
    manager = make_manager(seen)

    async def main() -> asyncio.AbstractEventLoop:
        await run_in_thread(manager.hook.on_before_init, ctx=make_ctx())
        return asyncio.get_running_loop()

    assert seen.loops != [asyncio.run(main())]
    assert seen.threads != [threading.main_thread()]


def test_run_in_thread_keeps_the_loop_free_while_a_sync_callback_blocks() -> None:
    release = threading.Event()

    class Blocks:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            assert release.wait(10)

    async def main() -> None:
        call = asyncio.create_task(
            run_in_thread(make_manager(Blocks).hook.on_before_init, ctx=make_ctx())
        )
        await asyncio.sleep(0)
        assert not call.done()
        release.set()
        await call

    asyncio.run(main())


def test_run_in_thread_passes_arguments_and_result() -> None:
    def divide(a: int, *, by: int) -> float:
        return a / by

    assert asyncio.run(run_in_thread(divide, 6, by=4)) == 1.5


def test_run_in_thread_passes_exceptions() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run_in_thread(lambda: 1 / 0))


def test_without_a_loop_all_calls_share_one() -> None:
    seen = LoopSeen()
    manager = make_manager(seen)
    manager.hook.on_before_init(ctx=make_ctx())
    manager.hook.on_before_init(ctx=make_ctx())
    assert seen.loops[0] is seen.loops[1]
    assert seen.threads[0] is not threading.main_thread()


def test_concurrent_chains_on_one_loop_do_not_mix() -> None:
    manager = make_manager(AsyncHandled)

    async def main() -> list[Handled]:
        calls = (run_in_thread(manager.hook.on_before_init, ctx=make_ctx()) for _ in range(8))
        return list(await asyncio.gather(*calls))

    assert asyncio.run(main()) == [Handled("/m")] * 8


def test_context_variables_reach_async_callbacks() -> None:
    class Logs:
        async def on_before_init(self, ctx: CallbackCtx) -> None:
            log.get().append("seen")

    async def main() -> list[str]:
        log.set([])
        await run_in_thread(make_manager(Logs).hook.on_before_init, ctx=make_ctx())
        return log.get()

    assert asyncio.run(main()) == ["seen"]


def test_inside_an_async_callback_the_context_names_it() -> None:
    class Typo:
        async def on_before_init(self, ctx: CallbackCtx) -> None:
            await asyncio.sleep(0)
            ctx.runtime_envs = {}  # type: ignore[attr-defined]

    with pytest.raises(HookError, match="callback 'Typo': CallbackCtx has no field"):
        make_manager(Typo).hook.on_before_init(ctx=make_ctx())


def test_an_awaitable_that_is_no_coroutine_is_awaited_too() -> None:
    class Lazy:
        def __await__(self) -> Any:
            return asyncio.sleep(0, Handled("/m")).__await__()

    class Returns:
        def on_before_init(self, ctx: CallbackCtx) -> Awaitable[Handled]:
            return Lazy()

    assert make_manager(Returns).hook.on_before_init(ctx=make_ctx()) == Handled("/m")


def test_run_coroutine_gives_the_result() -> None:
    assert run_coroutine(asyncio.sleep(0, "done")) == "done"


# In processes of their own: what goes wrong here hangs, and would hang the tests that follow.

NESTED = """
    import asyncio
    from plugins_for_tests import make_ctx, make_manager
    from rayserve_hooks.core.threads import run_in_thread
    from rayserve_hooks.context import Handled

    class Inmost:
        async def on_before_init(self, ctx):
            return Handled("/m")

    inmost = make_manager(Inmost)

    class Middle:
        async def on_before_init(self, ctx):
            return inmost.hook.on_before_init(ctx=ctx)

    middle = make_manager(Middle)

    class Outermost:
        async def on_before_init(self, ctx):
            return middle.hook.on_before_init(ctx=ctx)

    outermost = make_manager(Outermost)
"""


def test_async_callbacks_call_hooks_three_deep_without_a_loop() -> None:
    script = NESTED + "\n    print(outermost.hook.on_before_init(ctx=make_ctx()).model_path)"
    assert run_script(script) == "/m"


def test_async_callbacks_call_hooks_three_deep_on_a_loop() -> None:
    script = NESTED + (
        "\n    call = run_in_thread(outermost.hook.on_before_init, ctx=make_ctx())"
        "\n    print(asyncio.run(call).model_path)"
    )
    assert run_script(script) == "/m"
