"""What the engine is started with: model path, keyword arguments, environment."""

from __future__ import annotations

import os

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.platform import Platform
from rayserve_hooks.cluster.travel import NodeReply
from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.log import call_fields, logger
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import Phase, describe, raise_from


class Environment:
    """Brings the variables that callbacks put into ``ctx.runtime_env`` into this process.

    Ray gives them to the other nodes' processes and to the engine's Ray workers. The replica's own
    callbacks, and the engine processes it forks, see this process's environment instead.
    """

    def __init__(self, ctx: CallbackCtx) -> None:
        self._ctx = ctx
        self._known = dict(ctx.runtime_env.get("env_vars") or {})

    def export(self, phase: Phase) -> None:
        """Set and unset what callbacks have changed since the last time."""
        now = dict(self._ctx.runtime_env.get("env_vars") or {})
        for name in self._known.keys() - now.keys():
            os.environ.pop(name, None)
        for name, value in now.items():
            if value != self._known.get(name):
                try:
                    os.environ[name] = value
                except (TypeError, ValueError) as error:
                    path, detail = f"runtime_env.env_vars.{name}", describe(error)
                    failure = step_error(self._ctx, phase, detail, path, error)
                    raise_from(failure, failure.__cause__)
        self._known = now


def merge(ctx: CallbackCtx, reply: NodeReply) -> None:
    """Merge another node's ``extra_init_kwargs`` into ours; the earlier value stays."""
    node, theirs = reply.result.node, reply.extra_init_kwargs
    merged = dict(ctx.extra_init_kwargs)
    for entry in reply.trace:
        for path in entry.changed:
            field, name = f"{path}.".split(".")[:2]
            if field in ("runtime_env", "placement_group"):
                logger.warning(
                    "callback %r set ctx.%s in %s on node %s, where it has no effect; set it in "
                    "on_before_init",
                    entry.callback,
                    path,
                    entry.hook,
                    node,
                    extra=call_fields(entry),
                )
            ours = field == "extra_init_kwargs" and name in theirs
            if ours and merged.setdefault(name, theirs[name]) != theirs[name]:
                logger.warning(
                    "callback %r set ctx.%s to another value on node %s than is set already; "
                    "the earlier value stays",
                    entry.callback,
                    path,
                    node,
                    extra=call_fields(entry),
                )
    recorder_of(ctx).adopt(extra_init_kwargs=merged)


def set_model_path(ctx: CallbackCtx, platform: Platform = _ray) -> None:
    """Make the engine load the model from where the nodes have it; it must be one path."""
    reported = [ctx.handled] if ctx.handled is not None else ctx.nodes.values()
    paths = {str(source.model_path) for source in reported if source.model_path is not None}
    if len(paths) > 1:
        where = ", ".join(f"{result.node}: {result.model_path!r}" for result in ctx.nodes.values())
        raise step_error(
            ctx,
            Phase.DOWNLOAD,
            f"the engine needs one model path on all nodes, got {where}; return the same path on "
            "each, for example by a symbolic link",
        )
    for path in paths:
        platform.set_model_path(ctx.llm_config, path)


def set_engine_kwargs(ctx: CallbackCtx, platform: Platform = _ray) -> None:
    """Merge ``ctx.extra_init_kwargs`` into the engine's keyword arguments."""
    for name, value in ctx.extra_init_kwargs.items():
        try:
            platform.set_engine_kwargs(ctx.llm_config, {name: value})
        except ValueError as error:
            path, detail = f"extra_init_kwargs.{name}", describe(error)
            failure = step_error(ctx, Phase.ENGINE_ARGUMENTS, detail, path, error)
            raise_from(failure, failure.__cause__)
