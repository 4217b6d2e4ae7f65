"""The node stage without an engine: models are there before the first replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.nodes import chosen, runtime_env_of
from rayserve_hooks.cluster.ray_callback import packed_instances
from rayserve_hooks.cluster.remote_node import RemoteNode
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.cluster.travel import ModelSource, request_for
from rayserve_hooks.cluster.versions import imports_explained
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeModelDownloadable, NodeResult
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import CallbackConfigError, HookError

_MODES = ("local_node_download_model", "worker_node_download_model")


@dataclass(frozen=True)
class Prefetched:
    """What became of one node for one deployment.

    Attributes:
        deployment: The deployment's name.
        node: The node.
        result: What its stage left; None if it failed.
        error: Why it failed; None if it did not.
    """

    deployment: str
    node: NodeInfo
    result: NodeResult | None = None
    error: HookError | None = None


def prefetch(
    deployments: Sequence[Deployment],
    names: Sequence[str] = (),
    mode: NodeModelDownloadable | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
    variables: dict[str, str] | None = None,
) -> list[Prefetched]:
    """Run the node stage of deployments on nodes of the cluster that this process is connected to.

    Each node runs ``on_before_download`` and, unless a callback brings the model, the default
    download, in a process of its own. No other hook runs, but ``on_init_failed`` where a node has
    failed; the others go on. Every node is one of the workers': which will be a replica's own is
    not known yet.

    Args:
        deployments: Whose models.
        names: Which nodes; see `rayserve_hooks.cluster.nodes.chosen`.
        mode: What to download; by default what Ray downloads for the config.
        on_progress: Called with a line whenever a node is heard to go on; what has passed when it
            is heard again has no line of its own.
        variables: For the environment of the nodes' processes, besides the deployment's.

    Raises:
        CallbackConfigError: A callback or a node's name is wrong.
        InstallationError: ``ray.serve.llm`` cannot be imported here.
    """
    nodes = [replace(node, is_local=False) for node in chosen(names)]
    done: list[Prefetched] = []
    for deployment in deployments:
        done += asyncio.run(_Prefetch(deployment, mode, on_progress, variables or {}).run(nodes))
    return done


class _Prefetch:
    """One deployment's node stage, on several nodes at once."""

    def __init__(
        self,
        deployment: Deployment,
        mode: NodeModelDownloadable | None,
        on_progress: Callable[[str], None],
        variables: dict[str, str],
    ) -> None:
        self._name, self._say = deployment.name, on_progress
        self._said: dict[str, str] = {}  # of each node, the last
        config = _config_of(deployment)
        self._manager = manager_of(stack_of(config))
        mode = mode or _ray.default_download_mode(config)
        of_file, of_config = runtime_env_of(deployment), _ray.initial_runtime_env(config)
        env_vars = {**of_file.get("env_vars", {}), **of_config.get("env_vars", {}), **variables}
        runtime_env = {**of_file, **of_config, "env_vars": env_vars}
        self._ctx = CallbackCtx(
            llm_config=config,
            node=_ray.own_node(),
            local_node_download_model=mode,
            worker_node_download_model=mode,
            runtime_env=runtime_env,
        )
        # Else a model of the hub would be left to an engine, and none is going to start.
        recorder_of(self._ctx).assigned.update(_MODES)

    async def run(self, nodes: Sequence[NodeInfo]) -> list[Prefetched]:
        from ray import cloudpickle

        ctx = self._ctx
        source = ModelSource(*_ray.model_source(ctx.llm_config))
        config, instances = cloudpickle.dumps(ctx.llm_config), packed_instances(self._manager, ctx)
        stack = self._manager.stack
        remotes = [
            RemoteNode(
                request_for(node, ctx, stack, source, config, instances),
                ctx.runtime_env,
                on_news=self._report,
            )
            for node in nodes
        ]
        return await asyncio.gather(*(self._one(remote) for remote in remotes))

    async def _one(self, remote: RemoteNode) -> Prefetched:
        self._report(remote)
        try:
            result = await remote.wait()
        except HookError as error:
            error.cleanup_errors.extend(await remote.clean_up(error))
            self._say(f"{self._name}: node {remote.node}: failed")
            return Prefetched(self._name, remote.node, error=error)
        except BaseException as error:  # cancelled by the user, as a replica's start can be
            await remote.clean_up(error)
            raise
        remote.end()
        self._say(f"{self._name}: node {remote.node}: ready")
        return Prefetched(self._name, remote.node, result)

    def _report(self, remote: RemoteNode) -> None:
        """Call ``on_progress`` with a node's phase and callback, if they have changed."""
        running = remote.running
        doing = str(remote.phase or "waiting for a worker process")
        doing += f", callback {running.callback!r}" if running else ""
        if doing != self._said.get(remote.node.id):
            self._said[remote.node.id] = doing
            self._say(f"{self._name}: node {remote.node}: {doing}")


def _config_of(deployment: Deployment) -> Any:
    with imports_explained():
        from rayserve_hooks.cluster.config import LLMConfig
    try:
        return LLMConfig.model_validate(dict(deployment.llm_config))
    except ValueError as error:
        raise CallbackConfigError(
            f"{deployment.name}: Ray refuses the LLM config: {error}; correct it"
        ) from error
