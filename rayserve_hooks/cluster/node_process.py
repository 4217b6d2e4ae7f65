"""Another node's process on Ray: an actor that is pinned to the node."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from rayserve_hooks.cluster.node_actor import NodeActor
from rayserve_hooks.cluster.platform import ProcessGoneError, RaisedThereError
from rayserve_hooks.cluster.travel import CleanUp, NodeReply, NodeRequest, NodeStatus
from rayserve_hooks.errors import describe

T = TypeVar("T")


class RayNodeProcess:
    """A node's `NodeActor`, whose process ends when the last handle to it is gone."""

    def __init__(self, request: NodeRequest, attempt: int, runtime_env: dict[str, Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = request.node
        self._name = f"rayserve_hooks:{request.stack.deployment}:{node.address}"
        actor: Any = ray.remote(NodeActor)
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        actor = actor.options(num_cpus=0, scheduling_strategy=here, runtime_env=runtime_env)
        self.actor = actor.remote(request, attempt)

    async def initialize(self) -> NodeReply:
        return await _answer(self.actor.initialize.options(name=self._name).remote())

    async def status(self, seen: int) -> NodeStatus:
        return await _answer(self.actor.status.remote(seen))

    async def stop(self) -> bool:
        return await _answer(self.actor.stop.remote())

    async def clean_up(self, error: BaseException, started: Sequence[str]) -> CleanUp:
        return await _answer(self.actor.clean_up.remote(error, started, followed=True))

    def kill(self) -> None:
        import ray

        ray.kill(self.actor)


async def _answer(call: Awaitable[T]) -> T:
    from ray.exceptions import RayError, RayTaskError

    try:
        return await call
    except RayTaskError as error:
        raise RaisedThereError(describe(error.cause)) from error.cause
    except RayError as error:
        raise ProcessGoneError(describe(error)) from error
