"""Run ``async def`` callbacks to completion from pluggy's synchronous call loop.

pluggy hands an async callback's coroutine back un-awaited, and a coroutine counts as a first
result. So the hook chain runs in a worker thread, and a coroutine met there is awaited on the
event loop that started the chain while that thread waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_home_loop: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "rayserve_hooks_home_loop", default=None
)


async def run_in_thread(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``func`` in a thread whose coroutines come back to this event loop."""
    token = _home_loop.set(asyncio.get_running_loop())
    try:
        return await asyncio.to_thread(func, *args, **kwargs)
    finally:
        _home_loop.reset(token)


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for ``coroutine`` from synchronous code, also from inside a running event loop.

    It runs on the loop of the enclosing `run_in_thread`, otherwise on one loop per process, so
    that a client opened in one hook still works in the next. A hook call made by code on that
    very loop would wait for itself; it gets a loop of its own.
    """
    loop = _home_loop.get() or _process_loop()
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not None and running is loop:
        loop = _process_loop()
    if running is not None and running is loop:
        return _on_a_loop_of_its_own(coroutine)
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
    except concurrent.futures.CancelledError:
        # An ordinary Exception, unlike asyncio's: a hook's error handling would swallow it.
        raise asyncio.CancelledError from None


_process_loop_lock = threading.Lock()


def _process_loop() -> asyncio.AbstractEventLoop:
    with _process_loop_lock:
        return _start_process_loop()


@functools.cache
def _start_process_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rayserve_hooks-aio", daemon=True).start()
    return loop


def _on_a_loop_of_its_own(coroutine: Coroutine[Any, Any, T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def target() -> None:
        try:
            results.append(asyncio.run(coroutine))
        except BaseException as error:  # handed to the caller, whatever it is
            failures.append(error)

    thread = threading.Thread(target=target, name="rayserve_hooks-aio-nested")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
