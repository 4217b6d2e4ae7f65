"""Run ``async def`` callbacks to completion from pluggy's synchronous call loop.

pluggy hands an async callback's coroutine back un-awaited, and a coroutine counts as a first
result. So the hook chain runs in a worker thread, and a coroutine met there is awaited on the
event loop that started the chain while that thread waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_GIVE_UP_S = 1.0
_running_call: ContextVar[ThreadCall[Any] | None] = ContextVar("running_call", default=None)
_nested: ContextVar[bool] = ContextVar("nested", default=False)  # inside an async callback


class ThreadCall(Generic[T]):
    """A function running in a thread, whose coroutines are awaited on an event loop.

    The thread is a daemon: a callback that hangs for ever must not keep its process from ending.
    ``loop`` is where the coroutines run; None means one loop per process.
    """

    def __init__(
        self, func: Callable[[], T], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self.loop = loop
        self._lock = threading.Lock()
        self._coroutines: set[concurrent.futures.Future[Any]] = set()
        self._given_up = False
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(self._run, func), name="rayserve_hooks-call", daemon=True
        ).start()

    def _run(self, func: Callable[[], T]) -> None:
        _running_call.set(self)
        try:
            self.future.set_result(func())
        except StopIteration as error:  # an asyncio future refuses one, and never ends
            failure = RuntimeError("it raised StopIteration")
            failure.__cause__ = error
            self.future.set_exception(failure)
        except BaseException as error:  # whoever waits for the future gets it
            self.future.set_exception(error)

    def give_up(self) -> None:
        """Stop what can be stopped: its coroutines. A blocked thread can not be."""
        with self._lock:
            self._given_up = True
            coroutines = list(self._coroutines)
        for coroutine in coroutines:
            coroutine.cancel()

    def check(self) -> None:
        """Raise ``CancelledError`` if the call was given up, so that it starts nothing new."""
        if self._given_up:
            raise asyncio.CancelledError("this initialization was given up")

    def wait_for(self, awaitable: Awaitable[R]) -> R | _Raised:
        """Await something of this call, from its thread."""
        with self._lock:
            if self._given_up:
                if inspect.iscoroutine(awaitable):
                    awaitable.close()  # or Python complains that nobody awaited it
                self.check()
            loop = self.loop or process_loop()
            future = asyncio.run_coroutine_threadsafe(_guarded(awaitable), loop)
            self._coroutines.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            # By its own class a hook's error handling would take it for an ordinary error.
            raise asyncio.CancelledError("this initialization was given up") from None
        finally:
            self._coroutines.discard(future)


async def run_in_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``func`` in a thread whose coroutines come back to this event loop."""
    call = ThreadCall(functools.partial(func, *args, **kwargs), asyncio.get_running_loop())
    ended = asyncio.wrap_future(call.future)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        call.give_up()
        # Or Python complains later that nobody asked how it ended.
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([ended], timeout=_GIVE_UP_S)  # for its coroutines to clean up
        raise


def start_in_thread(func: Callable[[], T]) -> ThreadCall[T]:
    """Start ``func`` in a thread of its own, from a hook; its coroutines go where the hook's do."""
    call = _running_call.get()
    return ThreadCall(func, call.loop if call else None)


def check_given_up() -> None:
    """Raise ``CancelledError`` where nobody waits for the running hook chain any more."""
    call = _running_call.get()
    if call is not None:
        call.check()


def run_coroutine(awaitable: Awaitable[T]) -> T:
    """Wait for an awaitable from synchronous code, also from inside a running event loop.

    It runs on the loop of the enclosing `run_in_thread`, otherwise on one loop per process, so
    that a client opened in one hook still works in the next. A hook that an async callback calls
    would wait for a loop that waits for it; its coroutines get a loop of their own.
    """
    inside_loop = False
    with contextlib.suppress(RuntimeError):
        inside_loop = asyncio.get_running_loop() is not None
    call = _running_call.get()
    if inside_loop and _nested.get():
        with concurrent.futures.ThreadPoolExecutor(1, "rayserve_hooks-aio-nested") as thread:
            run = contextvars.copy_context().run
            outcome = thread.submit(run, asyncio.run, _guarded(awaitable)).result()
    elif inside_loop or call is None:
        guarded = _guarded(awaitable)
        outcome = asyncio.run_coroutine_threadsafe(guarded, process_loop()).result()
    else:
        outcome = call.wait_for(awaitable)
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


@dataclasses.dataclass
class _Raised:
    error: BaseException


async def _guarded(awaitable: Awaitable[T]) -> T | _Raised:
    # A SystemExit or KeyboardInterrupt would end the loop's thread before the caller gets it, and
    # a cancellation would reach it as an ordinary concurrent.futures error, which a hook's error
    # handling swallows. So any exception is handed over as a value.
    _nested.set(True)
    try:
        return await awaitable
    except BaseException as error:
        return _Raised(error)


_process_loop_lock = threading.Lock()


def process_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that runs in a thread of its own for as long as the process lives."""
    with _process_loop_lock:
        return _start_process_loop()


@functools.cache
def _start_process_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rayserve_hooks-aio", daemon=True).start()
    return loop
