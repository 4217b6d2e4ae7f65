"""Initialize, and run the engine on, a placement group of your own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Strict

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


def _not_empty(bundles: Sequence[Bundle]) -> Sequence[Bundle]:
    if not bundles:
        raise ValueError("give at least one bundle, such as {'CPU': 1}")
    return bundles


def _amounts(bundle: Mapping[str, float]) -> Mapping[str, float]:
    amounts = bundle.values()
    if not any(amounts) or not all(0 <= amount < math.inf for amount in amounts):
        raise ValueError("write resources and amounts, such as {'CPU': 1}")
    return bundle


Bundle = Annotated[Mapping[str, Annotated[float, Strict()]], AfterValidator(_amounts)]
Bundles = Annotated[Sequence[Bundle], AfterValidator(_not_empty)]


class CustomPlacementGroup:
    """Shape the placement group of this deployment, or make one.

    With the builders of this package Serve reserves these bundles and no others. Without them, as
    with Ray's own builders, this callback creates a group before anything is placed, and removes it
    when the start fails or the replica is stopped; the group that Serve has made stays reserved
    beside it.

    Args:
        bundles: The resources of each bundle and their amounts, such as ``[{"GPU": 1, "CPU": 1}]``:
            numbers of devices and cores, or bytes of ``memory``. Required.
        strategy: How Ray spreads the bundles over nodes. Default: ``"PACK"``.
        name: The name of a group that this callback makes, in Ray's tables and dashboard; Serve
            names its own. Default: ``""``, no name.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(self, bundles: Bundles, strategy: Strategy = "PACK", name: str = "") -> None:
        self.bundles = [dict(bundle) for bundle in bundles]
        self.strategy = strategy
        self.name = name
        self._group: PlacementGroup | None = None

    def on_configure(self, ctx: CallbackCtx) -> None:
        bundles = [dict(bundle) for bundle in self.bundles]
        ctx.placement_group_config = {"bundles": bundles, "strategy": self.strategy}

    def on_before_init(self, ctx: CallbackCtx) -> None:
        if any(call.hook == "on_configure" for call in ctx.trace):
            return  # Serve has made the group
        from ray.util.placement_group import placement_group

        self._group = placement_group(self.bundles, self.strategy, name=self.name)
        ctx.placement_group = self._group

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        self._remove()

    def on_init_failed(self, ctx: CallbackCtx) -> None:
        self._remove()

    def _remove(self) -> None:
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:  # only the replica's process has made it
            remove_placement_group(self._group)
            self._group = None
