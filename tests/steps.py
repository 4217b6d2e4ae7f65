"""Small callbacks and the calls of a stack, for the unit tests."""

import asyncio
from collections.abc import Callable, Generator
from typing import Any

from plugins_for_tests import hook_arguments, make_manager

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.hookspecs import hookimpl

Wrapping = Generator[None, Any, Any]


class PanicException(BaseException):
    """No Exception, and none of Python's own."""


EXITS = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, PanicException]
ON_EXIT = "; return, or raise an Exception, for which on_error counts"


def step(
    name: str,
    place: str = "plain",
    *,
    result: object = None,
    error: BaseException | None = None,
    hook: str = "on_before_init",
    on_error: str = "raise",
) -> dict[str, object]:
    """Make a callback that logs its name, then raises or returns."""

    def run(self: object, ctx: CallbackCtx) -> object:
        ctx.custom_data.setdefault("log", []).append(name)
        if error is not None:
            raise error
        return result

    if place != "plain":
        run = hookimpl(run, tryfirst=place == "first", trylast=place == "last")
    return {"callback": type(name, (), {hook: run}), "name": name, "on_error": on_error}


def wrapper(name: str, place: str = "plain", hook: str = "on_before_init") -> dict[str, object]:
    """Make a wrapper that logs its name on the way in and out, and passes the result on."""

    @hookimpl(wrapper=True, tryfirst=place == "first", trylast=place == "last")
    def run(self: object, ctx: CallbackCtx) -> Wrapping:
        ctx.custom_data.setdefault("log", []).append(name)
        try:
            return (yield)
        finally:
            ctx.custom_data["log"].append(f"/{name}")

    return {"callback": type(name, (), {hook: run}), "name": name}


def wraps(
    run: Callable[[CallbackCtx], Wrapping], hook: str = "on_before_init", on_error: str = "raise"
) -> dict[str, object]:
    """Make a wrapper callback named W of a generator function."""

    @hookimpl(wrapper=True)
    def method(self: object, ctx: CallbackCtx) -> Wrapping:
        return (yield from run(ctx))

    return {"callback": type("W", (), {hook: method}), "name": "W", "on_error": on_error}


def passes_on(ctx: CallbackCtx) -> Wrapping:
    return (yield)


def returns_true(ctx: CallbackCtx) -> Wrapping:
    yield
    return True


def fails_before(ctx: CallbackCtx) -> Wrapping:
    if ctx is not None:
        raise ValueError("before")
    return (yield)


def fails_after(ctx: CallbackCtx) -> Wrapping:
    yield
    raise ValueError("after")


def never_yields(ctx: CallbackCtx) -> Wrapping:
    if ctx is None:
        yield
    return None


def yields_twice(ctx: CallbackCtx) -> Wrapping:
    yield
    yield


def cleans(
    name: str,
    place: str = "plain",
    *,
    error: BaseException | None = None,
    started: bool = True,
    on_error: str = "raise",
) -> dict[str, object]:
    """Make a callback that logs its name in the clean-up; ``started`` gives it another hook."""
    made: Any = step(name, place, error=error, hook=CLEAN_UP, on_error=on_error)
    if started:
        made["callback"].on_before_init = lambda self, ctx: None
    return made  # type: ignore[no-any-return]


def call(*callbacks: object, ctx: CallbackCtx | None = None, hook: str = "on_before_init") -> Any:
    return getattr(make_manager(*callbacks).hook, hook)(**hook_arguments(hook, ctx))


def outcomes(ctx: CallbackCtx) -> list[tuple[str, str]]:
    return [(entry.callback, entry.outcome) for entry in ctx.trace]
