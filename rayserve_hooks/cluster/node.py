"""One node's part of an initialization, in the replica's process or as a Ray task.

A task's worker process imports this module, so nothing here may import torch, vLLM or
``ray.serve.llm``.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import os
import pickle
import queue
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.download_stage import download_caller
from rayserve_hooks.context import (
    BackgroundTask,
    CallbackCtx,
    NodeInfo,
    NodeModelDownloadable,
    NodeResult,
)
from rayserve_hooks.core import threads as aio
from rayserve_hooks.core.manager import (
    CallbackStack,
    PluginManager,
    get_plugin_manager,
    hook_error,
    log_warned,
)
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.errors import HookError, describe
from rayserve_hooks.trace import Trace, TraceEntry

T = TypeVar("T")

_POLL_S = 0.5

Setters = dict[str, tuple[str, str]]
"""By key of ``custom_data``: the callback and hook that set it."""


@dataclass(frozen=True)
class ModelSource:
    """What the default download needs to know of the deployment's config.

    Args:
        model_id: The engine's model id or path.
        mirror: The bucket the model is in, if any.
    """

    model_id: str
    mirror: Mirror | None


@dataclass(frozen=True)
class NodeRequest:
    """What travels to another node: the callback list and a copy of the context's fields."""

    stack: CallbackStack
    node: NodeInfo
    source: ModelSource
    config: bytes
    fields: dict[str, Any]
    assigned: frozenset[str]
    custom_data: dict[str, bytes]
    custom_data_setters: Setters
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class NodeStatus:
    """What a node's task is doing; sent while it works.

    Attributes:
        phase: ``"before download"`` or ``"download"``.
        calls: By place in the node's trace, the calls that are new or have ended since the last
            status; copies, as they were then.
    """

    phase: str
    calls: dict[int, TraceEntry]


@dataclass(frozen=True)
class NodeReply:
    """What comes back: the result, and what the node's callbacks did to their copy."""

    result: NodeResult
    custom_data: dict[str, bytes]
    extra_init_kwargs: dict[str, Any]
    trace: list[TraceEntry]


@dataclass(frozen=True)
class CleanUp:
    """What ``on_init_failed`` did on a node.

    Attributes:
        failures: What failed in it.
        trace: The calls of its process.
    """

    failures: list[HookError]
    trace: list[TraceEntry]


async def initialize_this_node(
    manager: PluginManager,
    ctx: CallbackCtx,
    source: ModelSource,
    on_phase: Callable[[str], None],
) -> NodeResult:
    """Run the per-node hook and, unless it brings the model, the default download.

    Args:
        manager: The callbacks.
        ctx: The context of this node.
        source: Where the model is.
        on_phase: Told of each phase as it begins.

    Returns:
        The result, still without ``custom_data``: a background task may be filling it.

    Raises:
        HookError: A callback or the download failed, or took longer than its time limit.
    """
    limits = manager.stack.time_limits
    on_phase("before download")
    started = time.perf_counter()
    async with time_limit("on_before_download", limits.on_before_download, ctx, "before download"):
        handled = await aio.run_in_thread(manager.hook.on_before_download, ctx=ctx)
    hook_s = time.perf_counter() - started
    if handled is not None:
        path = None if handled.model_path is None else str(handled.model_path)
        return NodeResult(ctx.node, path, {}, handled, hook_s, 0.0)
    on_phase("download")
    started = time.perf_counter()
    mode = _download_field(ctx.node)
    try:
        async with time_limit("download", limits.download, ctx, "download"):
            path = await aio.run_in_thread(
                download_node,
                source.model_id,
                source.mirror,
                getattr(ctx, mode),
                from_hub=mode in ctx._assigned,
                caller=download_caller(source.model_id),
            )
    except HookError:
        raise
    except Exception as error:
        raise HookError(
            callback=None, hook=None, node=str(ctx.node), phase="download", detail=describe(error)
        ) from error
    return NodeResult(ctx.node, path, {}, None, hook_s, time.perf_counter() - started)


def _download_field(node: NodeInfo) -> str:
    return "local_node_download_model" if node.is_local else "worker_node_download_model"


def download_mode_here(ctx: CallbackCtx) -> NodeModelDownloadable:
    """Pick the download mode that counts on the context's node."""
    return getattr(ctx, _download_field(ctx.node))  # type: ignore[no-any-return]


@contextlib.asynccontextmanager
async def time_limit(
    name: str, seconds: float | None, ctx: CallbackCtx, phase: str
) -> AsyncIterator[None]:
    """Give up the block, and what it runs in a thread, after ``seconds``.

    Args:
        name: The limit's name in ``time_limits``.
        seconds: None means no limit.
        ctx: The context; names the callback that is running.
        phase: The step, for the error.

    Raises:
        HookError: It took longer; names the callback that was running.
    """
    try:
        async with asyncio.timeout(seconds) as deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise
        running = ctx._running or _interrupted(ctx)
        if running is not None:
            running.finish("timed out")
            running.outcome = "timed out"
        raise HookError(
            callback=running.callback if running else None,
            hook=running.hook if running else None,
            node=str(ctx.node),
            phase=phase,
            detail=f"not done after {seconds:g} s, the time limit {name!r}; see what it waits "
            "for, or raise the limit in time_limits",
        ) from error


def _interrupted(ctx: CallbackCtx) -> TraceEntry | None:
    """Find the async call that has ended because its wait was cancelled, the innermost one."""
    return next((entry for entry in reversed(ctx.trace) if entry.outcome == "interrupted"), None)


async def with_background(
    manager: PluginManager, ctx: CallbackCtx, work: Coroutine[Any, Any, T]
) -> T:
    """Await ``work`` and everything that callbacks start beside it with `run_in_background`.

    Raises:
        HookError: A background task failed; ``work`` is cancelled then.
    """
    main = asyncio.ensure_future(work)
    tasks: dict[asyncio.Future[Any], BackgroundTask] = {}
    try:
        while True:
            while ctx._background:
                task = ctx._background.pop(0)
                tasks[asyncio.wrap_future(task.call.future)] = task
            waiting = [future for future in (main, *tasks) if not future.done()]
            if not waiting:
                return main.result()
            # A task that starts in the meantime tells nobody, so look again soon.
            done, _ = await asyncio.wait(
                waiting, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
            )
            if main in done:
                main.result()
            for future in done - {main}:
                _settle(manager, ctx, tasks[future], future)
    finally:
        for future in (main, *tasks):
            future.cancel()
        for task in (*tasks.values(), *ctx._background):  # some it has not noticed yet
            task.call.give_up()
        ctx._background.clear()
        await asyncio.wait([main])
        if not main.cancelled():
            main.exception()  # or Python complains that nobody asked, where another error won


def _settle(
    manager: PluginManager, ctx: CallbackCtx, task: BackgroundTask, future: asyncio.Future[Any]
) -> None:
    error = future.exception()
    if error is None:
        return
    if not isinstance(error, Exception):
        raise error
    entry = task.entry
    what = f"its background task {entry.background!r} raised "
    failure = hook_error(
        error,
        ctx,
        entry.callback,
        entry.hook,
        what=what,
        kwargs=manager.kwargs_of(entry.callback),
    )
    if not manager.warns(entry.callback):
        raise failure
    entry.outcome = "warned"
    log_warned(failure)


async def clean_up(
    manager: PluginManager, ctx: CallbackCtx, error: BaseException, started: Iterable[str] = ()
) -> list[HookError]:
    """Run ``on_init_failed`` in this process.

    Args:
        manager: The callbacks.
        ctx: The context.
        error: What ended the initialization.
        started: Callbacks that had started in another process of this node.

    Returns:
        What failed in it, a time limit included.
    """
    here = (ctx.node.id, os.getpid())
    started = {*started, *(e.callback for e in ctx.trace if (e.node_id, e.pid) == here)}
    try:
        limit = manager.stack.time_limits.on_init_failed
        async with time_limit("on_init_failed", limit, ctx, "clean-up"):
            return await aio.run_in_thread(manager.clean_up, ctx, error, started)
    except HookError as failure:
        return [failure]


def run_node_task(request: NodeRequest) -> Iterator[NodeStatus | NodeReply]:
    """Initialize the node of this Ray task; the counterpart of `request_for`.

    A streaming generator: what it yields reaches the replica while it works, so that the replica
    can say where it is, also after this process was killed. This thread only yields, and wakes
    often, because the ``KeyboardInterrupt`` of ``ray.cancel`` comes in no other way.

    Yields:
        What it does, and last the reply.

    Raises:
        HookError: A callback or the download failed; ``on_init_failed`` has run.
    """
    # Where Ray was started by a shell that ignores SIGINT, as for a background job, its workers
    # ignore it, too, and would never hear of ray.cancel.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    statuses: queue.Queue[tuple[NodeStatus, threading.Event] | None] = queue.Queue()
    news = _News()
    phase = "before download"
    ended = False  # nobody sends what is said later

    def report() -> threading.Event:
        sent = threading.Event()
        if ended:
            sent.set()
        else:
            statuses.put((NodeStatus(phase, news.of(ctx.trace)), sent))
        return sent

    def on_call(_: TraceEntry) -> None:
        # Held up until the replica knows: this may be the last it hears.
        report().wait(_POLL_S)

    def on_phase(name: str) -> None:
        nonlocal phase
        phase = name
        report()

    ctx = _context_of(request, on_call)
    manager = get_plugin_manager(request.stack)
    work = _start(
        with_background(manager, ctx, initialize_this_node(manager, ctx, request.source, on_phase))
    )
    work.add_done_callback(lambda _: statuses.put(None))
    try:
        while True:
            try:
                report_or_end = statuses.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if report_or_end is None:
                break
            status, sent = report_or_end
            yield status
            sent.set()
        # custom_data goes back key by key, so that one that cannot travel is an error naming it.
        custom_data = pack_custom_data(ctx, request.custom_data_setters)
        reply = NodeReply(work.result(), custom_data, ctx.extra_init_kwargs, list(ctx.trace))
    except Exception as error:
        ended = True
        _clean_up_after(manager, ctx, error)
        yield NodeStatus(phase, dict(enumerate(ctx.trace)))
        raise
    except BaseException:  # the KeyboardInterrupt of ray.cancel; nothing can be yielded any more
        ended = True
        work.cancel()
        detail = "stopped, because the initialization has failed elsewhere or was cancelled"
        stopped = HookError(
            callback=None, hook=None, node=str(ctx.node), phase=phase, detail=detail
        )
        _clean_up_after(manager, ctx, stopped)
        _leave(request, CleanUp(stopped.cleanup_errors, list(ctx.trace)))
        raise
    yield reply


class _News:
    """Picks from a growing trace what has changed since it was last asked."""

    def __init__(self) -> None:
        self._known = 0
        self._open: set[int] = set()

    def of(self, trace: Trace) -> dict[int, TraceEntry]:
        places = [*sorted(self._open), *range(self._known, len(trace))]
        news = {place: copy.copy(trace[place]) for place in places}
        self._known += len(places) - len(self._open)
        self._open = {place for place, entry in news.items() if entry.duration_s is None}
        return news


def _clean_up_after(manager: PluginManager, ctx: CallbackCtx, error: Exception) -> None:
    failures = _start(clean_up(manager, ctx, error)).result()
    if isinstance(error, HookError):
        error.cleanup_errors.extend(failures)


def run_clean_up_task(request: NodeRequest, error: BaseException, started: set[str]) -> CleanUp:
    """Run ``on_init_failed`` on a node whose own task has ended."""
    ctx = _context_of(request)
    manager = get_plugin_manager(request.stack)
    failures = _start(clean_up(manager, ctx, error, started)).result()
    return CleanUp(failures, list(ctx.trace))


# Of a task that was cancelled Ray drops everything: what it returns, yields and raises. So it
# leaves the outcome of its clean-up in a file, which another task on the node fetches.


def _leave(request: NodeRequest, outcome: CleanUp) -> None:
    path = _left_by(request)
    unfinished = path.with_suffix(".new")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        pickle.dump(outcome, file)
    unfinished.replace(path)


def run_fetch_task(request: NodeRequest) -> CleanUp:
    """Fetch what a cancelled task on this node has left.

    Raises:
        FileNotFoundError: It has left nothing.
    """
    path = _left_by(request)
    outcome: CleanUp = pickle.loads(path.read_bytes())
    path.unlink()
    return outcome


def _left_by(request: NodeRequest) -> Path:
    return Path(tempfile.gettempdir(), f"rayserve_hooks-{request.token}")


def _start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(coroutine, aio.process_loop())


def _context_of(
    request: NodeRequest, on_call: Callable[[TraceEntry], None] | None = None
) -> CallbackCtx:
    from ray import cloudpickle

    ctx = CallbackCtx(
        llm_config=functools.partial(cloudpickle.loads, request.config),
        node=request.node,
        role="node",
        attempt=_ray.task_attempt(),
        on_call=on_call,
        custom_data=load_custom_data(request.custom_data),
        **request.fields,
    )
    ctx._assigned.update(request.assigned)
    return ctx


def request_for(
    node: NodeInfo, ctx: CallbackCtx, stack: CallbackStack, source: ModelSource, config: bytes
) -> NodeRequest:
    """Build what travels to another node.

    Raises:
        HookError: A value in ``ctx.custom_data`` cannot be pickled.
    """
    fields = {
        "local_node_download_model": ctx.local_node_download_model,
        "worker_node_download_model": ctx.worker_node_download_model,
        "placement_group": ctx.placement_group,
        "runtime_env": ctx.runtime_env,
        "extra_init_kwargs": ctx.extra_init_kwargs,
    }
    return NodeRequest(
        stack,
        node,
        source,
        config,
        fields,
        frozenset(ctx._assigned),
        pack_custom_data(ctx),
        _setters(ctx),
    )


def unpack(reply: NodeReply) -> NodeResult:
    """Give a node's result with its ``custom_data`` loaded."""
    return replace(reply.result, custom_data=load_custom_data(reply.custom_data))


def load_custom_data(packed: dict[str, bytes]) -> dict[str, Any]:
    from ray import cloudpickle

    return {key: cloudpickle.loads(data) for key, data in packed.items()}


def pack_custom_data(ctx: CallbackCtx, set_earlier: Setters | None = None) -> dict[str, bytes]:
    """Pickle ``ctx.custom_data`` key by key.

    Args:
        ctx: The context.
        set_earlier: Who set the keys that came with the request.

    Raises:
        HookError: A value cannot be pickled; names its key and the callback that set it.
    """
    from ray import cloudpickle

    packed = {}
    for key, value in ctx.custom_data.items():
        try:
            packed[key] = cloudpickle.dumps(value)
        except Exception as error:  # any class can refuse in its own way
            setters = {**(set_earlier or {}), **_setters(ctx)}
            callback, hook = setters.get(key, (None, None))
            raise HookError(
                callback=callback,
                hook=hook,
                node=str(ctx.node),
                phase="before download",
                detail=f"ctx.custom_data[{key!r}] cannot be sent to another process: "
                f"{describe(error)}; store plain data there and keep the object on the callback",
            ) from error
    return packed


def _setters(ctx: CallbackCtx) -> Setters:
    found = {}
    for key in ctx.custom_data:
        entry = ctx.trace.who_changed(f"custom_data.{key}")
        if entry is not None:
            found[key] = (entry.callback, entry.hook)
    return found
