"""Serve models from a file system that every node mounts."""

from __future__ import annotations

from pathlib import Path

from rayserve_hooks import CallbackCtx, Handled
from rayserve_hooks.core.arguments import checked_arguments


class ModelFromShare:
    """Use the model on the share where there is one; else it is downloaded as ever.

    Args:
        folder: Where the models are, each in a folder named after its id.
    """

    @checked_arguments
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_init(self, ctx: CallbackCtx) -> None:
        # Here, in the replica: on another node the config would have to be loaded for it.
        ctx.custom_data["model_from_share"] = ctx.llm_config.model_id

    def on_before_download(self, ctx: CallbackCtx) -> Handled | None:
        model = self.folder / ctx.custom_data["model_from_share"]
        if (model / "config.json").is_file():
            return Handled(model_path=model, reason="it is on the share")
        ctx.log.info("%s is not on the share", model)
        return None
