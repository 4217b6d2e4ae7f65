"""Waiting for what other processes do, where nothing tells of it; elsewhere wait for an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], longest_s: float = 60.0, *, every_s: float = 0.02) -> T:
    """Return what the condition returns, as soon as that is true."""
    deadline = time.monotonic() + longest_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not so within {longest_s} s: {condition}"
        time.sleep(every_s)
    return found


async def until_async(condition: Callable[[], T], longest_s: float = 60.0) -> T:
    """Do as `until`, while the loop goes on; the condition is called in another thread."""
    return await asyncio.to_thread(until, condition, longest_s)
