"""Run a callback written for Ray's own slot next to ours, unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import threads
from rayserve_hooks.core.inspection import is_a
from rayserve_hooks.errors import CallbackConfigError

_SHARED = ("placement_group", "runtime_env", "custom_data")


def adapt_ray_callback(found: object, kwargs: Mapping[str, Any]) -> RayCallback | None:
    """Return a plugin for a class that is written for Ray's own slot; None for anything else."""
    cls = found if is_a(found, type) else type(found)
    if not _ray.is_ray_callback(cls):
        return None
    if not is_a(found, type):
        raise CallbackConfigError(
            "is an instance of a Ray callback, which belongs to one config and context; name the "
            "class, with its arguments in kwargs"
        )
    if _ray.is_hooks_callback(cls):
        raise CallbackConfigError(
            "HooksCallback runs this list and cannot be in it; list the callbacks themselves"
        )
    return RayCallback(cls, kwargs)


class RayCallback:
    """Calls the three methods of a Ray ``CallbackBase`` where the matching hooks run.

    The instance is built at the first hook of each process, because its constructor wants the
    deployment's config. Before each call its ``ctx`` gets our fields, and what the method sets
    there lands in ours. ``run_init_node = False`` means what it means in Ray: this callback has
    initialized the nodes itself. Ray has one download mode for all nodes; setting it sets both
    of ours.
    """

    def __init__(self, cls: type, kwargs: Mapping[str, Any]) -> None:
        self._cls, self._kwargs = cls, dict(kwargs)
        self._instance: Any = None
        try:
            inspect.signature(cls).bind(
                llm_config=None, raise_error_on_callback=True, ctx_kwargs={}, **self._kwargs
            )
        except TypeError as error:
            raise CallbackConfigError(
                f"{cls.__module__}.{cls.__qualname__} refused kwargs {sorted(kwargs)}: {error}"
            ) from error

    def on_before_init(self, ctx: CallbackCtx) -> Handled | None:
        theirs = self._run("on_before_node_init", ctx)
        if theirs.run_init_node:
            return None
        return Handled(reason=f"{self._cls.__name__} set run_init_node to False")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._run("on_before_download_model_files_distributed", ctx)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        self._run("on_after_node_init", ctx)

    def _run(self, method: str, ctx: CallbackCtx) -> Any:
        """Call one of Ray's methods and return the callback's own context."""
        mode = _ray.download_mode_of_ray(ctx.worker_node_download_model)
        shared = {name: getattr(ctx, name) for name in _SHARED}
        fields = {"worker_node_download_model": mode, **shared}
        if self._instance is None:
            self._instance = self._cls(
                llm_config=ctx.llm_config,
                raise_error_on_callback=True,
                ctx_kwargs=fields,
                **self._kwargs,
            )
        theirs = self._instance.ctx
        for name, value in fields.items():
            setattr(theirs, name, value)
        result = getattr(self._instance, method)()
        if inspect.iscoroutine(result):
            threads.run_coroutine(result)
        chosen = theirs.worker_node_download_model
        if chosen is not mode:
            ctx.local_node_download_model = ctx.worker_node_download_model = chosen
        for name in shared:
            setattr(ctx, name, getattr(theirs, name))
        return theirs
