"""The callback of the quick start."""

import shutil

from rayserve_hooks import CallbackCtx, hookimpl


class MyCallback:
    def __init__(self, max_model_len: int = 192) -> None:
        self.max_model_len = max_model_len

    @hookimpl(tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["max_model_len"] = self.max_model_len

    @hookimpl(tryfirst=True)  # before one that brings the model, which skips those after it
    async def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["free_bytes"] = shutil.disk_usage("/").free

    @hookimpl(trylast=True)
    def on_after_init(self, ctx: CallbackCtx) -> None:
        for result in ctx.nodes.values():
            free = result.custom_data.get("free_bytes", "?")
            ctx.log.info("node %s: %s, %s bytes free", result.node, result.model_path, free)
