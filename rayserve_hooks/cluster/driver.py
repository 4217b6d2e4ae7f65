"""The node initialization outside of Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayserve_hooks.cluster.initialize import initialize
from rayserve_hooks.cluster.slot import HooksCallback, callback_of
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.cluster.versions import check_ray
from rayserve_hooks.context import CallbackCtx

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

check_ray()  # here, and not at the first call, which may come after minutes


async def initialize_node(
    config: LLMConfig, *, placement_group: PlacementGroup | None = None
) -> CallbackCtx:
    """Initialize all nodes of a deployment, with its callbacks.

    Inside a Serve replica `HooksCallback` does this; anywhere else connect to Ray first.
    Synchronous callbacks run in a thread, so the calling event loop stays free.

    Args:
        config: An ``LLMConfig`` of this package or, configured with ``HooksCallback``, of Ray.
            Its engine config gets the model path and the callbacks' ``extra_init_kwargs``.
        placement_group: The group that callbacks find in the context; by default the one this
            process runs in, which in a replica is Serve's. Without either, and unless a callback
            supplies one, the config's default group is created.

    Returns:
        The context after ``on_after_init``: ``nodes``, ``trace``, ``placement_group`` and what
        the callbacks left in the other fields.

    Raises:
        CallbackConfigError: The config's callbacks cannot be loaded.
        HookError: A callback or a node failed. The other nodes are stopped, and a placement group
            created here is removed.
    """
    callback = callback_of(config)
    if isinstance(callback, HooksCallback):
        return await callback.initialize(placement_group)
    return await initialize(config, stack_of(config), placement_group)
