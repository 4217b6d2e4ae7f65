"""The simulated cluster: nodes, placement groups, and what the path asks of Ray."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.node_actor import NodeActor
from rayserve_hooks.cluster.travel import NodeRequest
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeModelDownloadable
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.download.model import Mirror
from rayserve_hooks.testing.config import ModelConfig, ModelConfigs
from rayserve_hooks.testing.processes import EngineProcesses, NodeProcess, process_of
from rayserve_hooks.testing.travel import arrived, sent

if TYPE_CHECKING:
    from rayserve_hooks.cluster.remote_node import RemoteNode

_numbers = itertools.count(1)


class _Id(str):
    __slots__ = ()

    def hex(self) -> str:
        return str(self)


@dataclass
class Group:
    """A simulated placement group, which a callback may assign in place of Ray's.

    Args:
        bundles: Its bundles.
        nodes: The numbers of the nodes that they are on, the replica's own being 1; by default
            one after the other, and round again.
        strategy: How they are spread.
    """

    bundles: Sequence[Mapping[str, float]]
    nodes: Sequence[int] | None = None
    strategy: str = "PACK"
    id: Any = field(default_factory=lambda: _Id(f"group-{next(_numbers)}"))
    removed: bool = False

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        return [dict(bundle) for bundle in self.bundles]

    def wait(self, timeout_seconds: float = 30) -> bool:
        return not self.removed


class Cluster:
    """Nodes ``node-1``, where the replica is, to ``node-N``, and what the path asks of Ray."""

    def __init__(self, nodes: int, config: Any, engine_processes: Sequence[str] | None) -> None:
        self.nodes = [
            NodeInfo(f"node-{number}", f"10.0.0.{number}", is_local=number == 1)
            for number in range(1, nodes + 1)
        ]
        self._configs: Any = ModelConfigs if isinstance(config, ModelConfig) else _ray
        workers = (f"worker {rank}" for rank in range(nodes) if nodes > 1)
        names = ["engine core", *workers] if engine_processes is None else engine_processes
        self._engine_processes = [process_of(name, self.nodes) for name in names]
        self._group: Group | None = None
        self.processes: list[NodeProcess] = []
        self.stack: CallbackStack | None = None  # as on_configure leaves it

    def deploy(self, config: Any) -> None:
        """Reserve what a replica of a config runs on."""
        self._group = self._group_of(config)

    def _group_of(self, config: Any) -> Group:
        settings = config.placement_group_config or {}
        bundles = settings.get("bundles") or [{"CPU": 1.0} for _ in self.nodes]
        return Group(bundles, strategy=settings.get("strategy", "PACK"))

    # Where this process is, and what it has.

    def in_replica(self) -> bool:
        return self._group is not None

    def own_node(self) -> NodeInfo:
        return self.nodes[0]

    def current_placement_group(self) -> Group | None:
        return self._group

    # Placement groups.

    def create_default_placement_group(self, config: Any) -> Group:
        return self._group_of(config)

    def remove_placement_group(self, group: Group) -> None:
        group.removed = True

    def nodes_of(self, group: Group) -> list[NodeInfo]:
        count = len(self.nodes)
        numbers = getattr(group, "nodes", None) or range(1, len(group.bundle_specs) + 1)
        return list(dict.fromkeys(self.nodes[(number - 1) % count] for number in numbers))

    def strategy_of(self, group: Group) -> str:
        return group.strategy

    def live_nodes(self) -> list[tuple[NodeInfo, dict[str, float]]]:
        return [(node, {}) for node in self.nodes]

    def autoscaler_runs(self) -> bool | None:
        return False

    # Other nodes.

    def start_node_process(
        self, request: NodeRequest, attempt: int, runtime_env: dict[str, Any]
    ) -> NodeProcess:
        request, attempt, _ = sent((request, attempt, runtime_env))
        request = replace(request, stack=arrived(request.stack))
        process = NodeProcess(NodeActor(request, attempt))
        self.processes.append(process)
        return process

    # The engine's processes.

    def engine_processes(
        self, manager: PluginManager, ctx: CallbackCtx, others: Sequence[RemoteNode]
    ) -> EngineProcesses:
        return EngineProcesses(manager, ctx, self._engine_processes)

    # The config, where the app is built.

    def node_where_built(self) -> NodeInfo | None:
        return None

    def deployed_variables(self, config: Any) -> dict[str, str]:
        variables: dict[str, str] = self._configs.deployed_variables(config)
        return variables

    def changed(self, config: Any, update: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = self._configs.changed(config, update)
        return changed

    def reconfigured(self, config: Any, update: dict[str, Any], stack: CallbackStack) -> Any:
        self.stack = stack
        return self._configs.reconfigured(config, update, stack)

    # The config, in the replica.

    def default_download_mode(self, config: Any) -> NodeModelDownloadable:
        mode: NodeModelDownloadable = self._configs.default_download_mode(config)
        return mode

    def initial_runtime_env(self, config: Any) -> dict[str, Any]:
        environment: dict[str, Any] = self._configs.initial_runtime_env(config)
        return environment

    def model_source(self, config: Any) -> tuple[str, Mirror | None]:
        source: tuple[str, Mirror | None] = self._configs.model_source(config)
        return source

    def stream_from_mirror(self, config: Any) -> None:
        self._configs.stream_from_mirror(config)

    def set_model_path(self, config: Any, path: str) -> None:
        self._configs.set_model_path(config, path)

    def set_engine_kwargs(self, config: Any, kwargs: dict[str, Any]) -> None:
        self._configs.set_engine_kwargs(config, kwargs)
