"""Run callbacks where nothing that they do can end or block the event loop that waits for them.

A hook chain runs in a thread of its own, because pluggy's call loop is synchronous. It hands an
async callback's coroutine back un-awaited, and a coroutine counts as a first result. So a coroutine
met in a chain is awaited on a loop for callbacks alone, while the chain's thread waits for it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from rayserve_hooks.errors import describe

# asyncio takes longer to import than all else here, and only what runs a coroutine needs it.
if TYPE_CHECKING:
    from rayserve_hooks.core.callback_loop import CallbackLoop

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
        self._awaits: dict[Future[Any], CallbackLoop] = {}  # outcomes that it waits for
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
        if is_cancelled(error):
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
            from asyncio import CancelledError

            raise CancelledError("this initialization was given up")

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


async def run_in_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``func`` in a thread, in which coroutines can be awaited by `run_coroutine`."""
    import asyncio

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


def is_cancelled(error: BaseException) -> bool:
    """Return whether an error is asyncio's cancellation, of which there is none without asyncio."""
    return isinstance(error, getattr(sys.modules.get("asyncio"), "CancelledError", ()))


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
        self._loop: CallbackLoop | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[CallbackLoop]:
        """Provide the loop.

        A hook that an async callback calls would wait for a loop that waits for it; its coroutines
        get a loop of their own.
        """
        from rayserve_hooks.core.callback_loop import CallbackLoop, this_thread

        if getattr(this_thread, "is_loop", False):
            loop = CallbackLoop()
            try:
                yield loop
            finally:
                loop.end()
            return
        with self._lock:
            if self._loop is None or not self._loop.usable:
                self._loop = CallbackLoop()
        yield self._loop


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
