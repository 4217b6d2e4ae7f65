"""One simulated start of a replica: the real path, on a `Cluster` that is simulated."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any
from unittest import mock

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.configure import configured
from rayserve_hooks.cluster.initialize import prepare
from rayserve_hooks.cluster.replica_life import shut_down, started
from rayserve_hooks.cluster.stacks import parse, stack_of
from rayserve_hooks.cluster.supervision import Initialization
from rayserve_hooks.cluster.travel import dumps
from rayserve_hooks.context import LOGGER_NAME, CallbackCtx
from rayserve_hooks.core import loading
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.testing import steps
from rayserve_hooks.testing.cluster import Cluster
from rayserve_hooks.testing.config import ModelConfig
from rayserve_hooks.testing.engine import Engine
from rayserve_hooks.testing.outcome import Outcome
from rayserve_hooks.testing.processes import EngineProcesses
from rayserve_hooks.testing.shared import SharedState
from rayserve_hooks.testing.travel import arrived, sent
from rayserve_hooks.trace import Trace

_numbers = itertools.count(1)
_GRACE_S = 20.0  # as Serve's own


def simulate(
    callbacks: object = (),
    config: Any = None,
    *,
    nodes: int = 1,
    engine_processes: Sequence[str] | None = None,
    engine: Any = None,
    time_limits: Mapping[str, float | None] | None = None,
    on_error: str = "raise",
    installed: Mapping[str, str] | Sequence[str] | bool = False,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a stack from the build of its app to the end of its replica; see `run_stack`."""
    start = _Start(config or ModelConfig(), nodes, engine_processes, engine or Engine())
    steps.released.clear()
    with _isolated(installed, environment or {}), _logged() as log:
        stack = start.parsed(callbacks, time_limits, on_error)
        _in_thread(lambda: start.live(stack))
    return start.outcome(log)


class _Start:
    """A start of a replica, and how far it has come."""

    def __init__(
        self, config: Any, nodes: int, engine_processes: Sequence[str] | None, engine: Any
    ) -> None:
        self._config, self._engine = config, engine
        self._cluster = Cluster(nodes, config, engine_processes)
        self._ctx: CallbackCtx | None = None
        self._error: BaseException | None = None
        self._shared: SharedState | None = None

    def parsed(self, callbacks: object, time_limits: object, on_error: str) -> CallbackStack:
        """Return the stack, checked as where a config is made."""
        if isinstance(self._config, ModelConfig) or callbacks:
            stack = parse(callbacks, time_limits, on_error)
        else:
            stack = stack_of(self._config)
        stack = replace(stack, deployment=f"{self._config.model_id} #{next(_numbers)}")
        self._shared = SharedState(manager_of(stack.here()))
        stack.freeze(dumps)
        return stack

    def live(self, stack: CallbackStack) -> None:
        """Go the whole way: where the app is built, and in the replica."""
        try:
            config = configured(self._config, stack, stack.deployment, self._cluster)
            assert self._cluster.stack is not None
            there = replace(self._cluster.stack, deployment=stack.deployment)
            asyncio.run(self._replica(sent(config), arrived(there)))
        except (Exception, asyncio.CancelledError) as error:
            self._error = error
        finally:
            steps.released.set()

    async def _replica(self, config: Any, stack: CallbackStack) -> None:
        self._config = config
        os.environ.update((config.runtime_env or {}).get("env_vars") or {})
        self._cluster.deploy(config)
        try:
            stack = stack.for_deployment(stack.deployment)
            this = Initialization(config, stack, None, self._cluster)
            self._ctx = this.ctx
            await started(this, self._start_engine(this), lambda: self._engine)
            this.log_ready()
            await shut_down(this, _GRACE_S)
        finally:
            steps.released.set()
            await asyncio.gather(*(process.ended() for process in self._cluster.processes))

    @staticmethod
    async def _start_engine(this: Initialization) -> None:
        """Do what Ray's engine does, which asks its callback first to prepare the nodes."""
        await prepare(this)
        this.begin_engine()
        assert isinstance(this.processes, EngineProcesses)
        await this.processes.start()

    def outcome(self, log: Sequence[str]) -> Outcome:
        return Outcome(
            config=self._config,
            trace=Trace() if self._ctx is None else self._ctx.trace,
            error=self._error,
            ctx=self._ctx,
            engine=self._engine,
            shared=self._shared.changed() if self._shared else (),
            log=log,
        )


def _in_thread(work: Callable[[], None]) -> None:
    """Run a function without an event loop: the test may be on one."""
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, "run_stack") as pool:
        pool.submit(context.run, work).result()


@contextlib.contextmanager
def _isolated(
    installed: Mapping[str, str] | Sequence[str] | bool, environment: Mapping[str, str]
) -> Iterator[None]:
    """Undo what a run does to the environment, and find nothing that is installed but what may be.

    The variables of ``environment`` are set while it runs.
    """
    real = loading.short_names
    found = {} if installed is False else dict(real())
    if isinstance(installed, Mapping):
        found = {
            name: EntryPoint(name, value, loading.ENTRY_POINT_GROUP)
            for name, value in installed.items()
        }
    elif not isinstance(installed, bool):
        missing = sorted(set(installed) - set(found))
        if missing:
            raise ValueError(
                f"nothing is installed as {missing[0]!r}; install it, or give a mapping, as in "
                f"installed={{{missing[0]!r}: 'pkg.module:Class'}}"
            )
        found = {name: found[name] for name in installed}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(loading, "short_names", return_value=found),
        # A real config whose engine part a callback reads must not ask a real cluster for room.
        mock.patch.object(_ray, "in_actor", return_value=True),
    ):
        try:
            yield
        except CallbackConfigError as error:
            named = [name for name in sorted(real()) if repr(name) in str(error)]
            if named and installed is False:
                error.add_note(f"{named[0]!r} is installed; run_stack(installed=True) finds it")
            raise


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """Collect what this package and its callbacks log."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            callback = getattr(record, "callback", None)
            who = f"{callback}: " if callback and record.name != LOGGER_NAME else ""
            lines.append(f"{record.levelname}: {who}{record.getMessage()}")

    logger, handler = logging.getLogger(LOGGER_NAME), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
