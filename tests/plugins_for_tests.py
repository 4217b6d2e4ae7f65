"""Importable callbacks and small helpers for the unit tests."""

import contextlib
import dataclasses
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, TypeVar
from unittest import mock

import pytest

from rayserve_hooks.context import LOGGER_NAME, CallbackCtx, NodeInfo
from rayserve_hooks.core.hooks import HOOK_PARAMETERS
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.stack import CallbackEntry, CallbackStack
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.hookspecs import hookimpl

T = TypeVar("T")


def make_ctx(**fields: Any) -> CallbackCtx:
    llm_config: Any = object()
    fields.setdefault("node", NodeInfo("n1", "10.0.0.1", is_local=True))
    return CallbackCtx(llm_config=llm_config, **fields)


def hook_arguments(hook: str, ctx: CallbackCtx | None = None) -> dict[str, Any]:
    """Return what a hook is called with."""
    arguments = {"ctx": ctx or make_ctx(), "error": ValueError("the first failure")}
    return {name: arguments[name] for name in HOOK_PARAMETERS[hook]}


def make_manager(
    *callbacks: object, on_error: str = "raise", time_limits: TimeLimits | None = None
) -> PluginManager:
    return PluginManager(make_stack(*callbacks, on_error=on_error, time_limits=time_limits))


def make_stack(
    *callbacks: object, on_error: str = "raise", time_limits: TimeLimits | None = None
) -> CallbackStack:
    stack = CallbackStack.parse(list(callbacks), on_error=on_error)
    limits = time_limits or TimeLimits()
    return dataclasses.replace(stack, deployment="app", time_limits=limits)


def parse_callbacks(callbacks: object) -> tuple[CallbackEntry, ...]:
    return CallbackStack.parse(callbacks).entries


def one(callback: object) -> CallbackEntry:
    """Return the entry of a list of one."""
    (entry,) = parse_callbacks([callback])
    return entry


def sent(value: T) -> T:
    """Return what arrives in another process."""
    copy: T = pickle.loads(pickle.dumps(value))
    return copy


def refused(text: str) -> Any:
    """Expect a `CallbackConfigError` whose text starts with ``text``."""
    return pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}")


@contextlib.contextmanager
def hook_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Capture our log alone: once Ray is imported, its loggers do not propagate to the root."""
    logger = logging.getLogger(LOGGER_NAME)
    with caplog.at_level(logging.DEBUG, LOGGER_NAME), mock.patch.object(logger, "propagate", False):
        logger.addHandler(caplog.handler)
        try:
            yield
        finally:
            logger.removeHandler(caplog.handler)


def run_script(script: str, *arguments: str, timeout_s: float = 10) -> str:
    """Run Python code in a process of its own, which may import this module."""
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Plain:
    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["greeting"] = self.greeting


class Strict:
    def __init__(self, *, limit: int) -> None:
        if limit < 0:
            raise ValueError("limit must not be negative")

    @hookimpl(tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


class Outer:
    class Inner:
        def on_after_init(self, ctx: CallbackCtx) -> None:
            pass


ready_made = Plain("ready")
