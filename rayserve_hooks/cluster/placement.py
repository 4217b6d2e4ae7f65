"""The placement group that an initialization runs on."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.platform import Platform
from rayserve_hooks.context import CallbackCtx, NodeInfo
from rayserve_hooks.core import threads
from rayserve_hooks.core.failures import step_error
from rayserve_hooks.core.log import call_fields, fields, logger
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import Phase, PlacementError, describe, raise_from

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup

_LOG_EVERY_S = 5.0
_POLL_S = 0.5
_MOST_BUNDLES = 200
_MOST_STEPS = 10_000
_ROUNDING = 1e-6  # Ray counts in ten-thousandths
_AUTOSCALER_STARTS_S = 30.0  # on Kubernetes it is another container, and may come up later


_placements: WeakKeyDictionary[CallbackCtx, Placement] = WeakKeyDictionary()


def make_default_group(ctx: CallbackCtx) -> None:
    """Create the default group for an initialization that has none.

    In a context that was made by hand nothing happens.
    """
    placement = _placements.get(ctx)
    if placement is not None:
        placement.make_default()


class Placement:
    """Finds, or creates, the placement group of one initialization; made before the first hook."""

    def __init__(self, ctx: CallbackCtx, platform: Platform = _ray) -> None:
        self._ctx, self._platform = ctx, platform
        self._given = ctx.placement_group
        self._made: list[PlacementGroup] = []  # to be removed when the initialization fails
        _placements[ctx] = self

    def make_default(self) -> None:
        """Create the default group unless there is one."""
        ctx, platform = self._ctx, self._platform
        if ctx.placement_group is not None:
            return
        try:
            group = platform.create_default_placement_group(ctx.llm_config)
        except Exception as error:  # Ray's own, of any kind
            raise step_error(ctx, Phase.PLACEMENT, describe(error)) from error
        if platform.current_placement_group() is None:
            self._made.append(group)
        recorder_of(ctx).adopt(placement_group=group)

    async def ready(self) -> PlacementGroup:
        """Return the placement group once it is ready; the default one if there is no other."""
        ctx = self._ctx
        self._warn_of_reserved()
        await threads.run_in_thread(self.make_default)
        group = ctx.placement_group
        assert group is not None
        self.remove(but=group)  # a callback has replaced the default one
        started = time.monotonic()
        try:
            while not await threads.run_in_thread(group.wait, _LOG_EVERY_S):
                waited = time.monotonic() - started
                extra = fields(phase=Phase.PLACEMENT, node=ctx.node.id, seconds=waited)
                logger.info(
                    "waiting for placement group %s, bundles %s; 'ray status' shows what is free",
                    group.id.hex(),
                    group.bundle_specs,
                    extra=extra,
                )
                patient = waited < _AUTOSCALER_STARTS_S
                strategy = await threads.run_in_thread(self._platform.strategy_of, group)
                await threads.run_in_thread(
                    _refuse_impossible,
                    group.bundle_specs,
                    strategy,
                    patient,
                    extra,
                    self._platform,
                )
        except Exception as error:
            detail = str(error) if isinstance(error, PlacementError) else describe(error)
            failure = step_error(ctx, Phase.PLACEMENT, detail, "placement_group", error)
            raise_from(failure, failure.__cause__)
        return group

    async def nodes(self, group: PlacementGroup) -> list[NodeInfo]:
        """Return the nodes to initialize, each once, in bundle order."""
        nodes = await threads.run_in_thread(self._platform.nodes_of, group)
        if self._ctx.node not in nodes and self._platform.in_replica():
            # The engine's core runs in the replica's process and reads the model's config and
            # tokenizer there, also when a callback has placed the workers elsewhere.
            nodes.insert(0, self._ctx.node)
        return nodes

    def remove(self, but: PlacementGroup | None = None) -> None:
        """Remove the groups that this initialization has made, ``but`` one that is in use."""
        for group in [group for group in self._made if group is not but]:
            self._made.remove(group)
            self._platform.remove_placement_group(group)
            text = "removed placement group %s, which this initialization had made"
            extra = fields(phase=Phase.CLEAN_UP, node=self._ctx.node.id)
            logger.info(text, group.id.hex(), extra=extra)

    def _warn_of_reserved(self) -> None:
        """Warn of what a callback that replaces the group of a replica leaves behind."""
        reserved = self._platform.current_placement_group()
        if reserved is None or self._given is None or self._ctx.placement_group is self._given:
            return
        setter = self._ctx.trace.who_changed("placement_group")
        logger.warning(
            "callback %r replaced the placement group that Ray Serve made for this replica; that "
            "one, bundles %s, stays reserved as long as the replica lives; to have only one, set "
            "placement_group_config of the LLMConfig instead",
            setter.callback if setter else None,
            self._given.bundle_specs,
            extra=call_fields(setter) if setter else {},
        )


def refuse_unplaceable(config: LLMConfig) -> None:
    """Raise if the cluster can never hold what Serve reserves for a replica of this config.

    It is called where a deployment is built: Serve starts no replica before it has the group, so
    nothing in a replica could say that it never will. Where an autoscaler runs it only warns, and
    waits for one that has not reported yet. Does nothing without a cluster, or in an actor.

    Raises:
        PlacementError: Names the bundle, what the nodes have, and what to change.
    """
    if not _ray.may_build_deployments():
        return
    bundles, strategy = _ray.replica_bundles(config)
    started = time.monotonic()
    try:
        while bundles:
            patient = time.monotonic() - started < _AUTOSCALER_STARTS_S
            unsure = patient and _ray.autoscaler_runs() is None
            if not unsure or not _impossible(bundles, strategy)[0]:
                break
            time.sleep(_POLL_S)
        _refuse_impossible(bundles, strategy, patient=False)
    except PlacementError as error:
        raise PlacementError(f"deployment of {config.model_id!r}: {error}") from None


def _refuse_impossible(
    bundles: Sequence[Mapping[str, float]],
    strategy: str,
    patient: bool,
    extra: Mapping[str, object] | None = None,
    platform: Platform = _ray,
) -> None:
    """Raise if the cluster can never hold the group, and nothing adds nodes to it.

    ``patient`` is whether an autoscaler that has not reported may still start; ``extra`` is that of
    a log record.
    """
    problem, have = _impossible(bundles, strategy, platform)
    if not problem:
        return
    scaled = platform.autoscaler_runs()
    if scaled or (scaled is None and patient):
        text = "%s: %s; waiting for an autoscaler to add nodes"
        logger.warning(text, problem, have, extra=extra)
        return
    raise PlacementError(
        f"{problem}, and no autoscaler runs that would add one: {have}; ask for less in "
        "placement_group_config, or where the group is made, or add nodes"
    )


def _impossible(
    bundles: Sequence[Mapping[str, float]], strategy: str, platform: Platform = _ray
) -> tuple[str, str]:
    """Return what the cluster can never hold, or nothing, and what its nodes have."""
    nodes = platform.live_nodes()
    problem = _too_much(bundles, strategy, [resources for _, resources in nodes])
    return problem, "; ".join(f"node {node} has {_shown(resources)}" for node, resources in nodes)


def _too_much(
    bundles: Sequence[Mapping[str, float]], strategy: str, nodes: Sequence[Mapping[str, float]]
) -> str:
    """Return what the nodes can never hold, whatever else runs on them; nothing if they can."""
    bundles = [dict(sorted(bundle.items())) for bundle in bundles]  # in one order on each Ray
    together = dict(sorted(sum((Counter(bundle) for bundle in bundles), Counter()).items()))
    if strategy == "STRICT_PACK" and len(bundles) > 1 and not _fits(together, nodes):
        return f"no node can hold all bundles of a STRICT_PACK group, together {together}"
    for bundle in bundles:
        if not _fits(bundle, nodes):
            return f"no node can hold bundle {bundle}"
    apart = strategy == "STRICT_SPREAD"
    if apart and not _placeable(bundles, nodes, apart):
        return (
            f"no {len(bundles)} nodes are there for the bundles of a STRICT_SPREAD group, {bundles}"
        )
    if not _fits(together, [sum((Counter(node) for node in nodes), Counter())]):
        return f"no nodes can hold all bundles, together {together}"
    if not apart and not _placeable(bundles, nodes, apart):
        return f"no nodes can hold all bundles, each on one, {list(map(dict, bundles))}"
    return ""


def _placeable(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]], apart: bool
) -> bool:
    """Return whether there is a node for each bundle; True where it takes long to find out.

    ``apart`` is whether no node may have two of them.
    """
    if len(bundles) > _MOST_BUNDLES:
        return not apart or len(bundles) <= len(nodes)
    names = sorted({name for bundle in bundles for name in bundle})
    free = [tuple(node.get(name, 0.0) for name in names) for node in nodes]
    wanted = sorted((tuple(b.get(name, 0.0) for name in names) for b in bundles), reverse=True)
    steps = itertools.count()

    def place(index: int) -> bool:
        if index == len(wanted) or next(steps) > _MOST_STEPS:
            return True
        for node in set(free):  # those that are alike are one choice
            left = tuple(has - asked for has, asked in zip(node, wanted[index], strict=True))
            if min(left, default=0.0) < -_ROUNDING:
                continue
            number = free.index(node)
            free[number] = (-1.0,) * len(names) if apart else left
            if place(index + 1):
                return True
            free[number] = node
        return False

    return place(0)


def _fits(wanted: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> bool:
    return any(
        all(node.get(name, 0) >= wanted[name] - _ROUNDING for name in wanted) for node in nodes
    )


def _shown(resources: Mapping[str, float]) -> dict[str, float]:
    """Return what people give out of a node's resources, not what Ray adds for itself."""
    own = ("node:", "object_store_memory")
    return {
        name: resources[name]
        for name in sorted(resources)
        if not name.startswith(own) and "_group_" not in name
    }
