"""Initialize, and run the engine on, a placement group of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.errors import CallbackConfigError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class CustomPlacementGroup:
    """Create a placement group before anything is placed, and use it for this deployment.

    Ray removes the group with the process that made it, and this callback when the initialization
    fails: then the process may live on. Inside a Serve replica the group that
    Serve has made stays reserved beside it; where the bundles are known when the config is
    written, prefer ``LLMConfig(placement_group_config=...)``, which shapes that one.

    Args:
        bundles: The resources of each bundle, such as ``[{"GPU": 1, "CPU": 1}]``.
        strategy: How Ray spreads the bundles over nodes.
        name: The group's name in Ray's tables and dashboard.

    Raises:
        CallbackConfigError: No bundle, an empty or negative one, or an unknown strategy.
    """

    def __init__(
        self, bundles: Sequence[Mapping[str, float]], strategy: Strategy = "PACK", name: str = ""
    ) -> None:
        if not bundles:
            raise CallbackConfigError(
                "CustomPlacementGroup(bundles=[]): give at least one bundle, such as {'CPU': 1}"
            )
        for index, bundle in enumerate(bundles):
            if not isinstance(bundle, Mapping) or not bundle or min(bundle.values()) < 0:
                raise CallbackConfigError(
                    f"CustomPlacementGroup(bundles[{index}]={bundle!r}): write resources and "
                    "amounts, such as {'CPU': 1}"
                )
        if strategy not in get_args(Strategy):
            raise CallbackConfigError(
                f"CustomPlacementGroup(strategy={strategy!r}): use one of "
                f"{', '.join(sorted(get_args(Strategy)))}"
            )
        self.bundles = [dict(bundle) for bundle in bundles]
        self.strategy = strategy
        self.name = name
        self._group: PlacementGroup | None = None

    def on_before_init(self, ctx: CallbackCtx) -> None:
        from ray.util.placement_group import placement_group

        self._group = placement_group(self.bundles, self.strategy, name=self.name)
        ctx.placement_group = self._group

    def on_init_failed(self, ctx: CallbackCtx) -> None:
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:  # only the replica's process has made it
            remove_placement_group(self._group)
            self._group = None
