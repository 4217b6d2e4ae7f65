"""From a config, ours or Ray's, to its callback stack and plugin manager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.ray_callback import adapt_ray_callback
from rayserve_hooks.core.instances import Instance
from rayserve_hooks.core.manager import PluginManager, manager_of
from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.stack import CallbackEntry, CallbackStack, kept_by
from rayserve_hooks.errors import CallbackConfigError, Problems


def get_plugin_manager(config: Any) -> PluginManager:
    """Return this process's plugin manager of a deployment; the first call builds it.

    Args:
        config: An ``LLMConfig`` of this package or, configured with ``HooksCallback``, of Ray.

    Returns:
        The manager; ``get_plugin_manager(config).hook.on_before_init(ctx=ctx)`` calls a hook.

    Raises:
        CallbackConfigError: A callback cannot be imported or built, or is none.
    """
    return manager_of(stack_of(config))


def stack_of(config: Any) -> CallbackStack:
    """Return the stack of a config, ours or Ray's, for the deployment of this process."""
    settings = config.callback_config
    stack = settings.callback_kwargs.get("stack")
    if not isinstance(stack, CallbackStack):
        on_error = "raise" if settings.raise_error_on_callback else "warn"
        stack = parse_settings(settings.callback_class, settings.callback_kwargs, on_error)
        # Before a hook runs: the other nodes get instances as they are configured.
        if any(isinstance(entry.callback, Instance) for entry in stack.entries):
            from ray import cloudpickle

            stack.freeze(cloudpickle.dumps)
        stack = replace(stack, kept=kept_by(config))
    return stack.for_deployment(_ray.deployment_name(config.model_id))


def parse_settings(
    callback_class: str | type, kwargs: Mapping[str, Any], on_error: str = "raise"
) -> CallbackStack:
    """Read a ``callback_config`` of a YAML file; a callback of Ray's own kind is a list of one."""
    if not _ray.runs_hooks(callback_class):
        entries = (CallbackEntry(callback_class, kwargs),)
        return CallbackStack(entries, on_error, adapt=adapt_ray_callback)
    problems = Problems()
    for unknown in sorted(shown(key) for key in {*kwargs} - {"callbacks", "time_limits"}):
        with problems.collected():
            raise CallbackConfigError(
                f"callback_kwargs has unknown key {unknown}; HooksCallback takes 'callbacks', a "
                "list, and 'time_limits', a mapping"
            )
    stack = CallbackStack()
    with problems.collected():
        stack = parse(kwargs.get("callbacks", ()), kwargs.get("time_limits", {}), on_error)
    problems.raise_all()
    return stack


def parse(callbacks: object, time_limits: object, on_error: str) -> CallbackStack:
    """Read a callback list that may name callbacks of Ray's own kind, too."""
    return CallbackStack.parse(callbacks, time_limits, on_error=on_error, adapt=adapt_ray_callback)
