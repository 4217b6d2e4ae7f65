"""What Ray takes in a Serve config of its LLM builders, without importing Ray.

Importing Ray's own classes takes seconds. A test holds names, kinds and verdicts equal to theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic.types import PositiveInt, StringConstraints

from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.validation import adapter, problems_of
from rayserve_hooks.errors import did_you_mean

_IMPORT_PATH = r"^([^:]+:[^:]+|[^:.][^:]*\.[^:.]+)$"
REMOTE = ("s3://", "gs://", "abfss://", "azure://")
"""How the URI of a store begins."""
STREAMING_LOAD_FORMATS = ("runai_streamer", "runai_streamer_sharded", "tensorizer")
"""With these ``load_format`` the engine reads the weights from the store itself."""

Remote = Annotated[str, StringConstraints(pattern=f"^({'|'.join(REMOTE)})")]
Bundle = dict[str, Annotated[float, Field(ge=0)]]
LLMConfigOrFile = str | dict[str, Any]  # a string is the path of a YAML file


@dataclass(kw_only=True)
class ServeDeploy:
    """The whole file: ``ray.serve.schema.ServeDeploySchema``."""

    applications: list[Any]
    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    grpc_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    controller_options: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None
    tracing_config: dict[str, Any] | None = None
    target_capacity: Annotated[float, Field(ge=0, le=100)] | None = None


@dataclass(kw_only=True)
class Application:
    """One of ``applications``: ``ray.serve.schema.ServeApplicationSchema``.

    Its ``host`` and ``port`` are left out: Ray has the fields, and refuses them in such a file.
    """

    import_path: Annotated[str, StringConstraints(pattern=_IMPORT_PATH)]
    name: Annotated[str, StringConstraints(min_length=1)] = "default"
    route_prefix: str | None = "/"
    runtime_env: dict[str, Any] = dataclasses.field(default_factory=dict)
    deployments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    autoscaling_policy: dict[str, Any] | None = None
    args: dict[Any, Any] = dataclasses.field(default_factory=dict)
    logging_config: dict[str, Any] | None = None
    external_scaler_enabled: bool = False


@dataclass(kw_only=True)
class _Ingress:
    ingress_cls_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    ingress_deployment_config: dict[str, Any] | None = None


@dataclass(kw_only=True)
class OpenAIArgs(_Ingress):
    """``args`` of ``build_openai_app``."""

    llm_configs: list[LLMConfigOrFile]


@dataclass(kw_only=True)
class DataParallelArgs(_Ingress):
    """``args`` of ``build_dp_openai_app``."""

    llm_config: LLMConfigOrFile


@dataclass(kw_only=True)
class PrefillDecodeArgs(_Ingress):
    """``args`` of ``build_pd_openai_app``."""

    prefill_config: LLMConfigOrFile
    decode_config: LLMConfigOrFile


@dataclass(kw_only=True)
class PrefillDecodeArgsWithProxy(PrefillDecodeArgs):
    """The same where `_ray.takes_a_proxy`: Ray takes what configured one, and ignores it."""

    proxy_cls_config: dict[str, Any] | None = None
    proxy_deployment_config: dict[str, Any] | None = None


BUILDERS: dict[str, type[_Ingress]] = {
    "ray.serve.llm:build_openai_app": OpenAIArgs,
    "ray.serve.llm:build_dp_openai_app": DataParallelArgs,
    "ray.serve.llm:build_pd_openai_app": PrefillDecodeArgs,
    "rayserve_hooks:build_openai_app": OpenAIArgs,
    "rayserve_hooks:build_dp_openai_app": DataParallelArgs,
    "rayserve_hooks:build_pd_openai_app": PrefillDecodeArgs,
}
"""The arguments of each builder, Ray's and ours, by its import path."""


@dataclass(kw_only=True)
class LLMConfig:
    """``ray.serve.llm.LLMConfig``; what is inside of its mappings has classes of its own."""

    model_loading_config: dict[Any, Any]
    runtime_env: dict[str, Any] | None = None
    llm_engine: Literal["vLLM"] = "vLLM"
    engine_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    accelerator_type: str | None = None
    accelerator_config: dict[Any, Any] | None = None
    placement_group_config: dict[Any, Any] | None = None
    lora_config: dict[Any, Any] | None = None
    deployment_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    server_cls: Any = None
    experimental_configs: dict[str, Any] = dataclasses.field(default_factory=dict)
    log_engine_metrics: bool | None = True
    callback_config: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclass(kw_only=True)
class ModelLoadingConfig:
    """``model_loading_config`` of an ``LLMConfig``."""

    model_id: str
    model_source: str | dict[str, Any] | None = None
    tokenizer_source: str | None = None


@dataclass(kw_only=True)
class ModelSource:
    """``model_source`` of a ``model_loading_config``, where it is a mapping."""

    bucket_uri: Remote | None = None
    extra_files: list[dict[str, str]] = dataclasses.field(default_factory=list)


@dataclass(kw_only=True)
class IngressCls:
    """``ingress_cls_config`` of a builder's ``args``."""

    ingress_cls: str = ""
    ingress_extra_kwargs: dict[Any, Any] | None = None


@dataclass(kw_only=True)
class CallbackConfig:
    """``callback_config`` of an ``LLMConfig``."""

    callback_class: str = ""
    callback_kwargs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    raise_error_on_callback: bool = True


@dataclass(kw_only=True)
class LoraConfig:
    """``lora_config`` of an ``LLMConfig``."""

    dynamic_lora_loading_path: Remote | None = None
    max_num_adapters_per_replica: PositiveInt = 16
    download_timeout_s: float | None = None
    max_download_tries: int = 10


@dataclass(kw_only=True)
class PlacementGroupConfig:
    """``placement_group_config`` of an ``LLMConfig``; Ray reads it when it builds the engine."""

    bundle_per_worker: Bundle | None = None
    bundles: list[Bundle] | None = None
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


PARTS: dict[str, type] = {
    "model_loading_config": ModelLoadingConfig,
    "callback_config": CallbackConfig,
    "lora_config": LoraConfig,
    "placement_group_config": PlacementGroupConfig,
}
"""What stands in the mappings of an LLM config."""

_LENIENT = (ServeDeploy, Application)  # Ray ignores keys that it does not know in these

_HOMES = {
    **{field.name: "an LLM config" for field in dataclasses.fields(LLMConfig)},
    **{
        field.name: f"{name} of an LLM config"
        for name in PARTS
        for field in dataclasses.fields(PARTS[name])
    },
    **dict.fromkeys(
        ("callbacks", "callback", "time_limits"),
        "callback_kwargs of the callback_config of an LLM config",
    ),
    **{field.name: "args" for cls in BUILDERS.values() for field in dataclasses.fields(cls)},
    "import_path": "an application",
    "applications": "the top level",
}


def problems(kind: type, value: Mapping[Any, Any], where: str) -> Iterator[str]:
    """Yield what Ray would refuse, or ignore though it is meant for something.

    Args:
        kind: One of the classes above.
        value: The mapping that stands for one.
        where: Names it in the texts.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            yield from _unknown(kind, key, known, where)
    try:
        adapter(kind).validate_python({key: value[key] for key in known if key in value})
    except ValidationError as error:
        for problem in problems_of(error, known):
            yield problem.in_config(where)


def _unknown(kind: type, key: object, known: Collection[str], where: str) -> Iterator[str]:
    name = key if isinstance(key, str) else shown(key)
    close = did_you_mean(name, known, cutoff=0.8 if kind in _LENIENT else 0.6)
    if isinstance(key, str) and key in _HOMES:
        yield f"{where} has unknown key {key!r}, which belongs to {_HOMES[key]}; move it there"
    elif kind is Application and key in ("host", "port"):
        yield f"{where} has key {key!r}; set it in http_options, for all applications"
    elif close or kind not in _LENIENT:
        choices = f"; use one of {', '.join(known)}"
        yield f"{where} has unknown key {name!r}{close or choices}"
