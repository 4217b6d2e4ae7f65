"""`SGLangServer`: Ray's, with callbacks; Ray's own calls none."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.initialize import initialize
from rayserve_hooks.cluster.slot import raise_reported
from rayserve_hooks.cluster.stacks import stack_of
from rayserve_hooks.core.log import logger
from rayserve_hooks.errors import HooksError

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig
    from ray.util.placement_group import PlacementGroup


class SGLangServer(_ray.SGLangServer):
    """Ray's SGLang server, which initializes its nodes with the callbacks before its engine starts.

    Name it as ``server_cls`` of the deployment's config, ours or Ray's. ``engine_kwargs`` are
    SGLang's; ``model_path`` among them is set to what the nodes have, and may be left out where
    ``model_loading_config`` says where the model is.

    Args:
        llm_config: The deployment's config; Ray passes it.

    Raises:
        HookError: A callback or a node failed; the engine has not been started.
    """

    # Serve awaits it, as that of Ray's server for vLLM.
    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc]
        config: Any = llm_config
        engine = EngineConfig.from_llm_config(config)
        _ray.set_engine(config, engine)
        reserved = _ray.current_placement_group()
        try:
            ctx = await initialize(config, stack_of(config), reserved)
        except HooksError as error:
            raise_reported(error)
        if reserved is not None and ctx.placement_group is not reserved:
            logger.warning(
                "a callback replaced the placement group, and SGLang starts its engine in the one "
                "that Ray Serve made for this replica; set placement_group_config of the LLMConfig "
                "instead"
            )
        engine.hf_model_id = engine.actual_hf_model_id
        super().__init__(config)


@dataclass
class EngineConfig:
    """What `_ray` reads and sets of an engine's config. Ray has one for vLLM alone.

    Attributes:
        model_id: The id that requests name.
        source: What the engine loads unless ``engine_kwargs`` have a ``model_path``.
        mirror_config: The bucket that the model is in, if any.
        engine_kwargs: The config's own mapping, with which the engine is started.
    """

    model_id: str
    source: str
    mirror_config: Any
    engine_kwargs: dict[str, Any]
    runtime_env: dict[str, Any] | None
    placement_bundles: list[dict[str, float]]
    placement_strategy: str
    frontend_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_llm_config(cls, config: Any) -> EngineConfig:
        """Make one as Ray's class for vLLM does."""
        source = config.model_loading_config.model_source
        is_text = isinstance(source, str)
        options = SGLangServer.get_deployment_options(config)
        return cls(
            config.model_id,
            source if is_text else config.model_id,
            None if is_text else source,
            config.engine_kwargs,
            config.runtime_env,
            options["placement_group_bundles"],
            options["placement_group_strategy"],
        )

    @property
    def hf_model_id(self) -> str | None:
        return self.engine_kwargs.get("model_path")

    @hf_model_id.setter
    def hf_model_id(self, path: str) -> None:
        self.engine_kwargs["model_path"] = path

    @property
    def actual_hf_model_id(self) -> str:
        return self.hf_model_id or self.source

    def model_copy(self, update: dict[str, Any]) -> EngineConfig:
        return dataclasses.replace(self, **update)

    def get_runtime_env_with_local_env_vars(self) -> dict[str, Any]:
        return {"env_vars": {}, **copy.deepcopy(self.runtime_env or {})}

    def get_or_create_pg(self) -> PlacementGroup:
        current: PlacementGroup | None = _ray.current_placement_group()
        if current is not None:
            return current
        from ray.util.placement_group import placement_group

        made: PlacementGroup = placement_group(
            self.placement_bundles, strategy=self.placement_strategy
        )
        return made
