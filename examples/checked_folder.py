"""A callback that adds a line to ``rayserve-hooks doctor``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx, Finding, Handled


class CheckedFolder:
    """Serve a model from a folder, and say before the deployment whether it is mounted."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
        if (self.folder / "config.json").is_file():
            yield Finding("folder", "ok", f"{self.folder} holds a model")
        else:
            yield Finding(
                "folder", "problem", f"{self.folder} holds no model", "mount it on every node"
            )

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled(model_path=self.folder, reason=f"{self.folder} is mounted")
