"""``on_configure``: what callbacks set before Serve makes a deployment."""

from __future__ import annotations

import asyncio
import copy
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster import _ray, _vllm
from rayserve_hooks.cluster.platform import Platform
from rayserve_hooks.cluster.travel import load_custom_data, pack_custom_data
from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.hooks import CONFIGURE, ENGINE_PROCESS
from rayserve_hooks.core.manager import PluginManager, manager_of
from rayserve_hooks.core.recorder import Recorder, recorder_of, snapshot
from rayserve_hooks.core.running import call_hook, with_background
from rayserve_hooks.core.stack import CallbackStack, Configured
from rayserve_hooks.core.threads import ThreadCall
from rayserve_hooks.errors import Phase, describe, raise_from
from rayserve_hooks.trace import Trace

if TYPE_CHECKING:
    from rayserve_hooks.cluster.config import LLMConfig


def configured(
    config: LLMConfig, stack: CallbackStack, name: str, platform: Platform = _ray
) -> LLMConfig:
    """Run ``on_configure`` of a stack, and return a config of what it has set.

    Args:
        config: The deployment's config, which stays as it is.
        stack: Its callbacks.
        name: What names the deployment, before Serve does.
        platform: Ray, unless an author's test simulates it.

    Raises:
        HookError: A callback failed, or Ray refuses what it has set.
    """
    variables = platform.deployed_variables(config)
    manager = manager_of(stack.here().for_deployment(name, {**os.environ, **variables}))
    runtime_env = {**copy.deepcopy(config.runtime_env or {}), "env_vars": variables}
    ctx = CallbackCtx(
        llm_config=config,
        node=platform.node_where_built(),
        placement_group_config=copy.deepcopy(config.placement_group_config or {}),
        runtime_env=runtime_env,
    )
    Recorder(ctx)
    before = snapshot(dict(recorder_of(ctx).values))
    if manager.run_order()[CONFIGURE]:
        _run(manager, ctx)
    _vllm.check_plugins(ctx.runtime_env.get("env_vars"), manager.run_order()[ENGINE_PROCESS])
    update = _update(ctx, config, before, platform)
    callbacks = tuple(entry.name for entry in manager.stack.entries)
    packed = pack_custom_data(ctx, phase=Phase.CONFIGURE)
    travels = replace(stack, configured=Configured(tuple(ctx.trace), packed, callbacks))
    changed: LLMConfig = platform.reconfigured(config, update, travels)
    return changed


def take_up(ctx: CallbackCtx, configured: Configured) -> None:
    """Begin a replica's context with what ``on_configure`` has left."""
    trace = Trace(configured.trace)
    setters = {key: trace.who_changed(f"custom_data.{key}") for key in configured.custom_data}
    loaded = load_custom_data(configured.custom_data, ctx.node, setters, Phase.CONFIGURE)
    recorder_of(ctx).adopt(custom_data=loaded)
    recorder_of(ctx).begin_with([copy.copy(call) for call in configured.trace])


def _run(manager: PluginManager, ctx: CallbackCtx) -> None:
    """Call the hook; in a thread, since whoever builds an app may have an event loop running."""
    call = ThreadCall(
        lambda: asyncio.run(with_background(manager, ctx, call_hook(manager, CONFIGURE, ctx)))
    )
    try:
        call.future.result()
    except BaseException:  # a KeyboardInterrupt, too
        call.give_up()
        raise


def _update(
    ctx: CallbackCtx, config: LLMConfig, before: dict[str, Any], platform: Platform
) -> dict[str, Any]:
    """Return what Serve deploys with instead; an error names the callback that set it."""
    values = recorder_of(ctx).values
    update: dict[str, Any] = {}
    for field in ("runtime_env", "placement_group_config"):
        if values[field] != before[field]:
            update = _checked(ctx, config, {**update, field: values[field]}, field, platform)
    kwargs = dict(config.engine_kwargs)
    for name, value in ctx.extra_init_kwargs.items():
        kwargs[name] = value
        path = f"extra_init_kwargs.{name}"
        update = _checked(ctx, config, {**update, "engine_kwargs": dict(kwargs)}, path, platform)
    return update


def _checked(
    ctx: CallbackCtx, config: LLMConfig, update: dict[str, Any], path: str, platform: Platform
) -> dict[str, Any]:
    update.pop("accelerator_config", None)  # is inferred anew
    try:
        return platform.changed(config, update)
    except ValueError as error:
        failure = step_error(ctx, Phase.CONFIGURE, describe(error), path, error)
        raise_from(failure, failure.__cause__)
