"""Run ``async def`` callbacks to completion from pluggy's synchronous call loop.

pluggy hands an async callback's coroutine back un-awaited, and a coroutine counts as a first
result. So the hook chain runs in a worker thread, and a coroutine met there is awaited on the
event loop that started the chain while that thread waits for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import dataclasses
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
    that a client opened in one hook still works in the next. A hook that an async callback calls
    would wait for a loop that waits for it; its coroutines get a loop of their own.
    """
    inside_loop = True
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        inside_loop = False
    guarded = _guarded(coroutine)
    if inside_loop and _nested.get():
        outcome = _on_a_loop_of_its_own(guarded)
    else:
        loop = None if inside_loop else _home_loop.get()
        outcome = asyncio.run_coroutine_threadsafe(guarded, loop or _process_loop()).result()
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


_nested: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "rayserve_hooks_nested", default=False
)


@dataclasses.dataclass
class _Raised:
    error: BaseException


async def _guarded(coroutine: Coroutine[Any, Any, T]) -> T | _Raised:
    """Hand any exception over as a value.

    A ``SystemExit`` or ``KeyboardInterrupt`` would end the loop's thread before the caller hears
    of it, and a cancellation would reach it as an ordinary ``concurrent.futures`` error, which
    a hook's error handling swallows.
    """
    _nested.set(True)
    try:
        return await coroutine
    except BaseException as error:
        return _Raised(error)


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
    with concurrent.futures.ThreadPoolExecutor(1, "rayserve_hooks-aio-nested") as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, coroutine).result()
