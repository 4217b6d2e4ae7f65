"""One call of one callback: recorded, awaited, checked and, if it fails, blamed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, ParamSpec, TypeVar

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import Blame, settle
from rayserve_hooks.core.hooks import FIRST_RESULT, HOOK_PARAMETERS, REVERSED
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.hookspecs import RayServeLLMCallback

P = ParamSpec("P")
T = TypeVar("T")

_ENDED = object()


def plain_call(
    function: Callable[..., Any], blame: Blame, later: Callable[[], Sequence[str]]
) -> Callable[..., Any]:
    """Return the function that pluggy calls in place of a callback's own.

    ``later`` returns the callbacks that a first result skips.
    """
    callback, hook, taken = blame.callback, blame.hook, _taken(function, blame.hook)

    @_with_parameters_of(hook)
    def call(*args: Any) -> Any:
        threads.check_given_up()
        ctx: CallbackCtx = args[0]
        recorder = recorder_of(ctx)
        entry, outer = recorder.begin(callback, hook)
        outcome = "interrupted"  # stands when the call was given up
        try:
            returned = function(*[args[index] for index in taken])
            result = None if returned is None else _checked(returned, hook)
            if result is None:
                outcome = "returned"
            else:
                outcome = "handled"
                recorder.note_handled(entry, result, blame.kwargs, later())
            return result
        except BaseException as error:  # a SystemExit would end, or hang, what waits for the hook
            if _is_given_up(error):
                raise
            outcome = blame.outcome_of(error)
            return settle(error, ctx, blame, entry)
        finally:
            recorder.end(entry, outer, outcome)

    return call


def wrapper_call(function: Callable[..., Any], blame: Blame) -> Callable[..., Any]:
    """Return the generator function that pluggy calls in place of a wrapper's own."""
    hook, taken = blame.hook, _taken(function, blame.hook)

    @_with_parameters_of(hook)
    def call(*args: Any) -> Generator[None, Any, Any]:
        threads.check_given_up()
        ctx: CallbackCtx = args[0]
        recorder = recorder_of(ctx)
        entry, outer = recorder.begin(blame.callback, hook)
        outcome = "interrupted"
        inner: Any = None
        inner_error: BaseException | None = None
        yielded = False
        try:
            try:
                generator = function(*[args[index] for index in taken])
                if next(generator, _ENDED) is _ENDED:
                    raise RuntimeError("a wrapper must yield once")
                recorder.note_changes(entry)  # what follows is the inner callbacks' doing
                yielded = True
                try:
                    inner = yield
                except BaseException as error:  # the wrapper decides what becomes of it
                    inner_error = error
                result = _resume(generator, inner, inner_error)
                if hook in FIRST_RESULT and result is not None:
                    result = _checked(result, hook)
                outcome = "returned"
                if isinstance(result, Handled) and result is not inner:
                    outcome = "handled"
                    recorder.note_handled(entry, result, blame.kwargs)
                # Of a reversed hook what failed inside is the result, whatever a wrapper returns.
                return (inner or []) if hook in REVERSED else result
            except BaseException as error:  # as above
                if _is_given_up(error):
                    raise
                if error is inner_error:
                    outcome = "returned"
                    raise
                outcome = blame.outcome_of(error)
                failure = settle(error, ctx, blame, entry)
            # A failure that is not raised: go on as if the wrapper were not there.
            if not yielded:
                inner = yield
            if inner_error is not None:
                raise inner_error
            return inner if failure is None else [*inner, failure]
        finally:
            recorder.end(entry, outer, outcome)

    return call


def _is_given_up(error: BaseException) -> bool:
    """Return whether an error is our cancellation of a call, and not one of the callback's own."""
    return threads.is_cancelled(error) and threads.given_up()


def _with_parameters_of(hook: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a function called with all that a hook is, ``ctx`` first.

    pluggy looks through ``__wrapped__`` and would find there the parameters of the innermost
    function under other people's decorators, which need not be what the callback takes.
    """
    return functools.wraps(getattr(RayServeLLMCallback, hook))


def _taken(function: Callable[..., Any], hook: str) -> list[int]:
    """Return which of a hook's arguments a function takes, in its own order."""
    return [HOOK_PARAMETERS[hook].index(name) for name in inspect.signature(function).parameters]


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
    if hook == "on_before_download" and isinstance(result, str | os.PathLike):
        return Handled(model_path=result)
    shown = repr(result) if isinstance(result, bool) else f"a {type(result).__name__}"
    if hook not in FIRST_RESULT:
        raise TypeError(f"returned {shown}; {hook} has no result, return None")
    raise TypeError(
        f"returned {shown}; return Handled(...) to say 'done, skip the rest', or None to go on "
        "with the next callback"
    )
