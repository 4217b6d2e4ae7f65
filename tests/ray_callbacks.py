"""Callbacks written for Ray's own slot, as users have them."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.common.utils.download_utils import NodeModelDownloadable


class Everything(CallbackBase):
    """Uses all three methods, two of them async, and sets every field."""

    async def on_before_node_init(self) -> None:
        self.ctx.worker_node_download_model = NodeModelDownloadable.NONE
        assert self.ctx.runtime_env is not None
        self.ctx.runtime_env["env_vars"]["FROM_RAY_CALLBACK"] = "1"
        self.ctx.custom_data["calls"] = ["on_before_node_init"]
        self.ctx.custom_data["greeting"] = self.kwargs["greeting"]

    def on_before_download_model_files_distributed(self) -> None:
        self.ctx.custom_data["calls"].append("on_before_download_model_files_distributed")

    async def on_after_node_init(self) -> None:
        self.ctx.custom_data["calls"].append("on_after_node_init")
        self.ctx.custom_data["model_id"] = self.llm_config.model_id


class TakesOver(CallbackBase):
    def on_before_node_init(self) -> None:  # type: ignore[override]
        self.ctx.run_init_node = False


class Strict(CallbackBase):
    def __init__(self, llm_config: Any, raise_error_on_callback: bool, ctx_kwargs: Any) -> None:
        super().__init__(llm_config, raise_error_on_callback, ctx_kwargs)


class Fails(CallbackBase):
    async def on_before_node_init(self) -> None:
        raise RuntimeError("no such bucket")


class NeedsPaths(CallbackBase):
    def __init__(self, paths: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)

    async def on_after_node_init(self) -> None:
        pass
