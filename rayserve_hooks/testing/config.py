"""`ModelConfig`, which stands in for an ``LLMConfig`` where neither Ray nor an engine is there."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download.model import Mirror
from rayserve_hooks.errors import did_you_mean

# As ``ray.llm._internal.common.utils.download_utils.STREAMING_LOAD_FORMATS``, Ray 2.60.
STREAMING_LOAD_FORMATS = ("runai_streamer", "runai_streamer_sharded", "tensorizer")
_STORE = re.compile(r"(s3|gs|azure|abfss|file)://")


@dataclass(frozen=True)
class LoadingConfig:
    """A stand-in for Ray's ``ModelLoadingConfig``."""

    model_id: str
    model_source: str | None = None


@dataclass(frozen=True)
class LoraConfig:
    """A stand-in for Ray's ``LoraConfig``.

    Args:
        dynamic_lora_loading_path: The folder of a store with a folder for each adapter.
    """

    dynamic_lora_loading_path: str | None = None


@dataclass
class ModelConfig:
    """A stand-in for ``LLMConfig`` with what callbacks read of one.

    Args:
        model_id: The model's name.
        model_source: Where the default download finds it: a folder, the URI of a store, or, for
            the engine, the id of a model on the Hugging Face Hub. None downloads nothing.
        engine_kwargs: The engine's keyword arguments.
        runtime_env: The runtime environment.
        placement_group_config: The bundles and strategy; by default a bundle for each node.
        deployment_config: What Serve is told of the deployment.
        accelerator_type: The kind of GPU.
        lora_config: Where LoRA adapters come from.
    """

    model_id: str = "tiny"
    model_source: str | Path | None = None
    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    placement_group_config: dict[str, Any] | None = None
    deployment_config: dict[str, Any] = field(default_factory=dict)
    accelerator_type: str | None = None
    lora_config: LoraConfig | None = None
    _engine: EngineConfig | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def model_loading_config(self) -> LoadingConfig:
        source = self.model_source
        return LoadingConfig(self.model_id, None if source is None else str(source))

    def update_engine_kwargs(self, **kwargs: Any) -> None:
        """Merge keyword arguments into the engine's."""
        self.engine_kwargs.update(kwargs)

    def get_engine_config(self) -> EngineConfig:
        """Return the engine's part, of which ``hf_model_id`` may be set."""
        if self._engine is None:
            self._engine = EngineConfig(self)
        return self._engine

    @property
    def mirror(self) -> Mirror | None:
        """The store that the default download reads, if there is one."""
        if self.model_source is None:
            return None
        source = str(self.model_source)
        if _STORE.match(source):
            return Mirror(source)
        folder = Path(source)
        return Mirror(folder.resolve().as_uri()) if folder.is_dir() else None

    # Hidden from type checkers, for which a name that is not there must not exist.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            known = [name for name in vars(self) if not name.startswith("_")]
            raise AttributeError(
                f"the ModelConfig of a test has no {name!r}{did_you_mean(name, known)}; give "
                "run_stack() a real LLMConfig as its config"
            )


@dataclass
class EngineConfig:
    """A stand-in for the engine's part of an ``LLMConfig``."""

    llm_config: ModelConfig = field(repr=False)
    hf_model_id: str | None = None

    @property
    def actual_hf_model_id(self) -> str:
        """What the engine loads: a path, a URI or an id."""
        config = self.llm_config
        own = config.model_id if config.mirror else str(config.model_source or config.model_id)
        return self.hf_model_id or own

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        return self.llm_config.engine_kwargs


class ModelConfigs:
    """What `rayserve_hooks.cluster._ray` knows of an ``LLMConfig``, of a `ModelConfig`."""

    @staticmethod
    def deployed_variables(config: ModelConfig) -> dict[str, str]:
        return dict(config.runtime_env.get("env_vars") or {})

    @staticmethod
    def changed(config: ModelConfig, update: dict[str, Any]) -> dict[str, Any]:
        return update

    @staticmethod
    def reconfigured(config: ModelConfig, update: dict[str, Any], stack: object) -> ModelConfig:
        return replace(copy.deepcopy(config), **update)

    @staticmethod
    def default_download_mode(config: ModelConfig) -> NodeModelDownloadable:
        if config.engine_kwargs.get("load_format") in STREAMING_LOAD_FORMATS:
            return NodeModelDownloadable.NONE
        return NodeModelDownloadable.MODEL_AND_TOKENIZER

    @staticmethod
    def initial_runtime_env(config: ModelConfig) -> dict[str, Any]:
        return copy.deepcopy(config.runtime_env)

    @staticmethod
    def model_source(config: ModelConfig) -> tuple[str, Mirror | None]:
        if config.model_source is None:
            return os.curdir, None  # a path that is there, of which nothing is to be fetched
        return config.get_engine_config().actual_hf_model_id, config.mirror

    @classmethod
    def stream_from_mirror(cls, config: ModelConfig) -> None:
        streams = cls.default_download_mode(config) is NodeModelDownloadable.NONE
        if streams and config.mirror and config.get_engine_config().hf_model_id is None:
            cls.set_model_path(config, str(config.model_source))

    @staticmethod
    def set_model_path(config: ModelConfig, path: str) -> None:
        config.get_engine_config().hf_model_id = path

    @staticmethod
    def set_engine_kwargs(config: ModelConfig, kwargs: dict[str, Any]) -> None:
        config.update_engine_kwargs(**kwargs)
