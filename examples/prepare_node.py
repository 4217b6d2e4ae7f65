"""A callback that prepares each node beside its download, and cleans up after a failure."""

import shutil
import tarfile
from pathlib import Path

from rayserve_hooks import CallbackCtx


class RestoreCache:
    """Unpack an archive on each node.

    Args:
        archive: The archive, such as a compile cache.
        folder: Where its files go.
    """

    def __init__(self, archive: str, folder: str) -> None:
        self.archive = Path(archive)
        self.folder = Path(folder)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        ctx.run_in_background(self.unpack)

    def unpack(self) -> None:
        with tarfile.open(self.archive) as archive:
            archive.extractall(self.folder, filter="data")

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
