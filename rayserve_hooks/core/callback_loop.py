"""The event loop of callbacks, which outlives what they do to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

this_thread = threading.local()


class CallbackLoop:
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
        this_thread.is_loop = True
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
