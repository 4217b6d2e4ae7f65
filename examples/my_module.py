"""The callback of the quick start."""

import logging
import shutil

from rayserve_hooks import CallbackCtx, hookimpl

logger = logging.getLogger("ray.serve.my_module")


class MyCallback:
    def __init__(self, max_model_len: int = 192) -> None:
        self.max_model_len = max_model_len

    @hookimpl(tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["max_model_len"] = self.max_model_len

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["free_bytes"] = shutil.disk_usage("/").free

    @hookimpl(trylast=True)
    def on_after_init(self, ctx: CallbackCtx) -> None:
        for result in ctx.nodes.values():
            free = result.custom_data["free_bytes"]
            logger.info("node %s: %s, %d bytes free", result.node, result.model_path, free)
