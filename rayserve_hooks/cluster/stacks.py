"""From a config, ours or Ray's, to its callback stack and plugin manager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayserve_hooks.cluster import _ray, _vllm
from rayserve_hooks.cluster.ray_callback import adapt_ray_callback
from rayserve_hooks.core.hooks import ENGINE_PROCESS, NEED_ENGINE
from rayserve_hooks.core.inspection import is_a
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


def expanded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an ``LLMConfig`` of ours without ``model_id`` and ``callback``.

    Raises:
        CallbackConfigError: A short form and its long one differ.
    """
    data = dict(fields)
    model_id = data.pop("model_id", None)
    if model_id is not None:
        loading = data.setdefault("model_loading_config", {"model_id": model_id})
        in_dict = isinstance(loading, dict)
        named = loading.get("model_id") if in_dict else getattr(loading, "model_id", model_id)
        if named is None and in_dict:
            data["model_loading_config"] = {**loading, "model_id": model_id}
        elif named != model_id:
            raise CallbackConfigError(
                f"model_id {shown(model_id)} and model_loading_config's model_id "
                f"{shown(named)} differ; give one of them"
            )
    callback = data.pop("callback", None)
    if callback is not None:
        given = data.get("callbacks")
        # Not its truth value, which of a value of any class may be code.
        if given is not None and not (is_a(given, (list, tuple)) and len(given) == 0):
            raise CallbackConfigError(
                "both callback and callbacks are given; list all of them in callbacks"
            )
        data["callbacks"] = [callback]
    return data


def checked(
    stack: CallbackStack,
    name: str,
    runtime_env: Mapping[str, Any] | None,
    server_cls: object = None,
) -> CallbackStack:
    """Return a stack whose callbacks have been built here, and can travel to a replica.

    ``runtime_env`` and ``server_cls`` are the config's, which must not keep them from running.

    Raises:
        CallbackConfigError: Names all callbacks that cannot.
    """
    from ray import cloudpickle

    problems = Problems()
    with problems.collected():
        refuse_server(server_cls)
    with problems.collected():
        order = manager_of(stack.for_deployment(name).here()).run_order()
        _vllm.check_plugins((runtime_env or {}).get("env_vars"), order[ENGINE_PROCESS])
    with problems.collected():
        stack.freeze(cloudpickle.dumps)
    problems.raise_all()
    return stack


def needs_engine(stack: CallbackStack, name: str) -> bool:
    """Return whether a callback has a hook that our engine class runs, or may have one."""
    here = stack.here()
    order = manager_of(here.for_deployment(name)).run_order()
    return here is not stack or any(order[hook] for hook in NEED_ENGINE)


def parse(callbacks: object, time_limits: object, on_error: str) -> CallbackStack:
    """Read a callback list that may name callbacks of Ray's own kind, too."""
    return CallbackStack.parse(callbacks, time_limits, on_error=on_error, adapt=adapt_ray_callback)


def refuse_server(server_cls: object) -> None:
    """Raise if a ``server_cls`` would run no callbacks, without a word.

    Raises:
        CallbackConfigError: Says what to name instead.
    """
    if _ray.runs_no_callbacks(server_cls):
        raise CallbackConfigError(
            "server_cls names Ray's own server for SGLang, which runs no callbacks; name "
            "'rayserve_hooks.SGLangServer'"
        )
