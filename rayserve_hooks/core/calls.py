"""One call of one callback: recorded, awaited, checked and, if it fails, blamed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import settle
from rayserve_hooks.core.hooks import CLEAN_UP, FIRST_RESULT
from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError


@dataclass(frozen=True)
class Call:
    """What is known of the calls of one callback's hook.

    Args:
        function: The callback's own.
        callback: The callback's name.
        hook: The hook's name.
        warns: Whether a failure is only logged.
        kwargs: The callback's constructor arguments; their secrets are kept out of errors.
    """

    function: Callable[..., Any]
    callback: str
    hook: str
    warns: bool
    kwargs: Mapping[str, Any]

    @property
    def ctx_index(self) -> int:
        """Which of the function's arguments is the context."""
        return list(inspect.signature(self.function).parameters).index("ctx")

    def settle(self, error: Exception, ctx: CallbackCtx) -> HookError | None:
        """Raise or log what the function raised; see `rayserve_hooks.core.failures.settle`."""
        return settle(error, ctx, self.callback, self.hook, kwargs=self.kwargs, warns=self.warns)


def plain_call(this: Call) -> Callable[..., Any]:
    """Return the function that pluggy calls in place of a callback's own."""
    function, callback, hook, ctx_index = this.function, this.callback, this.hook, this.ctx_index

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        threads.check_given_up()
        ctx: CallbackCtx = args[ctx_index]
        recorder = recorder_of(ctx)
        entry, outer = recorder.begin(callback, hook)
        outcome = "interrupted"  # stands when what is raised is no Exception
        try:
            returned = function(*args)
            result = None if returned is None else _checked(returned, hook)
            if result is None:
                outcome = "returned"
            else:
                outcome = "handled"
                entry.reason = redact(result.reason, recorder.values)
            return result
        except Exception as error:
            outcome = "warned" if this.warns else "failed"
            return this.settle(error, ctx)
        finally:
            recorder.end(entry, outer, outcome)

    return call


def wrapper_call(this: Call) -> Callable[..., Generator[None, Any, Any]]:
    """Return the generator function that pluggy calls in place of a wrapper's own."""
    ctx_index = this.ctx_index

    @functools.wraps(this.function)
    def call(*args: Any) -> Generator[None, Any, Any]:
        threads.check_given_up()
        ctx: CallbackCtx = args[ctx_index]
        recorder = recorder_of(ctx)
        entry, outer = recorder.begin(this.callback, this.hook)
        outcome = "interrupted"
        inner: Any = None
        inner_error: BaseException | None = None
        yielded = False
        try:
            try:
                generator = this.function(*args)
                _start(generator)
                recorder.note_changes(entry)  # what follows is the inner callbacks' doing
                yielded = True
                try:
                    inner = yield
                except BaseException as error:  # the wrapper decides what becomes of it
                    inner_error = error
                result = _resume(generator, inner, inner_error)
                if this.hook in FIRST_RESULT and result is not None:
                    result = _checked(result, this.hook)
                outcome = "returned"
                # Of a clean-up, what failed inside is the result, whatever a wrapper returns.
                return (inner or []) if this.hook == CLEAN_UP else result
            except Exception as error:
                if error is inner_error:
                    outcome = "returned"
                    raise
                outcome = "warned" if this.warns else "failed"
                failure = this.settle(error, ctx)
            # A failure that is not raised: go on as if the wrapper were not there.
            if not yielded:
                inner = yield
            if inner_error is not None:
                raise inner_error
            return inner if failure is None else [*inner, failure]
        finally:
            recorder.end(entry, outer, outcome)

    return call


def _start(generator: Generator[None, Any, Any]) -> None:
    try:
        next(generator)
    except StopIteration:
        raise RuntimeError("a wrapper must yield once") from None


def _resume(
    generator: Generator[None, Any, Any], inner: object, inner_error: BaseException | None
) -> object:
    try:
        if inner_error is None:
            generator.send(inner)
        else:
            generator.throw(inner_error)
    except StopIteration as stop:
        return stop.value
    generator.close()
    raise RuntimeError("a wrapper must yield once")


def _checked(result: object, hook: str) -> Handled | None:
    """Return what a hook has returned, a coroutine awaited, as a `Handled` or None."""
    if inspect.isawaitable(result):
        result = threads.run_coroutine(result)
    if result is None or (isinstance(result, Handled) and hook in FIRST_RESULT):
        return result
    if hook not in FIRST_RESULT:
        raise TypeError(f"returned {_shown(result)}; {hook} has no result, return None")
    if hook == "on_before_download" and isinstance(result, str | os.PathLike):
        return Handled(model_path=result)
    raise TypeError(
        f"returned {_shown(result)}; return Handled(...) to say 'done, skip the rest', or None "
        "to go on with the next callback"
    )


def _shown(result: object) -> str:
    return repr(result) if isinstance(result, bool) else f"a {type(result).__name__}"
