"""Run callbacks where nothing that they do can end or block the event loop that waits for them.

A hook chain runs in a thread of its own, because pluggy's call loop is synchronous. It hands an
async callback's coroutine back un-awaited, and a coroutine counts as a first result. So a coroutine
met in a chain is awaited on a loop for callbacks alone, while the chain's thread waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future
from contextvars import ContextVar
from typing import Any, Generic, ParamSpec, TypeVar

from rayserve_hooks.errors import describe

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

_GIVE_UP_S = 1.0
_running_call: ContextVar[ThreadCall[Any] | None] = ContextVar("running_call", default=None)


class EscapedError(RuntimeError):
    """Carries, as its cause, what an event loop does not: ``SystemExit`` would end the loop."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(describe(error))
        self.__cause__ = error


class ThreadCall(Generic[T]):
    """A function running in a thread, whose coroutines are awaited on the callbacks' loop.

    The thread is a daemon: a callback that hangs for ever must not keep its process from ending.
    """

    def __init__(self, func: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._given_up: Future[None] = Future()
        self._awaits: dict[Future[Any], _CallbackLoop] = {}  # outcomes that it waits for
        context = contextvars.copy_context()
        threading.Thread(
            target=context.run, args=(self._run, func), name="rayserve_hooks-call", daemon=True
        ).start()

    def _run(self, func: Callable[[], T]) -> None:
        _running_call.set(self)
        try:
            self.future.set_result(func())
        except BaseException as error:  # whoever waits for the future gets it
            self.future.set_exception(error if self._travels(error) else EscapedError(error))

    def _travels(self, error: BaseException) -> bool:
        """Return whether who awaits the call may get an error as it is.

        An asyncio future refuses a ``StopIteration``, and never ends.
        """
        if isinstance(error, asyncio.CancelledError):
            return self.given_up
        return isinstance(error, Exception) and not isinstance(error, StopIteration)

    @property
    def given_up(self) -> bool:
        return self._given_up.done()

    def give_up(self) -> None:
        """Stop what can be stopped: its coroutines. A blocked thread can not be."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # given up twice
            self._given_up.set_result(None)
        # Here, not where it is waited for: what starts next must know that the loop may be blocked.
        for outcome, loop in list(self._awaits.items()):
            loop.cancel(outcome)

    def check(self) -> None:
        """Raise ``CancelledError`` if the call was given up, so that it starts nothing new."""
        if self.given_up:
            raise asyncio.CancelledError("this initialization was given up")

    def wait_for(self, awaitable: Awaitable[R], on: SharedLoop) -> R:
        """Await something of this call, from its thread."""
        if self.given_up and inspect.iscoroutine(awaitable):
            awaitable.close()  # or Python complains that nobody awaited it
        self.check()
        with on.running() as loop:
            outcome: Future[R] = Future()
            self._awaits[outcome] = loop
            loop.start(awaitable, outcome)
            either: list[Future[Any]] = [outcome, self._given_up]
            concurrent.futures.wait(either, return_when=FIRST_COMPLETED)
            if self.given_up:
                loop.cancel(outcome)  # if it was given up just before
                concurrent.futures.wait([outcome], timeout=_GIVE_UP_S)  # for it to clean up
                self.check()
            del self._awaits[outcome]
            return outcome.result()


class _CallbackLoop:
    """An event loop for callbacks, in a daemon thread.

    One that a callback stops goes on.
    """

    def __init__(self) -> None:
        self._works = True
        self._cancelled: list[Future[Any]] = []
        self._ending = False
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._tasks: dict[Future[Any], asyncio.Task[None] | None] = {}  # by their outcome
        threading.Thread(target=self._run, name="rayserve_hooks-aio", daemon=True).start()

    @property
    def usable(self) -> bool:
        """False once a callback has broken it, and while one that was cancelled may block it."""
        return self._works and all(outcome.done() for outcome in self._cancelled)

    def start(self, awaitable: Awaitable[T], outcome: Future[T]) -> None:
        """Start to await something, whose outcome is to be set.

        What it raises is an outcome too: by itself a ``SystemExit`` would end the loop's thread.
        """
        with self._lock:
            self._tasks[outcome] = None
            try:
                self._loop.call_soon_threadsafe(self._begin, awaitable, outcome)
            except RuntimeError as error:  # it has been closed
                _resolve(outcome, error=error)

    def _begin(self, awaitable: Awaitable[T], outcome: Future[T]) -> None:
        if outcome in self._cancelled:  # a task that has not begun would set no outcome
            del self._tasks[outcome]
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            _resolve(outcome, error=asyncio.CancelledError())
            return
        task = self._tasks[outcome] = self._loop.create_task(_awaited(awaitable, outcome))
        task.add_done_callback(lambda _: self._tasks.pop(outcome, None))

    def cancel(self, outcome: Future[Any]) -> None:
        """Cancel, once, what leads to an outcome."""
        with self._lock:
            if outcome in self._cancelled:
                return
            self._cancelled = [other for other in self._cancelled if not other.done()]
            self._cancelled.append(outcome)
            with contextlib.suppress(RuntimeError):  # it has been closed
                self._loop.call_soon_threadsafe(self._cancel, outcome)

    def _cancel(self, outcome: Future[Any]) -> None:
        task = self._tasks.get(outcome)
        if task is not None:
            task.cancel()

    def end(self) -> None:
        """End the thread; nothing waits for an outcome any more."""
        self._ending = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        _this_thread.is_loop = True
        while self._works and not self._ending:
            try:
                self._loop.run_forever()  # it returns where a callback stops it
            except BaseException as error:
                # A SystemExit is of a task that a callback has made, and the loop can go on;
                # anything else is the loop's own, such as a closed file descriptor.
                if isinstance(error, Exception):
                    self._works = False
                self._fail(error)
        with self._lock:
            self._works = False
            self._fail(RuntimeError("its event loop was closed"))
            with contextlib.suppress(Exception):  # what it would close, a callback has closed
                self._loop.close()

    def _fail(self, error: BaseException) -> None:
        for outcome, task in list(self._tasks.items()):
            _resolve(outcome, error=error)
            if task is not None and not self._loop.is_closed():
                task.cancel()


async def _awaited(awaitable: Awaitable[T], outcome: Future[T]) -> None:
    try:
        _resolve(outcome, await awaitable)
    except BaseException as error:
        _resolve(outcome, error=error)


def _resolve(
    outcome: Future[Any], result: object = None, error: BaseException | None = None
) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # the loop has failed before
        if error is None:
            outcome.set_result(result)
        else:
            outcome.set_exception(error)


async def run_in_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``func`` in a thread, in which coroutines can be awaited by `run_coroutine`."""
    call = ThreadCall(functools.partial(func, *args, **kwargs))
    ended = asyncio.wrap_future(call.future)
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        call.give_up()
        # Or Python complains later that nobody asked how it ended.
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([ended], timeout=_GIVE_UP_S)  # for its coroutines to clean up
        raise


def given_up() -> bool:
    """Return whether nobody waits for the running hook chain any more."""
    call = _running_call.get()
    return call is not None and call.given_up


def check_given_up() -> None:
    """Raise ``CancelledError`` where nobody waits for the running hook chain any more."""
    call = _running_call.get()
    if call is not None:
        call.check()


class SharedLoop:
    """A loop of this process, made at its first use and replaced when a callback has broken it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: _CallbackLoop | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[_CallbackLoop]:
        """Provide the loop.

        A hook that an async callback calls would wait for a loop that waits for it; its coroutines
        get a loop of their own.
        """
        if getattr(_this_thread, "is_loop", False):
            loop = _CallbackLoop()
            try:
                yield loop
            finally:
                loop.end()
            return
        with self._lock:
            if self._loop is None or not self._loop.usable:
                self._loop = _CallbackLoop()
        yield self._loop


_this_thread = threading.local()
_callbacks_loop = SharedLoop()


def run_coroutine(awaitable: Awaitable[T], on: SharedLoop = _callbacks_loop) -> T:
    """Wait for an awaitable from synchronous code, also from inside a running event loop.

    It runs on one loop per process, so that a client opened in one hook still works in the next.
    """
    call = _running_call.get()
    if call is not None:
        return call.wait_for(awaitable, on)
    outcome: Future[T] = Future()
    with on.running() as loop:
        loop.start(awaitable, outcome)
        return outcome.result()
