"""Stage a model of a shared store on each node's own NVMe disk, and serve it from there.

callbacks:
  - callback: nvme_stage:NvmeStage
    kwargs: {shared: /mnt/models/qwen3-8b, stage: /nvme/models/qwen3-8b}
"""

from pathlib import Path

from rayserve_hooks import CallbackCtx, Handled, download_files


class NvmeStage:
    """Copy a folder of a share to a local disk; without room or disk, serve from the share.

    Args:
        shared: The model's folder on the share, the same on every node.
        stage: The folder on the node's own disk that it goes to.
    """

    def __init__(self, shared: str, stage: str) -> None:
        self.shared = Path(shared)
        self.stage = Path(stage)

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        if not (self.shared / "config.json").is_file():
            raise FileNotFoundError(
                f"{str(self.shared)!r} has no config.json on node {ctx.node}; mount the share there"
            )
        try:
            # Once per node, verified, and only what has changed since the last start.
            download_files(self.shared.as_uri(), self.stage)
        except RuntimeError as error:
            ctx.log.warning("not staged, the engine reads the share: %s", error)
            return Handled(self.shared, f"{self.shared} is not staged on this node")
        return Handled(self.stage, f"{self.shared} is staged at {self.stage}")
