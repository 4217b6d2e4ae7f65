"""The one place that touches Ray's internal parts; `tests/cluster/test__ray.py` watches them.

Importing this module does not import Ray: node processes and the driver must stay light, and each
function imports what it needs. Everything here was read in Ray 2.60; where another minor differs,
the feature is probed for, and a comment says in which minor it came.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterable
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster.versions import check_ray, imports_explained
from rayserve_hooks.context import NodeInfo, NodeModelDownloadable

if TYPE_CHECKING:
    from ray.llm._internal.common.callbacks.base import CallbackBase as CallbackBase  # noqa: PLC0414 - for mypy it is exported so
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig as LLMConfig  # noqa: PLC0414 - as above
    from ray.util.placement_group import PlacementGroup

    from rayserve_hooks.core.stack import CallbackStack
    from rayserve_hooks.download.model import Mirror

HOOKS_CALLBACK = "rayserve_hooks.HooksCallback"
_SLOT = "rayserve_hooks.cluster.slot"
_CALLBACK_BASE = ("ray.llm._internal.common.callbacks.base", "CallbackBase")


def __getattr__(name: str) -> Any:
    # The classes that this package subclasses: where Ray and vLLM are needed first.
    if name not in ("CallbackBase", "LLMConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "CallbackBase":
        return _rays_own_class()
    check_ray()
    with imports_explained():
        from ray.serve.llm import LLMConfig

        return LLMConfig


def runs_hooks(named: str | type) -> bool:
    """Return whether a ``callback_class`` is ours, or Ray's default, which does nothing."""
    if isinstance(named, str):
        return named.replace(":", ".") in (HOOKS_CALLBACK, f"{_SLOT}.HooksCallback")
    return (named.__module__, named.__name__) == _CALLBACK_BASE or is_hooks_callback(named)


def is_ray_callback(cls: type) -> bool:
    """Return whether a class is written for Ray's own slot; Ray is not imported to find out."""
    return any((base.__module__, base.__name__) == _CALLBACK_BASE for base in cls.__mro__)


def is_hooks_callback(cls: type) -> bool:
    """Return whether a class is our own adapter to Ray's slot."""
    return any(base.__module__ == _SLOT for base in cls.__mro__)


def is_run_as_usual(callback: CallbackBase | type, runner: str) -> bool:
    """Return whether a Ray callback leaves it to Ray how its methods are run and fail.

    The two private methods are those that Ray's ``run_callback`` and ``run_callback_sync`` are
    made of.
    """
    rays = _rays_own_class()
    names = (runner, "_get_method", "_handle_callback_error")
    return not any(overrides(callback, getattr(rays, name)) for name in names)


def overrides(callback: CallbackBase | type, method: Callable[..., Any]) -> bool:
    """Return whether a Ray callback, an instance or its class, has not Ray's own ``method``."""
    found = getattr(callback, method.__name__)
    return getattr(found, "__func__", found) is not method


def does_nothing(cls: type) -> bool:
    """Return whether a class of Ray's kind brings nothing that Ray, or Python, would call."""
    rays = _rays_own_class()
    names = {name for base in cls.__mro__ for name in vars(base)}
    of_rays = {name: getattr_static(rays, name, None) for name in names if name != "__class__"}
    return not any(
        found is not None and callable(found) and getattr_static(cls, name) is not found
        for name, found in of_rays.items()
    )


def _rays_own_class() -> type[CallbackBase]:
    check_ray()
    with imports_explained():
        from ray.llm._internal.common.callbacks.base import CallbackBase  # exported nowhere

        return CallbackBase


def download_mode_of_ray(mode: NodeModelDownloadable) -> Any:
    """Return the member of Ray's own enum."""
    from ray.llm._internal.common.utils import download_utils

    return download_utils.NodeModelDownloadable[mode.name]


def hooks_callback_config(stack: CallbackStack, raise_error: bool) -> CallbackConfig:
    """Return a ``callback_config`` that names our adapter, with a stack instead of YAML's list."""
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    return CallbackConfig(HOOKS_CALLBACK, {"stack": stack}, raise_error)


def in_replica() -> bool:
    """Return whether this process is a Serve replica."""
    return _replica_context() is not None


def deployment_name(model_id: str) -> str:
    """Return this process's application and deployment; outside of a replica the model's id."""
    context = _replica_context()
    return f"{context.app_name}/{context.deployment}" if context else model_id


def _replica_context() -> Any:
    # Importing ray.serve to find out would cost a driver or node process half a second.
    if "ray.serve" not in sys.modules:
        return None
    from ray.serve.context import _get_internal_replica_context

    return _get_internal_replica_context()


def _engine(config: LLMConfig) -> Any:
    """Return the engine's part of a config. Ray annotates it as optional, but it never is."""
    # Ours checks there what Serve is about to reserve, which is not what is being done here.
    unchecked = getattr(type(config), "unchecked_engine_config", None)
    with imports_explained():
        return unchecked(config) if unchecked else config.get_engine_config()


def default_download_mode(config: LLMConfig) -> NodeModelDownloadable:
    """Return what Ray downloads by itself: nothing where the engine streams the weights."""
    from ray.llm._internal.common.utils.download_utils import STREAMING_LOAD_FORMATS

    if config.engine_kwargs.get("load_format") in STREAMING_LOAD_FORMATS:
        return NodeModelDownloadable.NONE
    return NodeModelDownloadable.MODEL_AND_TOKENIZER


def initial_runtime_env(config: LLMConfig) -> dict[str, Any]:
    """Return the runtime environment that Ray would use, as a copy.

    Ray's own builder writes into the config's dict, so that a change made by a callback could
    not be told from what the config says.
    """
    engine = _engine(config)
    scratch = engine.model_copy(update={"runtime_env": copy.deepcopy(engine.runtime_env)})
    return scratch.get_runtime_env_with_local_env_vars()  # type: ignore[no-any-return]


def current_placement_group() -> PlacementGroup | None:
    """Return the group this process runs in: Serve's, in a replica."""
    from ray.util.placement_group import get_current_placement_group

    return get_current_placement_group()


def may_build_deployments() -> bool:
    """Return whether Serve may build a deployment in this process: a driver, or a task of Serve's.

    An actor, such as a replica or a node's process, runs where groups have been had.
    """
    import ray

    if not ray.is_initialized() or ray.util.client.ray.is_connected():
        return False
    return ray.get_runtime_context().get_actor_id() is None and current_placement_group() is None


def replica_bundles(config: LLMConfig) -> tuple[list[dict[str, float]], str]:
    """Return what Serve reserves for a replica, and the strategy; no bundles if it does not.

    As ``LLMServer.get_deployment_options``, which cannot be asked: it asks the config for its
    engine. The replica's own actor is in the first bundle.
    """
    engine = _engine(config)
    accelerator = getattr(engine, "accelerator", None)
    if getattr(accelerator, "requires_deferred_placement_group", False):  # of a TPU's topology
        return [], ""
    options = config.deployment_config.get("ray_actor_options") or {}
    actor = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
    actor |= options.get("resources") or {}
    if "memory" in options:
        actor["memory"] = options["memory"]
    first, *others = engine.placement_bundles or [{}]
    merged = {name: first.get(name, 0) + actor.get(name, 0) for name in {**first, **actor}}
    bundles = [merged, *others]
    wanted = [{name: amount for name, amount in b.items() if amount} for b in bundles]
    return wanted, engine.placement_strategy


def strategy_of(group: PlacementGroup) -> str:
    """Return how a group's bundles are spread over nodes, such as ``"PACK"``."""
    from ray.util.placement_group import placement_group_table

    return placement_group_table(group)["strategy"]  # type: ignore[no-any-return]


def create_default_placement_group(config: LLMConfig) -> PlacementGroup:
    """Create the group Ray would create for the engine outside of a Serve replica."""
    return _engine(config).get_or_create_pg()  # type: ignore[no-any-return]


def model_source(config: LLMConfig) -> tuple[str, Mirror | None]:
    """Return the engine's model id or path, and the bucket it is mirrored in, if any."""
    engine = _engine(config)
    model_id, mirror = engine.actual_hf_model_id, engine.mirror_config
    if mirror is None:
        return _mirror_of_uri(config, model_id)
    from rayserve_hooks.download.model import Mirror

    extra = tuple((file.bucket_uri, file.destination_path) for file in mirror.extra_files)
    return model_id, Mirror(mirror.bucket_uri, extra)


def _mirror_of_uri(config: LLMConfig, model_id: str) -> tuple[str, Mirror | None]:
    """Make a mirror of a ``model_source`` that is a URI, as Ray's engine config does since 2.57.

    Before, the URI is the engine's model id, and only Ray's own download knows it for a mirror.
    """
    from ray.llm._internal.common.utils.cloud_utils import is_remote_path

    loading: Any = config.model_loading_config  # Ray annotates it as a dict, too, but reads none
    if model_id != loading.model_source or not is_remote_path(model_id):
        return model_id, None
    from rayserve_hooks.download.model import Mirror

    return config.model_id, Mirror(model_id)


def stream_from_mirror(config: LLMConfig) -> None:
    """Make an engine that streams the weights, and has no path of its own, read the mirror.

    Ray itself does since 2.59 (``_resolve_hf_model_id_from_mirror``). Before, the engine gets the
    model's id, which names nothing in a store; a URI as ``model_source`` before 2.57 excepted.
    """
    engine = _engine(config)
    mirror = engine.mirror_config
    streams = default_download_mode(config) is NodeModelDownloadable.NONE
    if streams and mirror and mirror.bucket_uri and engine.actual_hf_model_id == config.model_id:
        set_model_path(config, mirror.bucket_uri)


def set_model_path(config: LLMConfig, path: str) -> None:
    """Make the engine load the model from ``path``."""
    _engine(config).hf_model_id = path


def set_engine_kwargs(config: LLMConfig, kwargs: dict[str, Any]) -> None:
    """Merge keyword arguments into the engine's.

    ``update_engine_kwargs`` alone would pass an argument of vLLM's front end on to the engine,
    and an unknown one would fail much later; building the engine config anew sorts and checks
    them as Ray does for the configured ones. An unknown one is a ``ValueError``.
    """
    engine = _engine(config)
    before = dict(config.engine_kwargs)
    config.update_engine_kwargs(**kwargs)
    try:
        fresh = type(engine).from_llm_config(config)
    except ValueError:
        config.engine_kwargs.clear()
        config.engine_kwargs.update(before)
        raise
    for name in kwargs:
        if name in fresh.frontend_kwargs:
            engine.frontend_kwargs[name] = engine.engine_kwargs.pop(name)


def own_node() -> NodeInfo:
    """Return the node of this process."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return NodeInfo(node_id, ray.util.get_node_ip_address(), is_local=True)


def nodes_of(group: PlacementGroup) -> list[NodeInfo]:
    """Return the nodes of a ready placement group, each once, in bundle order."""
    import ray
    from ray.util.placement_group import placement_group_table

    bundles = placement_group_table(group)["bundles_to_node_id"]
    ids = dict.fromkeys(bundles[index] for index in sorted(bundles))
    own = own_node()
    if set(ids) == {own.id}:  # asking Ray for all nodes costs a round trip
        return [own]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [NodeInfo(node, addresses.get(node, "?"), is_local=node == own.id) for node in ids]


def live_nodes() -> list[tuple[NodeInfo, dict[str, float]]]:
    """Return the cluster's nodes, this one first, with all resources they have, used or not."""
    import ray

    own = own_node()
    nodes = [
        (
            NodeInfo(node["NodeID"], node["NodeManagerAddress"], node["NodeID"] == own.id),
            node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    # Ray's order is that of random ids.
    return sorted(nodes, key=lambda node: (not node[0].is_local, node[0].id))


def autoscaler_runs() -> bool | None:
    """Return whether an autoscaler may add nodes; None where none has reported yet.

    Ray's monitor reports in a cluster that nothing scales, too, as a provider that only reads:
    the type of each node is then named after the node itself.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        nodes = (*status.active_nodes, *status.idle_nodes)
        launched = (*status.pending_nodes, *status.pending_launches)
        return bool(launched) or _scaled(node.ray_node_type_name for node in nodes)
    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report")
    if not report:
        return None
    return _scaled([*report["active_nodes"], *report["pending_launches"]])


def _scaled(node_types: Iterable[str]) -> bool:
    """Return whether any node type is one that an autoscaler was given."""
    return any(re.fullmatch("node_[0-9a-f]+", node_type) is None for node_type in node_types)
