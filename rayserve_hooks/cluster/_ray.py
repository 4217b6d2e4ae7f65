"""The one place that touches Ray's internal parts; `tests/cluster/test__ray.py` watches them.

Importing this module does not import Ray: node processes and the driver must stay light, and each
function imports what it needs. Everything here was read in Ray 2.60; where another minor differs,
the feature is probed for, and a comment says in which minor it came.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import getattr_static
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster.versions import check_ray, imports_explained
from rayserve_hooks.context import NodeInfo, NodeModelDownloadable
from rayserve_hooks.errors import InstallationError, describe

if TYPE_CHECKING:
    from ray.llm._internal.common.callbacks.base import CallbackBase as CallbackBase  # noqa: PLC0414 - for mypy it is exported so
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.llm._internal.serve.engines.sglang import SGLangServer as SGLangServer  # noqa: PLC0414 - as above
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine as VLLMEngine  # noqa: PLC0414 - as above
    from ray.serve.llm import LLMConfig as LLMConfig  # noqa: PLC0414 - as above
    from ray.util.placement_group import PlacementGroup

    from rayserve_hooks.cluster.engine_processes import EngineProcesses
    from rayserve_hooks.cluster.node_process import RayNodeProcess
    from rayserve_hooks.cluster.remote_node import RemoteNode
    from rayserve_hooks.cluster.travel import NodeRequest
    from rayserve_hooks.context import CallbackCtx
    from rayserve_hooks.core.manager import PluginManager
    from rayserve_hooks.core.stack import CallbackStack
    from rayserve_hooks.download.model import Mirror

HOOKS_CALLBACK = "rayserve_hooks.HooksCallback"
HOOKS_ENGINE = "rayserve_hooks.cluster.engine.HooksEngine"
ENGINE_VARIABLE = "RAYLLM_VLLM_ENGINE_CLS"  # read where a replica's server is made
BASE_VARIABLE = "RAYSERVE_HOOKS_ENGINE_BASE"  # what ENGINE_VARIABLE named before us
_SLOT = "rayserve_hooks.cluster.slot"
_SGLANG = "ray.llm._internal.serve.engines.sglang"
_PD_BUILDER = "llm/_internal/serve/serving_patterns/prefill_decode/builder.py"
_CALLBACK_BASE = ("ray.llm._internal.common.callbacks.base", "CallbackBase")


def __getattr__(name: str) -> Any:
    # The classes that this package subclasses: where Ray and vLLM are needed first.
    if name not in ("CallbackBase", "LLMConfig", "SGLangServer", "VLLMEngine"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "CallbackBase":
        return _rays_own_class()
    if name == "VLLMEngine":
        return _engine_class()
    check_ray()
    with imports_explained():
        if name == "SGLangServer":
            from ray.llm._internal.serve.engines.sglang import SGLangServer

            return SGLangServer
        from ray.serve.llm import LLMConfig

        return LLMConfig


def _engine_class() -> type[VLLMEngine]:
    """Return the engine class that a replica would have without us: the user's, or Ray's."""
    named = os.environ.get(BASE_VARIABLE)
    if not named:
        with imports_explained():
            from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
        return VLLMEngine
    module, _, attribute = named.replace(":", ".").rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs code of others
        raise InstallationError(
            f"{ENGINE_VARIABLE} names {named!r}, which cannot be imported in the replica: "
            f"{describe(error)}; name an engine class as 'pkg.module.Class'"
        ) from error
    if not (isinstance(found, type) and hasattr(found, "start")):
        raise InstallationError(
            f"{ENGINE_VARIABLE} names {named!r}, which is no engine class; name one as "
            "'pkg.module.Class', such as a subclass of Ray's VLLMEngine"
        )
    return found


def name_engine(config: LLMConfig) -> None:
    """Make the replicas of a config run our engine class, on top of the one that they would have.

    Called where a deployment is built; Ray reads the variable in a replica, where
    ``LLMServer._get_default_engine_class`` finds the class.
    """
    variables = deployed_variables(config)
    named = variables.get(ENGINE_VARIABLE) or os.environ.get(ENGINE_VARIABLE)
    if named is None:  # of a server class of the user's own
        engine = getattr(config.server_cls, "_default_engine_cls", None)
        named = engine and f"{engine.__module__}.{engine.__qualname__}"
    if variables.get(ENGINE_VARIABLE) == HOOKS_ENGINE:
        return
    variables[ENGINE_VARIABLE] = HOOKS_ENGINE
    if named and named != HOOKS_ENGINE:
        variables[BASE_VARIABLE] = named
    config.runtime_env = {**(config.runtime_env or {}), "env_vars": variables}


def deployed_variables(config: LLMConfig) -> dict[str, str]:
    """Return the environment variables that Serve would deploy a replica with, as a copy.

    As ``LLMServer.get_deployment_options``: those of the first of these that has any.
    """
    import ray

    options = config.deployment_config.get("ray_actor_options") or {}
    job = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    for runtime_env in (config.runtime_env, options.get("runtime_env"), job):
        if runtime_env and "env_vars" in runtime_env:
            return dict(runtime_env["env_vars"] or {})
    return {}


def engine_client(engine: VLLMEngine) -> Any:
    """Return vLLM's client of an engine; None before there is one."""
    return getattr(engine, "_engine_client", None)


def stop_engine(engine: VLLMEngine) -> None:
    """End the processes of an engine whose start has failed in the end."""
    client = engine_client(engine)
    if client is not None:
        with contextlib.suppress(
            Exception
        ):  # the failure is what counts, and the process ends soon
            client.shutdown()


def engine_runs(engine: VLLMEngine) -> bool:
    """Return whether an engine has started."""
    return bool(getattr(engine, "_running", False))


def grace_s(config: LLMConfig) -> float:
    """Return how long a replica may take to end, once it has waited for requests the first time."""
    options = config.deployment_config  # with Serve's defaults
    whole: float = options.get("graceful_shutdown_timeout_s", 20.0)
    wait: float = options.get("graceful_shutdown_wait_loop_s", 2.0)
    return whole - wait


def awaits_shutdown() -> bool:
    """Return whether Ray shuts an engine down when Serve stops its replica: since 2.58."""
    from ray.serve.llm import LLMServer

    return hasattr(LLMServer, "__del__")


def is_hooks_slot(named: str | type) -> bool:
    """Return whether a ``callback_class`` is ours, and not Ray's default."""
    return runs_hooks(named) and (isinstance(named, str) or is_hooks_callback(named))


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
    with imports_explained():
        from ray.llm._internal.common.utils import download_utils

    return download_utils.NodeModelDownloadable[mode.name]


def hooks_callback_config(stack: CallbackStack, raise_error: bool) -> CallbackConfig:
    """Return a ``callback_config`` that names our adapter, with a stack instead of YAML's list."""
    from ray.llm._internal.common.callbacks.base import CallbackConfig

    return CallbackConfig(HOOKS_CALLBACK, {"stack": stack}, raise_error)


def callback_made(config: LLMConfig) -> CallbackBase | None:
    """Return the callback that a config has made already."""
    return config._callback_instance  # noqa: SLF001 - Ray offers no way to ask


def set_callback(config: LLMConfig, callback: CallbackBase | None) -> None:
    """Make ``get_or_create_callback`` of a config return a callback, or make one anew."""
    config._callback_instance = callback  # noqa: SLF001 - as above


def changed(config: LLMConfig, update: dict[str, Any]) -> dict[str, Any]:
    """Return what else changes in a config with ``update``, checked as Ray checks it.

    Raises:
        ValueError: Ray refuses the config, or an engine argument is unknown.
    """
    from ray.serve.llm import LLMConfig

    ours = {*type(config).model_fields} - {*LLMConfig.model_fields}
    fields = {
        name: getattr(config, name) for name in config.model_fields_set - ours - {"callback_config"}
    }
    derived = {name: value for name, value in fields.items() if name != "accelerator_config"}
    # Ray writes into the config what it has inferred of the bundles, or by default.
    inferred = LLMConfig.model_validate(copy.deepcopy(derived)).accelerator_config
    if inferred == config.accelerator_config:
        fields = derived
    with imports_explained():
        checked = LLMConfig.model_validate(copy.deepcopy(fields | update))
        checked.get_engine_config()
    return {**update, "accelerator_config": checked.accelerator_config}


def reconfigured(config: LLMConfig, update: dict[str, Any], stack: CallbackStack) -> LLMConfig:
    """Return a config with what ``on_configure`` has changed, and with its stack."""
    raises = config.callback_config.raise_error_on_callback
    update = {**update, "callback_config": hooks_callback_config(stack, raises)}
    changed = config.model_copy(update=update)
    forget_engine(changed)
    set_callback(changed, None)
    return changed


def forget_engine(config: LLMConfig) -> None:
    """Have a config make its engine's part anew, since it has been changed."""
    config._engine_config = None  # noqa: SLF001 - Ray offers no way


def takes_a_proxy() -> bool:
    """Return whether a prefill and decode app may have ``proxy_cls_config``; until Ray 2.59."""
    return "proxy_cls_config" in _pd_builder()


def compares_adapters() -> bool:
    """Return whether prefill and decode must have the same LoRA adapters; since Ray 2.60."""
    return "_validate_lora_configs" in _pd_builder()


@functools.cache
def _pd_builder() -> str:
    """Return Ray's source of the builder; importing it would take seconds, and an engine."""
    try:
        found = importlib.util.find_spec("ray")
    except (ImportError, ValueError):  # somebody hides it
        return ""
    file = Path(found.origin).parent / _PD_BUILDER if found and found.origin else None
    return file.read_text("utf-8") if file and file.is_file() else ""


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


def runs_no_callbacks(server_cls: object) -> bool:
    """Return whether a ``server_cls``, a name or a class, is Ray's own for SGLang."""
    module = server_cls if isinstance(server_cls, str) else getattr(server_cls, "__module__", "")
    return re.match(_SGLANG + r"\b", str(module)) is not None


def set_engine(config: LLMConfig, engine: Any) -> None:
    """Make an object the engine's part of a config, in place of the one that Ray makes for vLLM."""
    config._engine_config = engine  # noqa: SLF001 - what `get_engine_config` returns from then on


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


def has_placement_group() -> bool:
    """Return whether this process runs in a group; one that is not connected does not connect."""
    import ray

    return ray.is_initialized() and current_placement_group() is not None


def may_build_deployments() -> bool:
    """Return whether Serve may build a deployment in this process: a driver, or a task of Serve's.

    An actor, such as a replica or a node's process, runs where groups have been had.
    """
    import ray

    if not ray.is_initialized() or ray.util.client.ray.is_connected():
        return False
    return not in_actor() and current_placement_group() is None


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


def remove_placement_group(group: PlacementGroup) -> None:
    """Free the bundles of a group."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def start_node_process(
    request: NodeRequest, attempt: int, runtime_env: dict[str, Any]
) -> RayNodeProcess:
    """Start the process that initializes another node."""
    from rayserve_hooks.cluster.node_process import RayNodeProcess

    return RayNodeProcess(request, attempt, runtime_env)


def engine_processes(
    manager: PluginManager, ctx: CallbackCtx, others: Sequence[RemoteNode]
) -> EngineProcesses:
    """Return what runs hooks in the processes that vLLM starts."""
    from rayserve_hooks.cluster import engine_processes as vllms

    return vllms.EngineProcesses(manager, ctx, others)


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


def engine_config_is_made_by_a_task(config: LLMConfig) -> bool:
    """Return whether Ray makes vLLM's config in a task, as it does for a GPU."""
    accelerator = getattr(_engine(config), "accelerator", None)
    return bool(getattr(accelerator, "requires_remote_initialization", False))


def connected_node() -> str | None:
    """Return the id of the node of a process that is connected to Ray, which others are not."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return ray.get_runtime_context().get_node_id()  # type: ignore[no-any-return]


def adapter_folder(config: LLMConfig, name: str) -> str:
    """Return where Ray's loader puts a LoRA adapter (``LoraModelLoader._model_dir_path``)."""
    from ray.llm._internal.common.utils.lora_utils import clean_model_id, get_lora_id
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    root = LoraModelLoader().lora_root
    return str(Path(root, get_lora_id(clean_model_id(f"{config.model_id}:{name}"))))


def own_node() -> NodeInfo:
    """Return the node of this process."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return NodeInfo(node_id, ray.util.get_node_ip_address(), is_local=True)


def node_where_built() -> NodeInfo | None:
    """Return the node of this process, or None where it is connected to no cluster."""
    import ray

    return own_node() if ray.is_initialized() else None


def in_actor() -> bool:
    """Return whether this process is an actor's, such as a replica's."""
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def nodes_of(group: PlacementGroup) -> list[NodeInfo]:
    """Return the nodes of a ready placement group, each once, in bundle order.

    Of a group that several replicas share only those on which this one starts its engine.
    """
    import ray
    from ray.util.placement_group import placement_group_table

    bundles = placement_group_table(group)["bundles_to_node_id"]
    ids = dict.fromkeys(bundles[index] for index in _own_bundles(bundles))
    own = own_node()
    if set(ids) == {own.id}:  # asking Ray for all nodes costs a round trip
        return [own]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [NodeInfo(node, addresses.get(node, "?"), is_local=node == own.id) for node in ids]


def _own_bundles(bundles: Mapping[int, str]) -> list[int]:
    """Return the indices of this replica's bundles; all, unless it shares the group.

    The replicas of a data-parallel group share one since Ray 2.55, and ``DPServer`` leaves each
    one's bundles in a variable that vLLM reads.
    """
    named = os.environ.get("VLLM_RAY_BUNDLE_INDICES", "")
    own = {int(index) for index in named.split(",") if index.strip().isdecimal()}
    return sorted(own & bundles.keys()) or sorted(bundles)


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
