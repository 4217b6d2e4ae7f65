"""Run a callback written for Ray's own slot next to ours, unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import threads
from rayserve_hooks.core.inspection import Unbuilt, is_a, names_of
from rayserve_hooks.core.loading import argument_problems, raise_problems
from rayserve_hooks.errors import CallbackConfigError, did_you_mean

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


_METHODS = {
    "on_before_init": "on_before_node_init",
    "on_before_download": "on_before_download_model_files_distributed",
    "on_after_init": "on_after_node_init",
}
_GIVEN_BY_RAY = ("llm_config", "raise_error_on_callback", "ctx_kwargs")


def _misspelt(cls: type) -> list[str]:
    """Return which methods are named nearly as one that Ray calls, or as a hook of ours."""
    problems = []
    for name in names_of(Unbuilt(cls)):
        if name in _METHODS.values() or not name.startswith("on_"):
            continue
        close = _METHODS.get(name) or did_you_mean(name, _METHODS.values(), cutoff=0.85)
        if close:
            hint = f"; name it {close!r}" if name in _METHODS else close
            problems.append(f"method {name!r} is none that Ray calls{hint}")
    return problems


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
        raise_problems(
            [*_misspelt(cls), *argument_problems(cls, self._kwargs, given=_GIVEN_BY_RAY)]
        )

    def method_of(self, hook: str) -> object:
        """Return the callback's own method that runs where a hook of ours would."""
        return getattr_static(self._cls, _METHODS[hook])

    def on_before_init(self, ctx: CallbackCtx) -> Handled | None:
        theirs = self._run("on_before_init", ctx)
        if theirs.run_init_node:
            return None
        return Handled(reason=f"{self._cls.__name__} set run_init_node to False")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._run("on_before_download", ctx)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        self._run("on_after_init", ctx)

    def _run(self, hook: str, ctx: CallbackCtx) -> Any:
        """Call the method that a hook stands for and return the callback's own context."""
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
        result = getattr(self._instance, _METHODS[hook])()
        if inspect.iscoroutine(result):
            threads.run_coroutine(result)
        chosen = theirs.worker_node_download_model
        if chosen is not mode:
            ctx.local_node_download_model = ctx.worker_node_download_model = chosen
        for name in shared:
            setattr(ctx, name, getattr(theirs, name))
        return theirs
