"""One callback twice: for Ray's own slot, and as a callback of this package."""

from __future__ import annotations

from ray.llm._internal.common.callbacks.base import CallbackBase

from rayserve_hooks import CallbackCtx, Handled


# before
class Stock(CallbackBase):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data["folder"] = self.kwargs["folder"]
        self.ctx.run_init_node = self.kwargs.get("download", True)

    def on_before_download_model_files_distributed(self) -> None:
        print("files go to", self.ctx.custom_data["folder"])

    async def on_after_node_init(self) -> None:
        print("ready:", self.llm_config.model_id)


# after
class Ours:
    def __init__(self, folder: str, download: bool = True) -> None:
        self.folder, self.download = folder, download

    def on_before_init(self, ctx: CallbackCtx) -> Handled | None:
        return None if self.download else Handled(reason="the files are there")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        print("files go to", self.folder)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        print("ready:", ctx.llm_config.model_id)
