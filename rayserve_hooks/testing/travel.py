"""What would travel between processes, and goes by way of bytes here."""

from __future__ import annotations

import itertools
import pickle
from contextvars import ContextVar
from dataclasses import replace
from typing import Protocol, TypeVar

from rayserve_hooks.cluster.travel import dumps
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import RemoteCause, describe

T = TypeVar("T")

_numbers = itertools.count(1)


def sent(value: T) -> T:
    """Return what arrives in another process: a copy, by way of bytes.

    Raises:
        Exception: The value does not travel; each class refuses in its own way.
    """
    arrived: T = pickle.loads(dumps(value))
    return arrived


def sent_error(error: BaseException) -> BaseException:
    """Return an error as it arrives in another process; one that does not travel only as text."""
    try:
        return sent(error)
    except Exception:  # any class can refuse in its own way
        return RemoteCause(describe(error))


def arrived(stack: CallbackStack) -> CallbackStack:
    """Return a stack as it arrives in a new process, where its manager is built anew.

    Its deployment has a name of its own: in a real process it is the only one with this name, and
    here all share one cache of managers.
    """
    stack = sent(stack)
    deployment = stack.deployment.partition(" #")[0]
    return replace(stack, deployment=f"{deployment} #{next(_numbers)}")


class KilledError(Exception):
    """A process was killed by the test."""


class Killable(Protocol):
    """A simulated process that a callback in it can end."""

    def die(self) -> None: ...


own_process: ContextVar[Killable | None] = ContextVar("own_process", default=None)
"""The simulated process in which this code runs; None in the replica's."""
