"""Where a deployment's LoRA adapters come from, and where Ray's own loader has them on a node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rayserve_hooks.cluster import _ray

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig


def adapters_uri(config: LLMConfig) -> str | None:
    """Return the folder that the config names as ``lora_config.dynamic_lora_loading_path``."""
    return getattr(config.lora_config, "dynamic_lora_loading_path", None)


def adapter_folders(config: LLMConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the folder of each adapter, the same on every node, in which Ray's loader puts it.

    Args:
        config: The deployment's config.
        names: What comes after the colon in ``model:adapter``.
    """
    return {name: _ray.adapter_folder(config, name) for name in names}
