"""What this package stands on in Ray, name by name; `probe.py` looks whether a Ray has it.

Public names are among it: they move, too. All tested minors have all of it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Name:
    """A name that must be there.

    Attributes:
        module: Where it is imported from.
        name: The name in it; ``"Class.method"`` or ``"Class.field"`` for what a class defines.
        takes: Parameters that are passed, by position, in this order; ``**`` in front of one
            that must take all other keyword arguments.
        is_async: Whether it must be a coroutine function; None where that is all the same.
    """

    module: str
    name: str
    takes: tuple[str, ...] = ()
    is_async: bool | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Order:
    """Parts of a function's source that must come one after the other."""

    of: Name
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Feature:
    """What differs between the Rays that this package runs on, or ran on.

    Attributes:
        text: In words, for the table.
        of: The function, class or name that has it.
        part: What its source contains then; empty where the name itself is the feature.
        since: The first minor that has it.
        until: The first minor that has it no more.
    """

    text: str
    of: Name
    part: str
    since: str
    until: str | None = None


_ACCELERATORS = "ray.llm._internal.serve.core.configs.accelerators"
_CALLBACKS = "ray.llm._internal.common.callbacks.base"
_CLOUD = "ray.llm._internal.common.utils.cloud_utils"
_CONFIG = "ray.llm._internal.serve.core.configs.llm_config"
_DOWNLOAD = "ray.llm._internal.common.utils.download_utils"
_ENGINE = "ray.llm._internal.serve.engines.vllm.vllm_engine"
_ENGINE_CONFIG = "ray.llm._internal.serve.engines.vllm.vllm_models"
_LORA = "ray.llm._internal.common.utils.lora_utils"
_LORA_LOADER = "ray.llm._internal.serve.utils.lora_serve_utils"
_NODES = "ray.llm._internal.serve.utils.node_initialization_utils"
_PATTERNS = "ray.llm._internal.serve.serving_patterns"
_SERVER = "ray.llm._internal.serve.core.server.llm_server"
_GROUP = "ray.util.placement_group"

_USED = (
    # The slot: one callback class, named in the config.
    Name(
        _CALLBACKS,
        "CallbackBase.__init__",
        ("llm_config", "raise_error_on_callback", "ctx_kwargs", "**kwargs"),
    ),
    Name(_CALLBACKS, "CallbackBase.run_callback", ("method_name",), is_async=True),
    Name(_CALLBACKS, "CallbackBase.run_callback_sync", ("method_name",), is_async=False),
    Name(_CALLBACKS, "CallbackBase._get_method"),
    Name(_CALLBACKS, "CallbackBase._handle_callback_error"),
    Name(_CALLBACKS, "CallbackBase.on_before_node_init", is_async=True),
    Name(_CALLBACKS, "CallbackBase.on_after_node_init", is_async=True),
    Name(_CALLBACKS, "CallbackBase.on_before_download_model_files_distributed", is_async=False),
    Name(_CALLBACKS, "CallbackBase"),
    Name(
        _CALLBACKS,
        "CallbackConfig",
        ("callback_class", "callback_kwargs", "raise_error_on_callback"),
    ),
    Name(_CALLBACKS, "CallbackCtx.placement_group"),
    Name(_CALLBACKS, "CallbackCtx.runtime_env"),
    Name(_CALLBACKS, "CallbackCtx.custom_data"),
    Name(_CALLBACKS, "CallbackCtx.worker_node_download_model"),
    Name(_CALLBACKS, "CallbackCtx.run_init_node"),
    Name(_ENGINE, "VLLMEngine.start", is_async=True),
    # The deployment's config.
    Name("ray.serve.llm", "LLMConfig"),
    Name("ray.llm._internal.serve.engines.sglang", "SGLangServer"),
    Name(
        "ray.llm._internal.serve.engines.sglang.sglang_engine",
        "SGLangServer.__init__",
        ("self", "llm_config"),
        is_async=False,
    ),
    Name(
        "ray.llm._internal.serve.engines.sglang.sglang_engine",
        "SGLangServer.get_deployment_options",
        ("llm_config",),
    ),
    Name("ray.serve.llm", "build_openai_app", ("llm_serving_args",)),
    Name("ray.serve.llm", "build_dp_openai_app", ("dp_serving_args",)),
    Name("ray.serve.llm", "build_pd_openai_app", ("pd_serving_args",)),
    Name("ray.serve.llm", "LLMServer"),
    Name(_SERVER, "LLMServer._default_engine_cls"),
    Name(_SERVER, "LLMServer._get_default_engine_class"),
    Name(_ENGINE, "VLLMEngine"),
    Name(_CONFIG, "LLMConfig.get_or_create_callback", ("self",), is_async=False),
    Name(_CONFIG, "LLMConfig._callback_instance"),
    Name(_CONFIG, "LLMConfig._engine_config"),
    Name(_CONFIG, "LLMConfig.model_loading_config"),
    Name(_CONFIG, "LLMConfig.engine_kwargs"),
    Name(_CONFIG, "LLMConfig.placement_group_config"),
    Name(_CONFIG, "LLMConfig.deployment_config"),
    Name(_CONFIG, "LLMConfig.runtime_env"),
    Name(_CONFIG, "LLMConfig.callback_config"),
    Name(_CONFIG, "LLMConfig.model_id"),
    Name(_CONFIG, "LLMConfig._engine_config"),
    Name(_CONFIG, "LLMConfig.get_engine_config", ("self",), is_async=False),
    Name(_CONFIG, "LLMConfig.update_engine_kwargs", ("self", "**kwargs"), is_async=False),
    Name(_CONFIG, "ModelLoadingConfig.model_source"),
    # The engine's part of it.
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.hf_model_id"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.mirror_config"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.runtime_env"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.engine_kwargs"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.frontend_kwargs"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.actual_hf_model_id"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.accelerator"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.placement_bundles"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.placement_strategy"),
    Name(_ACCELERATORS, "AcceleratorBackend.requires_deferred_placement_group"),
    Name(_ACCELERATORS, "AcceleratorBackend.requires_remote_initialization"),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.get_or_create_pg", ("self",), is_async=False),
    Name(
        _ENGINE_CONFIG,
        "VLLMEngineConfig.get_runtime_env_with_local_env_vars",
        ("self",),
        is_async=False,
    ),
    Name(_ENGINE_CONFIG, "VLLMEngineConfig.from_llm_config", ("cls", "llm_config"), is_async=False),
    # Models and where they come from.
    Name(_CLOUD, "is_remote_path", ("path",)),
    Name(_CLOUD, "CloudMirrorConfig.bucket_uri"),
    Name(_CLOUD, "CloudMirrorConfig.extra_files"),
    Name(_CLOUD, "ExtraFiles.bucket_uri"),
    Name(_CLOUD, "ExtraFiles.destination_path"),
    Name("ray.llm._internal.common.utils", "download_utils"),
    Name(_DOWNLOAD, "STREAMING_LOAD_FORMATS"),
    Name(_DOWNLOAD, "NodeModelDownloadable.MODEL_AND_TOKENIZER"),
    Name(_DOWNLOAD, "NodeModelDownloadable.TOKENIZER_ONLY"),
    Name(_DOWNLOAD, "NodeModelDownloadable.EXCLUDE_SAFETENSORS"),
    Name(_DOWNLOAD, "NodeModelDownloadable.NONE"),
    # LoRA adapters.
    Name(_CONFIG, "LLMConfig.lora_config"),
    Name(_CONFIG, "LoraConfig.dynamic_lora_loading_path"),
    Name(_LORA, "clean_model_id", ("model_id",)),
    Name(_LORA, "get_lora_id", ("lora_model_id",)),
    Name(_LORA_LOADER, "LoraModelLoader._model_dir_path", ("self", "model_id")),
    Name(_LORA_LOADER, "LoraModelLoader"),
    # Serve.
    Name("ray.serve.context", "_get_internal_replica_context", is_async=False),
    Name("ray.serve", "get_replica_context"),
    Name("ray.serve.context", "ReplicaContext.app_name"),
    Name("ray.serve.context", "ReplicaContext.deployment"),
    Name("ray.serve._private.application_state", "build_serve_application"),
    Name("ray.serve.deployment", "Application"),
    # Nodes, placement groups and processes.
    Name("ray", "WORKER_MODE"),
    Name("ray", "__version__"),
    Name("ray", "cloudpickle"),
    Name("ray.cloudpickle", "CloudPickler"),
    Name("ray", "get"),
    Name("ray", "get_runtime_context"),
    Name("ray", "init"),
    Name("ray", "is_initialized"),
    Name("ray", "kill"),
    Name("ray", "nodes"),
    Name("ray", "remote"),
    Name("ray", "shutdown"),
    Name("ray.runtime_context", "RuntimeContext.gcs_address"),
    Name("ray.runtime_context", "RuntimeContext.get_actor_id", ("self",)),
    Name("ray.runtime_context", "RuntimeContext.get_node_id", ("self",)),
    Name("ray.runtime_context", "RuntimeContext.get_task_name", ("self",)),
    Name("ray.runtime_context", "RuntimeContext.runtime_env"),
    Name("ray.util", "get_node_ip_address"),
    Name("ray.util.client", "RayAPIStub.is_connected"),
    Name(_GROUP, "PlacementGroup.bundle_specs"),
    Name(_GROUP, "PlacementGroup.wait", ("self", "timeout_seconds")),
    Name(_GROUP, "PlacementGroup"),
    Name(_GROUP, "get_current_placement_group"),
    Name(_GROUP, "placement_group", ("bundles", "strategy")),
    Name(_GROUP, "placement_group_table", ("placement_group",)),
    Name(_GROUP, "remove_placement_group", ("placement_group",)),
    Name("ray.util.scheduling_strategies", "NodeAffinitySchedulingStrategy"),
    Name("ray.exceptions", "RayError"),
    Name("ray.exceptions", "RayTaskError"),
    # The autoscaler's reports.
    Name("ray.autoscaler.v2.sdk", "get_cluster_status", ("gcs_address",)),
    Name("ray.autoscaler.v2.utils", "is_autoscaler_v2"),
    Name("ray.autoscaler.v2.schema", "ClusterStatus.active_nodes"),
    Name("ray.autoscaler.v2.schema", "ClusterStatus.idle_nodes"),
    Name("ray.autoscaler.v2.schema", "ClusterStatus.pending_launches"),
    Name("ray.autoscaler.v2.schema", "ClusterStatus.pending_nodes"),
    Name("ray.autoscaler.v2.schema", "NodeInfo.ray_node_type_name"),
    Name("ray.experimental.internal_kv", "_internal_kv_get", ("key",)),
    # What people see.
    Name("ray.experimental", "tqdm_ray"),
    Name("ray.util.metrics", "Counter"),
)

SCHEMA = {
    "ServeDeploy": Name("ray.serve.schema", "ServeDeploySchema"),
    "Application": Name("ray.serve.schema", "ServeApplicationSchema"),
    "OpenAIArgs": Name("ray.llm._internal.serve.core.ingress.builder", "LLMServingArgs"),
    "DataParallelArgs": Name(f"{_PATTERNS}.data_parallel.builder", "DPOpenAiServingArgs"),
    "PrefillDecodeArgs": Name(f"{_PATTERNS}.prefill_decode.builder", "PDServingArgs"),
    "PrefillDecodeArgsWithProxy": Name(f"{_PATTERNS}.prefill_decode.builder", "PDServingArgs"),
    "LLMConfig": Name(_CONFIG, "LLMConfig"),
    "ModelLoadingConfig": Name(_CONFIG, "ModelLoadingConfig"),
    "ModelSource": Name(_CLOUD, "CloudMirrorConfig"),
    "IngressCls": Name("ray.llm._internal.serve.core.ingress.builder", "IngressClsConfig"),
    "LoraConfig": Name(_CONFIG, "LoraConfig"),
    "PlacementGroupConfig": Name("ray.llm._internal.common.placement", "PlacementGroupConfig"),
    "CallbackConfig": Name(_CALLBACKS, "CallbackConfig"),
}
"""Ray's classes for what `rayserve_hooks.cluster.ray_schema` reads, by its names."""

ORDERS = (
    # The engine reads what a callback may change only after it has called it.
    Order(
        Name(_ENGINE, "VLLMEngine.start"),
        (
            'run_callback("on_before_node_init")',
            "if callback.ctx.run_init_node",
            'run_callback("on_after_node_init")',
            "_prepare_engine_config(callback.ctx)",
            "self._engine_client = ",
            "self._running = True",
        ),
    ),
    # Where a server finds its engine's class.
    Order(
        Name(_SERVER, "LLMServer._get_default_engine_class"),
        ("RAYLLM_VLLM_ENGINE_CLS_ENV", "return import_attr("),
    ),
)

FEATURES = (
    Feature("`server_cls`", Name(_CONFIG, "LLMConfig.server_cls"), "", "2.54"),
    Feature("`use_cpu`", Name(_CONFIG, "LLMConfig.use_cpu"), "", "2.54", "2.56"),
    Feature("`accelerator_config`", Name(_CONFIG, "LLMConfig.accelerator_config"), "", "2.56"),
    Feature(
        "`tracing_config` of a Serve config",
        Name("ray.serve.schema", "ServeDeploySchema.tracing_config"),
        "",
        "2.59",
    ),
    *(
        Feature(
            f"`{field}` of a prefill and decode app, ignored",
            Name(f"{_PATTERNS}.prefill_decode.builder", f"PDServingArgs.{field}"),
            "",
            "2.51",
            "2.59",
        )
        for field in ("proxy_cls_config", "proxy_deployment_config")
    ),
    Feature(
        "prefill and decode must have the same adapters",
        Name(f"{_PATTERNS}.prefill_decode.builder", "PDServingArgs._validate_lora_configs"),
        "",
        "2.60",
    ),
    Feature(
        "a URI as `model_source` makes a mirror",
        Name(_ENGINE_CONFIG, "VLLMEngineConfig.from_llm_config"),
        "CloudMirrorConfig(bucket_uri=",
        "2.57",
    ),
    Feature(
        "a replica that stops awaits the engine's `shutdown()`",
        Name(_SERVER, "LLMServer"),
        "await engine.shutdown()",
        "2.58",
    ),
    Feature("`LLMServer.__del__`", Name(_SERVER, "LLMServer.__del__"), "", "2.58"),
    Feature(
        "an engine that streams the weights reads the mirror",
        Name(_ENGINE, "_resolve_hf_model_id_from_mirror"),
        "STREAMING_LOAD_FORMATS",
        "2.59",
    ),
    Feature(
        "a wrong request that vLLM refuses by an error of its own has status 400, and not 500",
        Name(_ENGINE, "VLLMEngine.chat"),
        "VLLMClientError",
        "2.59",
    ),
    Feature(
        "SGLang's engine runs in actors of Ray",
        Name("ray.llm._internal.serve.engines.sglang.sglang_engine", "SGLangServer.__init__"),
        "sglang.srt.ray.engine",
        "2.57",
    ),
    Feature(
        "a node's task reserves no CPU",
        Name(_NODES, "initialize_node"),
        "num_cpus=0",
        "2.55",
    ),
)


def _of_schema() -> Iterator[Name]:
    """Yield the fields that the package's own schema has from Ray; it is read, not imported."""
    path = Path(__file__).parent.parent / "rayserve_hooks" / "cluster" / "ray_schema.py"
    classes = {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }

    def fields(node: ast.ClassDef) -> Iterator[str]:
        for base in node.bases:
            yield from fields(classes[ast.unparse(base)])
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield part.target.id

    for ours, rays in SCHEMA.items():
        for field in fields(classes[ours]):
            yield Name(rays.module, f"{rays.name}.{field}")


def _each_once(*names: Name) -> Iterator[Name]:
    """Yield the names that all tested Rays have; those that some have are features."""
    seen = {str(feature.of) for feature in FEATURES if not feature.part}
    for name in names:
        if str(name) not in seen:
            seen.add(str(name))
            yield name


NAMES = tuple(_each_once(*_USED, *_of_schema()))
