"""Callbacks that fail, hang, die or take over at will, to be listed beside those under test.

Each takes part in one hook. Its place in the list is when it acts; two of one kind need names:
``{"callback": Fail(...), "name": "second"}``.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import os
import threading
import time
from collections import Counter
from typing import Any

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import threads
from rayserve_hooks.core.hooks import FIRST_RESULT, HOOKS
from rayserve_hooks.errors import did_you_mean
from rayserve_hooks.testing.travel import own_process

_numbers = itertools.count(1)
_acted: Counter[int] = Counter()  # by step: it is built anew in each simulated process
_END_S = 30.0

released = threading.Event()
"""Set when a run has ended: what hangs in a thread goes on then."""


class Step(abc.ABC):
    """A callback that acts in one hook: subclass it, and define `act`.

    Args:
        hook: The hook's name.
        on: Where: a node's id such as ``"node-2"``, or a process such as ``"worker 0"``;
            everywhere by default.
        times: How often, in all processes together; always by default.
    """

    def __init__(self, hook: str, *, on: str | None = None, times: int | None = None) -> None:
        if hook not in HOOKS:
            known = did_you_mean(hook, HOOKS) or f"; use one of {', '.join(HOOKS)}"
            raise ValueError(f"{hook!r} is no hook{known}")
        self.hook, self.on, self.times = hook, on, times
        self._number = next(_numbers)
        setattr(self, hook, self._step)

    def _step(self, ctx: CallbackCtx) -> Any:
        if self.on not in (None, ctx.node.id, str(ctx.process)):
            return None
        _acted[self._number] += 1
        if self.times is not None and _acted[self._number] > self.times:
            return None
        return self.act(ctx)

    @abc.abstractmethod
    def act(self, ctx: CallbackCtx) -> Any:
        """Do it; what is returned is the hook's result."""


class Fail(Step):
    """Raise an error.

    Args:
        hook: The hook's name.
        error: What is raised.
        on: Where; see `Step`.
        times: How often; see `Step`.
    """

    def __init__(
        self,
        hook: str,
        error: BaseException | None = None,
        *,
        on: str | None = None,
        times: int | None = None,
    ) -> None:
        super().__init__(hook, on=on, times=times)
        self.error = error or RuntimeError("failed by the test")

    def act(self, ctx: CallbackCtx) -> None:
        raise self.error


class Hang(Step):
    """Never return: until the hook's time limit, or another node's failure, ends it.

    Args:
        hook: The hook's name.
        on: Where; see `Step`.
        times: How often; see `Step`.
        blocking: Hang in the thread, which nothing can stop, and not in a coroutine, which is
            cancelled. It goes on when the run has ended.
    """

    def __init__(
        self,
        hook: str,
        *,
        on: str | None = None,
        times: int | None = None,
        blocking: bool = False,
    ) -> None:
        super().__init__(hook, on=on, times=times)
        self.blocking = blocking

    def act(self, ctx: CallbackCtx) -> Any:
        if self.blocking:
            released.wait(_END_S)
            return None
        return asyncio.Event().wait()


class Kill(Step):
    """Kill the process, as the kernel does one that needs too much memory.

    That of another node is started again, once. The replica's own process cannot be killed here.

    Args:
        hook: The hook's name.
        on: Where; see `Step`.
        times: How often; see `Step`. Of another node's process two are too many.
    """

    def act(self, ctx: CallbackCtx) -> None:
        process = own_process.get()
        if process is None:
            raise ValueError(
                f"process {str(ctx.process)!r} of node {ctx.node.id!r} runs the test; kill that of "
                "another node, as in Kill('on_before_download', on='node-2')"
            )
        process.die()
        deadline = time.monotonic() + _END_S
        while not threads.given_up() and time.monotonic() < deadline:
            time.sleep(0.0005)
        threads.check_given_up()


class TakeOver(Step):
    """Return a ``Handled``.

    Args:
        hook: ``"on_before_init"`` or ``"on_before_download"``.
        model_path: The model's folder or id.
        reason: Why.
        on: Where; see `Step`.
    """

    def __init__(
        self,
        hook: str = "on_before_download",
        model_path: str | os.PathLike[str] | None = None,
        *,
        reason: str = "",
        on: str | None = None,
    ) -> None:
        super().__init__(hook, on=on)
        if hook not in FIRST_RESULT:
            raise ValueError(f"{hook!r} has no result; use one of {', '.join(FIRST_RESULT)}")
        self.handled = Handled(model_path, reason)

    def act(self, ctx: CallbackCtx) -> Handled:
        return self.handled
