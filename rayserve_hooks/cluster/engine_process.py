"""The hooks in one process of the engine, which vLLM has started: run once, and reported."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import replace

from rayserve_hooks.cluster import _ray, _vllm
from rayserve_hooks.cluster.engine_folder import EngineFolder, Report, ReportFile, on_node
from rayserve_hooks.cluster.travel import EngineRequest, engine_context_of
from rayserve_hooks.cluster.vllm_plugin import MARK
from rayserve_hooks.context import CallbackCtx, ProcessInfo
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.hooks import ENGINE_PROCESS
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.manager import PluginManager, manager_of
from rayserve_hooks.core.running import call_hook, with_background
from rayserve_hooks.errors import HookError, Phase, describe, raise_from


def run_hooks_here(mark: str) -> None:
    """Run the hooks of the start with this mark, unless this process is none of its engine.

    Raises:
        HookError: A callback has failed, or the start has left nothing on this node.
    """
    process = _vllm.this_process()
    if process is None:
        return
    # The mark that it has got may be that of the replica's node; its own children get this one.
    mark = os.environ[MARK] = on_node(mark, _ray.connected_node())
    try:
        folder = EngineFolder.find(mark)
    except OSError as error:
        raise _not_prepared(process, error) from error
    try:
        file = folder.report()
    except FileExistsError:  # this process has run them
        return
    with contextlib.closing(folder), contextlib.closing(file):
        _run(folder, file, process)


def _run(folder: EngineFolder, file: ReportFile, process: ProcessInfo) -> None:
    request = folder.request()
    assert isinstance(request, tuple)
    node, data = request
    _log_somewhere()
    this = _Process(file, Report(node, process))
    this.tell()
    call = threads.ThreadCall(lambda: this.run(data))
    try:
        call.future.result()
    except Exception as error:
        failure = this.failure_of(error)
        this.end(failure)
        raise_from(failure, failure.__cause__)
    except BaseException:  # of a signal: vLLM stops this process because another one has failed
        call.give_up()
        this.end()
        raise
    this.end()


_managers: list[PluginManager] = []  # of this process: what callbacks keep lives as long


class _Process:
    """The process that runs this, and what it has reported."""

    def __init__(self, file: ReportFile, report: Report) -> None:
        self._file, self._report = file, report
        self._ctx: CallbackCtx | None = None

    def run(self, data: bytes) -> None:
        request = EngineRequest.loaded(data)
        self._ctx = ctx = engine_context_of(
            request, self._report.node, self._report.process, self.tell
        )
        manager = manager_of(request.stack)
        _managers.append(manager)
        asyncio.run(with_background(manager, ctx, call_hook(manager, ENGINE_PROCESS, ctx)))

    def failure_of(self, error: Exception) -> HookError:
        """Return what has ended the hooks as a `HookError` that names this process."""
        return as_failure(error, self._ctx, self._report)

    def tell(self, _: object = None) -> None:
        """Report how far it has come; at once, because this may be the last that is heard."""
        trace = list(self._ctx.trace) if self._ctx else []
        self._file.write(replace(self._report, trace=trace))

    def end(self, error: HookError | None = None) -> None:
        """Report how it has ended."""
        for entry in self._ctx.trace if self._ctx else ():
            entry.finish("interrupted")
        self._report = replace(self._report, error=error, ended=True)
        self.tell()


def as_failure(error: Exception, ctx: CallbackCtx | None, report: Report) -> HookError:
    """Return what has ended the hooks of a process as a `HookError` that names it."""
    if isinstance(error, HookError):
        failure = error
    else:  # building callbacks runs other people's code
        ctx = ctx or CallbackCtx(llm_config=None, node=report.node, process=report.process)
        failure = step_error(ctx, Phase.BEFORE_ENGINE_INIT, describe(error), cause=error)
    failure.process = failure.process or str(report.process)
    return failure


def _not_prepared(process: ProcessInfo, error: OSError) -> HookError:
    return HookError(
        node=os.uname().nodename,
        phase=Phase.BEFORE_ENGINE_INIT,
        process=str(process),
        detail=f"the start that it belongs to has no folder here: {describe(error)}",
        advice="make the replica's placement group span the nodes that the engine uses",
    )


def _log_somewhere() -> None:
    """Let records out: Serve sets up the logger in a replica, and nobody does in these processes.

    The output of the engine's own processes is the replica's.
    """
    if not logger.hasHandlers():
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s -- %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
