"""A callback that needs a secret, and is given the name of the file that holds it."""

import os
from pathlib import Path

from rayserve_hooks import CallbackCtx


class HubToken:
    """Let each node read private models of the Hugging Face Hub.

    Args:
        file: The file with the token, such as a secret that Kubernetes mounts.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        os.environ["HF_TOKEN"] = self.file.read_text().strip()
